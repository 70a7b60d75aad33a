//! A split virtqueue (virtio 1.2, section 2.7) of single-descriptor buffers, or of one chain at a time.

use core::sync::atomic::{AtomicU16, Ordering, fence};
use core::{mem, ptr};

/// Descriptor flag: the device writes into the buffer.
pub const DESC_WRITE: u16 = 2;
/// Descriptor flag: the buffer continues in the next descriptor.
const DESC_NEXT: u16 = 1;
/// Flag of the available ring: do not interrupt (without EVENT_IDX).
const AVAIL_NO_INTERRUPT: u16 = 1;
/// Flag of the used ring: do not notify (without EVENT_IDX).
const USED_NO_NOTIFY: u16 = 1;

#[repr(C)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

#[repr(C)]
struct Available<const N: usize> {
    flags: AtomicU16,
    index: AtomicU16,
    ring: [AtomicU16; N],
    used_event: AtomicU16,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct UsedElement {
    id: u32,
    len: u32,
}

#[repr(C)]
struct Used<const N: usize> {
    flags: AtomicU16,
    index: AtomicU16,
    ring: [UsedElement; N],
    avail_event: AtomicU16,
}

/// Bytes of a descriptor table of `n` entries.
pub const fn descriptors_len(n: usize) -> usize {
    n * mem::size_of::<Descriptor>()
}

/// Bytes of an available ring of `n` entries, rounded up to the alignment of what follows.
pub const fn available_len(n: usize) -> usize {
    (6 + 2 * n).next_multiple_of(16)
}

/// Bytes of a used ring of `n` entries, rounded up to the alignment of what follows.
pub const fn used_len(n: usize) -> usize {
    (6 + 8 * n).next_multiple_of(16)
}

/// Addresses of the three parts of a queue, zeroed memory the device shares with us.
#[derive(Clone, Copy)]
pub struct Parts {
    /// Descriptor table, 16-byte aligned, [`descriptors_len`] bytes.
    pub descriptors: u64,
    /// Available ring, 2-byte aligned, [`available_len`] bytes.
    pub available: u64,
    /// Used ring, 4-byte aligned, [`used_len`] bytes.
    pub used: u64,
}

/// The driver's side of one queue of `N` (a power of two) descriptors; descriptor i always belongs to buffer
/// i.
pub struct Queue<const N: usize> {
    parts: Parts,
    event_idx: bool,
    /// Next index of the available ring, published by `offer`.
    next_available: u16,
    /// Available index at the last notification decision.
    last_notify: u16,
    /// Next used element to take.
    next_used: u16,
}

impl<const N: usize> Queue<N> {
    /// Takes over zeroed memory and turns interrupts off.
    ///
    /// # Safety
    /// `parts` are valid, zeroed, aligned as [`Parts`] says, and used by this queue and its device alone for
    /// ever.
    pub unsafe fn new(parts: Parts, event_idx: bool) -> Self {
        const { assert!(N.is_power_of_two() && N <= 1 << 15) };
        let queue = Self { parts, event_idx, next_available: 0, last_notify: 0, next_used: 0 };
        if !event_idx {
            queue.available().flags.store(AVAIL_NO_INTERRUPT, Ordering::Relaxed);
        }
        queue.refuse_interrupts();
        queue
    }

    fn available(&self) -> &Available<N> {
        // SAFETY: valid forever by `new`; all fields are atomics.
        unsafe { &*(self.parts.available as *const Available<N>) }
    }

    fn used_index(&self) -> u16 {
        // SAFETY: valid forever by `new`; the reference covers the one atomic.
        let index = unsafe { &(*(self.parts.used as *const Used<N>)).index };
        index.load(Ordering::Acquire)
    }

    /// With EVENT_IDX the device interrupts when it passes `used_event`; keep that one lap (65,535 buffers)
    /// away.
    fn refuse_interrupts(&self) {
        if self.event_idx {
            self.available().used_event.store(self.next_used.wrapping_sub(1), Ordering::Relaxed);
        }
    }

    /// Writes descriptor `id`.
    pub fn describe(&mut self, id: u16, address: u64, len: u32, flags: u16) {
        self.put(id, Descriptor { address, len, flags, next: 0 });
    }

    /// Writes one buffer of several parts (address, length, flags), which has all descriptors from the first.
    pub fn describe_chain(&mut self, parts: &[(u64, u32, u16)]) {
        for (id, &(address, len, flags)) in parts.iter().enumerate() {
            let next = if id + 1 < parts.len() { DESC_NEXT } else { 0 };
            self.put(id as u16, Descriptor { address, len, flags: flags | next, next: id as u16 + 1 });
        }
    }

    fn put(&mut self, id: u16, descriptor: Descriptor) {
        assert!(usize::from(id) < N, "descriptor index out of range");
        // SAFETY: inside the table by the assertion; the device does not own descriptor `id` now, since
        // buffers are offered once and described only while we own them.
        unsafe {
            ptr::write_volatile((self.parts.descriptors as *mut Descriptor).add(usize::from(id)), descriptor)
        }
    }

    /// Gives buffer `id` to the device; [`Queue::should_notify`] says later whether the device wants a
    /// notification.
    pub fn offer(&mut self, id: u16) {
        let slot = usize::from(self.next_available) & (N - 1);
        self.available().ring[slot].store(id, Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
        self.available().index.store(self.next_available, Ordering::Release);
    }

    /// True when the device has finished a buffer.
    pub fn has_used(&self) -> bool {
        self.used_index() != self.next_used
    }

    /// The next finished buffer (id, bytes written) without taking it.
    pub fn peek_used(&self) -> Option<(u16, u32)> {
        if !self.has_used() {
            return None;
        }
        let slot = usize::from(self.next_used) & (N - 1);
        // SAFETY: inside the used ring by the mask; the device published this element before the index we
        // acquired.
        let element =
            unsafe { ptr::read_volatile(&raw const (*(self.parts.used as *const Used<N>)).ring[slot]) };
        assert!((element.id as usize) < N, "the device returned an unknown buffer");
        Some((element.id as u16, element.len))
    }

    /// Takes the buffer that [`Queue::peek_used`] shows.
    pub fn pop_used(&mut self) -> Option<(u16, u32)> {
        let element = self.peek_used()?;
        self.next_used = self.next_used.wrapping_add(1);
        if self.next_used & 0xfff == 0 {
            self.refuse_interrupts();
        }
        Some(element)
    }

    /// True when buffers were offered since the last call and the device asks to be notified of them.
    pub fn should_notify(&mut self) -> bool {
        let (old, new) = (self.last_notify, self.next_available);
        if old == new {
            return false;
        }
        self.last_notify = new;
        // The device must see the new index before we read its wish, as it publishes its wish before its last
        // look at the index (section 2.7.13.4.1).
        fence(Ordering::SeqCst);
        let used = self.parts.used as *const Used<N>;
        if self.event_idx {
            // SAFETY: valid forever by `new`; the reference covers the one atomic.
            let event = unsafe { &(*used).avail_event }.load(Ordering::Acquire);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            // SAFETY: as above.
            unsafe { &(*used).flags }.load(Ordering::Acquire) & USED_NO_NOTIFY == 0
        }
    }
}
