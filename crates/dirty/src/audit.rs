//! Finds writes to guest memory that nobody reported; for the tests of a VMM.
// UNSAFETY: reads guest memory by its address in this process.
#![allow(unsafe_code)]

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use crate::layout::{Gfn, MemoryLayout, MemorySlot, PAGE_SIZE};

/// Remembers the contents of guest memory, and finds pages that have changed without being reported.
///
/// A VMM that writes guest memory and forgets to mark it ([`crate::GlobalLog::mark_range`]) loses that write
/// in every checkpoint, and nothing fails until somebody resumes one. So let its tests keep an auditor beside
/// the tracker and ask it once an epoch, while vCPUs and devices are stopped:
///
/// ```no_run
/// # fn audited(tracker: &outlive_dirty::Tracker) -> Result<(), Box<dyn std::error::Error>> {
/// use outlive_dirty::audit::Auditor;
///
/// tracker.enable()?;
/// // SAFETY: the slots are mapped until the end of the test, and nobody writes them now or at `check`.
/// let mut auditor = unsafe { Auditor::new(&tracker.layout())? };
/// // ... the guest runs and stops; devices write, mark and stop ...
/// let epoch = tracker.stopped().state_saved().harvest()?.rearm()?;
/// assert_eq!(auditor.check(epoch.pages()), [], "pages that somebody wrote and did not report");
/// epoch.copied().run();
/// # Ok(())
/// # }
/// ```
///
/// Writing the same bytes again is no change. The auditor needs no KVM. It reads all memory that has ever
/// been touched, in about 0.1 s a GiB, and keeps 16 bytes a page.
pub struct Auditor {
    slots: Vec<Audited>,
    pagemap: File,
}

impl Auditor {
    /// Remembers the present contents of the slots.
    ///
    /// Pages of private anonymous memory that were never touched count as zero and are not touched either;
    /// all other memory is read.
    ///
    /// # Errors
    /// `/proc/self/maps` or `/proc/self/pagemap` cannot be read.
    ///
    /// # Safety
    /// As long as the auditor is used, every slot is readable memory of this process at its `host_addr`, for
    /// all its pages, and nobody writes it during this call and during [`Auditor::check`].
    pub unsafe fn new(layout: &MemoryLayout) -> io::Result<Auditor> {
        let anonymous = anonymous_mappings()?;
        let audited = |slot: &MemorySlot| Audited {
            slot: *slot,
            // Zeroed memory that nobody touches costs nothing, like the pages that it stands for.
            digests: vec![0; slot.pages as usize],
            sparse: is_covered(slot, &anonymous),
        };
        let slots = layout.slots().iter().map(audited).collect();
        let mut auditor = Auditor { slots, pagemap: File::open("/proc/self/pagemap")? };
        auditor.renew(|_| ());
        Ok(auditor)
    }

    /// The pages that have changed since the last call, or since [`Auditor::new`], and are not in `reported`;
    /// in ascending order. The next call compares with the present contents.
    pub fn check(&mut self, reported: &[Gfn]) -> Vec<Gfn> {
        let mut reported = reported.to_vec();
        reported.sort_unstable();
        let mut silent = Vec::new();
        self.renew(|gfn| {
            if reported.binary_search(&gfn).is_err() {
                silent.push(gfn);
            }
        });
        silent
    }

    /// Checks every page and calls `changed` for those that have changed.
    fn renew(&mut self, mut changed: impl FnMut(Gfn)) {
        let mut touched = Touched::new(&self.pagemap);
        for Audited { slot, digests, sparse } in &mut self.slots {
            for (index, digest) in digests.iter_mut().enumerate() {
                let address = slot.host_addr + index as u64 * PAGE_SIZE;
                let now = if *sparse && !touched.is_touched(address / PAGE_SIZE) {
                    0
                } else {
                    let page = std::ptr::with_exposed_provenance::<[u64; WORDS]>(address as usize);
                    // SAFETY: a whole page of a slot, readable and not written meanwhile by the contract of
                    // `new`; its address is a multiple of the page size (`MemoryLayout::new`).
                    digest_of(unsafe { &*page })
                };
                if *digest != now {
                    *digest = now;
                    changed(Gfn(slot.base.0 + index as u64));
                }
            }
        }
    }
}

impl fmt::Debug for Auditor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auditor").field("slots", &self.slots.len()).finish_non_exhaustive()
    }
}

struct Audited {
    slot: MemorySlot,
    digests: Vec<u128>,
    /// Pages that the page table does not know are zero.
    sparse: bool,
}

// --- the digest of a page
// -----------------------------------------------------------------------------------------

/// Words of 8 bytes in a page.
const WORDS: usize = PAGE_SIZE as usize / 8;

/// One random number for each word of a page.
static KEYS: [u64; WORDS] = keys();

const fn keys() -> [u64; WORDS] {
    let mut keys = [0; WORDS];
    let mut index = 0;
    while index < WORDS {
        // Splitmix64.
        let mixed = (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        keys[index] = mixed ^ (mixed >> 31);
        index += 1;
    }
    keys
}

/// The sum of (word + key) × (next word + next key) over the pairs of words, modulo 2^128, minus the sum for
/// a page of zeros.
///
/// This is NH, the hash of UMAC (Black and others, CRYPTO 1999): two different contents, chosen without a
/// look at the keys, have the same sum with a probability of at most 2^-64, however little they differ.
fn digest_of(page: &[u64; WORDS]) -> u128 {
    // Four sums, because each addition waits for the one before it.
    let mut sums = [0u128; 4];
    for (words, keys) in page.chunks_exact(8).zip(KEYS.chunks_exact(8)) {
        for (lane, sum) in sums.iter_mut().enumerate() {
            let first = words[2 * lane].wrapping_add(keys[2 * lane]);
            let second = words[2 * lane + 1].wrapping_add(keys[2 * lane + 1]);
            *sum = sum.wrapping_add(u128::from(first) * u128::from(second));
        }
    }
    sums.into_iter().fold(0, u128::wrapping_add).wrapping_sub(OF_ZEROS)
}

const OF_ZEROS: u128 = {
    let (mut sum, mut pair) = (0u128, 0);
    while pair < WORDS {
        sum = sum.wrapping_add(KEYS[pair] as u128 * KEYS[pair + 1] as u128);
        pair += 2;
    }
    sum
};

// --- pages that were never touched
// ----------------------------------------------------------------------------------

/// Host addresses, from and to, of the private anonymous mappings of this process. Only there does "not in
/// the page table" mean "zero": pages of files are stored elsewhere, and pages of shared memory may be in
/// another mapping.
fn anonymous_mappings() -> io::Result<Vec<(u64, u64)>> {
    let mut mappings: Vec<(u64, u64)> = Vec::new();
    for (start, end) in fs::read_to_string("/proc/self/maps")?.lines().filter_map(anonymous_mapping) {
        match mappings.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => mappings.push((start, end)),
        }
    }
    Ok(mappings)
}

/// The range in a line of /proc/self/maps (`start-end rwxp offset device inode name`), if it is private and
/// not of a file.
fn anonymous_mapping(line: &str) -> Option<(u64, u64)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let private = fields.next()?.ends_with('p');
    let inode = fields.nth(2)?;
    let range = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    (private && inode == "0").then_some(range)
}

fn is_covered(slot: &MemorySlot, mappings: &[(u64, u64)]) -> bool {
    let end = slot.host_addr + slot.pages * PAGE_SIZE;
    mappings.iter().any(|&(from, to)| from <= slot.host_addr && end <= to)
}

/// The answers of /proc/self/pagemap about pages that are asked for in ascending order.
struct Touched<'p> {
    pagemap: &'p File,
    entries: Vec<u8>,
    /// The first page of `entries`.
    first: u64,
}

/// Entries read at a time.
const ENTRIES: usize = 4096;
/// Bit 63: in memory; bit 62: swapped out, or a marker of userfaultfd
/// (Documentation/admin-guide/mm/pagemap.rst).
const KNOWN: u64 = 0b11 << 62;

impl<'p> Touched<'p> {
    fn new(pagemap: &'p File) -> Self {
        Touched { pagemap, entries: Vec::new(), first: 0 }
    }

    /// Whether the page table knows a page (host address / page size). True if this cannot be found out.
    fn is_touched(&mut self, page: u64) -> bool {
        if page.wrapping_sub(self.first) >= self.entries.len() as u64 / 8 {
            self.first = page;
            self.entries.resize(ENTRIES * 8, 0);
            let read = self.pagemap.read_at(&mut self.entries, page * 8).unwrap_or(0);
            self.entries.truncate(read);
        }
        let first = (page - self.first) as usize * 8;
        let entry = self.entries.get(first..first + 8).and_then(|bytes| bytes.try_into().ok());
        entry.is_none_or(|entry| u64::from_ne_bytes(entry) & KNOWN != 0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

    use super::*;
    use crate::{GlobalLog, RegionLog};

    /// Slot numbers, first pages and pages.
    const SLOTS: [(u32, u64, u64); 3] = [(4, 0, 16), (0, 16, 3000), (1, 0x10_0000, 700)];
    const ANONYMOUS: i32 = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    const SHARED: i32 = libc::MAP_ANONYMOUS | libc::MAP_SHARED | libc::MAP_NORESERVE;

    struct Vm {
        memory: GuestMemoryMmap<RegionLog>,
        layout: MemoryLayout,
        log: Arc<GlobalLog>,
    }

    fn vm(flags: i32) -> Vm {
        let log = GlobalLog::new(0x11_0000, 64);
        log.enable(
            &MemoryLayout::new(vec![MemorySlot { id: 0, base: Gfn(0), pages: 0x1000, host_addr: 0 }])
                .unwrap(),
        );
        let regions = SLOTS.map(|(_, base, pages)| {
            let bitmap = RegionLog::new(log.clone(), Gfn(base));
            let mapping = MmapRegionBuilder::new_with_bitmap((pages * PAGE_SIZE) as usize, bitmap)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(flags)
                .build();
            GuestRegionMmap::new(mapping.unwrap(), GuestAddress(base * PAGE_SIZE)).unwrap()
        });
        let memory = GuestMemoryMmap::from_regions(regions.into()).unwrap();
        let slot = |(region, (id, base, pages)): (&GuestRegionMmap<RegionLog>, _)| {
            let host_addr = region.as_ptr().expose_provenance() as u64;
            MemorySlot { id, base: Gfn(base), pages, host_addr }
        };
        let layout = MemoryLayout::new(memory.iter().zip(SLOTS).map(slot).collect()).unwrap();
        Vm { memory, layout, log }
    }

    impl Vm {
        fn auditor(&self) -> Auditor {
            // SAFETY: the slots are those of `memory`; these tests have one thread each.
            unsafe { Auditor::new(&self.layout).unwrap() }
        }

        /// Writes as devices should: with marks.
        fn write(&self, gpa: u64, value: u64) {
            self.memory.write_obj(value, GuestAddress(gpa)).unwrap();
        }

        /// Writes past the log.
        fn write_silently(&self, gpa: u64, value: u8) {
            // SAFETY: a byte of guest memory; nobody else uses it now.
            unsafe { self.memory.get_host_address(GuestAddress(gpa)).unwrap().write(value) };
        }

        fn reported(&self) -> Vec<Gfn> {
            let mut pages = Vec::new();
            self.log.drain(|gfn| pages.push(gfn));
            pages
        }
    }

    #[test]
    fn a_write_that_nobody_marked_is_found() {
        for flags in [ANONYMOUS, SHARED] {
            let vm = vm(flags);
            let mut auditor = vm.auditor();
            assert_eq!(auditor.check(&[]), []);
            for (page, offset) in [(0, 0), (15, 4095), (16, 1), (3015, 77), (0x10_0000, 8), (0x10_02bb, 4088)]
            {
                vm.write(5 * PAGE_SIZE, page + 1);
                vm.write_silently(page * PAGE_SIZE + offset, 1);
                assert_eq!(auditor.check(&vm.reported()), [Gfn(page)]);
                // Reported once.
                assert_eq!(auditor.check(&[]), []);
            }
        }
    }

    #[test]
    fn marked_writes_and_the_same_bytes_again_are_no_find() {
        let vm = vm(ANONYMOUS);
        vm.write_silently(0x3000, 7);
        let mut auditor = vm.auditor();
        for round in 1..=3 {
            vm.write(0x1ffc, u64::MAX / round);
            vm.write(0x1_0000_0008, round);
            vm.write_silently(0x3000, 7);
            // Zeros where nothing has ever been written.
            vm.write_silently(0x5000, 0);
            let reported = vm.reported();
            assert_eq!(reported.len(), 3);
            assert_eq!(auditor.check(&reported), []);
        }
        // A page may be reported without a change, or not belong to the VM.
        assert_eq!(auditor.check(&[Gfn(9), Gfn(0x9_0000), Gfn(u64::MAX)]), []);
    }

    #[test]
    fn memory_given_back_has_changed() {
        let vm = vm(ANONYMOUS);
        vm.write(0x2000, 7);
        let mut auditor = vm.auditor();
        let page = vm.memory.get_host_address(GuestAddress(0x2000)).unwrap();
        // SAFETY: a page of guest memory that nobody uses now.
        assert_eq!(unsafe { libc::madvise(page.cast(), 4096, libc::MADV_DONTNEED) }, 0);
        assert_eq!(auditor.check(&[]), [Gfn(2)]);
    }

    #[test]
    fn untouched_private_memory_stays_untouched() {
        let vm = vm(ANONYMOUS);
        vm.write(0x2000, 7);
        let auditor = vm.auditor();
        let mut touched = Touched::new(&auditor.pagemap);
        let mut known = |gpa: u64| {
            let address = vm.memory.get_host_address(GuestAddress(gpa)).unwrap();
            touched.is_touched(address.addr() as u64 / PAGE_SIZE)
        };
        assert!(known(0x2000));
        assert!((16..3016).filter(|page| known(page * PAGE_SIZE)).count() < 3000);
        assert!(auditor.slots.iter().all(|audited| audited.sparse));
        assert!(self::vm(SHARED).auditor().slots.iter().all(|audited| !audited.sparse));
    }

    #[test]
    fn only_private_anonymous_memory_is_sparse() {
        let range = Some((0x7f00_0000_1000, 0x7f00_0000_3000));
        assert_eq!(anonymous_mapping("7f0000001000-7f0000003000 rw-p 00000000 00:00 0 "), range);
        assert_eq!(anonymous_mapping("7f0000001000-7f0000003000 rw-p 00000000 00:00 0 [heap]"), range);
        for other in [
            "7f0000001000-7f0000003000 rw-s 00000000 00:01 1034 /dev/zero (deleted)",
            "7f0000001000-7f0000003000 rw-s 00000000 00:00 0 ",
            "7f0000001000-7f0000003000 rw-p 00000000 08:01 17 /var/lib/snapshot",
            "7f0000001000-7f0000003000 rw-p",
            "",
        ] {
            assert_eq!(anonymous_mapping(other), None);
        }
    }

    fn page(seed: u64) -> [u64; WORDS] {
        std::array::from_fn(|index| (index as u64 ^ seed).wrapping_mul(KEYS[(seed % 512) as usize]))
    }

    #[test]
    fn a_page_of_zeros_has_the_digest_of_no_page() {
        assert_eq!(digest_of(&[0; WORDS]), 0);
    }

    #[test]
    fn every_flip_of_one_bit_is_noticed() {
        for mut page in [[0; WORDS], [u64::MAX; WORDS], page(5)] {
            let before = digest_of(&page);
            for bit in 0..WORDS * 64 {
                page[bit / 64] ^= 1 << (bit % 64);
                assert_ne!(digest_of(&page), before, "bit {bit}");
                page[bit / 64] ^= 1 << (bit % 64);
            }
            assert_eq!(digest_of(&page), before);
        }
    }

    #[test]
    fn every_exchange_of_two_words_is_noticed() {
        let mut page = page(9);
        let before = digest_of(&page);
        for first in 0..WORDS {
            for second in 0..first {
                page.swap(first, second);
                assert_ne!(digest_of(&page), before, "words {first} and {second}");
                page.swap(first, second);
            }
        }
    }

    proptest! {
        /// Small numbers, equal words and neighbouring changes: typical contents of memory.
        #[test]
        fn other_contents_have_another_digest(
            base in prop::collection::vec(0u64..4, WORDS),
            changes in prop::collection::vec((0..WORDS, prop_oneof![0u64..4, any::<u64>()]), 1..20),
        ) {
            let page: [u64; WORDS] = base.try_into().unwrap();
            let mut changed = page;
            for (word, value) in changes {
                changed[word] = value;
            }
            prop_assert_eq!(digest_of(&page) == digest_of(&changed), page == changed);
        }

        #[test]
        fn finds_exactly_what_changed_in_silence(
            writes in prop::collection::vec((0usize..3, any::<u64>(), 0u64..3, any::<bool>()), 0..60),
        ) {
            let vm = vm(ANONYMOUS);
            let mut auditor = vm.auditor();
            let mut expected = std::collections::BTreeSet::new();
            for (slot, place, value, marked) in writes {
                let gpa = SLOTS[slot].1 * PAGE_SIZE + place % (SLOTS[slot].2 * PAGE_SIZE / 8) * 8;
                if marked {
                    vm.write(gpa, value);
                } else {
                    vm.write_silently(gpa, value as u8);
                    if value != 0 {
                        expected.insert(Gfn::of(gpa));
                    }
                }
            }
            let reported = vm.reported();
            let mut contents = [0u64; WORDS];
            expected.retain(|gfn| {
                vm.memory.read_slice(as_bytes(&mut contents), GuestAddress(gfn.gpa())).unwrap();
                !reported.contains(gfn) && contents.iter().any(|&word| word != 0)
            });
            prop_assert_eq!(auditor.check(&reported), expected.into_iter().collect::<Vec<_>>());
            prop_assert_eq!(auditor.check(&[]), []);
        }
    }

    fn as_bytes(words: &mut [u64; WORDS]) -> &mut [u8] {
        // SAFETY: the same memory; any byte is valid in both.
        unsafe { words.as_mut_ptr().cast::<[u8; PAGE_SIZE as usize]>().as_mut().unwrap() }
    }
}
