//! Arrays of atomic words that cost address space when reserved and memory only where they are used.
// UNSAFETY: the array is an anonymous mapping, made, viewed and unmapped here. It is a mapping and not a
// `Vec` because a limit of "every page of the VM" must cost nothing until it is needed, and because memory
// must be allocated and freed by `enable` and `disable` while other threads hold references to the tracker.
#![allow(unsafe_code)]

use std::io;
use std::ops::{Deref, Range};

#[cfg(not(all(test, loom)))]
use crate::report;
use crate::sync::{AtomicU64, Ordering};

/// Words of 8 bytes in a page of the host.
const WORDS_PER_PAGE: usize = 512;

/// A fixed number of atomic words, zero at first.
pub(crate) struct Words {
    #[cfg(not(all(test, loom)))]
    base: std::ptr::NonNull<AtomicU64>,
    #[cfg(not(all(test, loom)))]
    len: usize,
    #[cfg(all(test, loom))]
    words: Box<[AtomicU64]>,
}

#[cfg(not(all(test, loom)))]
impl Words {
    /// Reserves address space for `len` words.
    pub(crate) fn reserve(len: usize) -> io::Result<Words> {
        let len = len.max(1);
        let bytes = len.checked_mul(8).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // A reservation is touched in few places: huge pages would fill it. Failure costs memory only.
        // SAFETY: exactly the mapping made above.
        unsafe { libc::madvise(base, bytes, libc::MADV_NOHUGEPAGE) };
        let base = std::ptr::NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Words { base, len })
    }

    /// Gives the memory back; every word reads as zero again. Touches no word, because most have no memory, and
    /// would get some; in a process whose memory is locked (`mlockall`) they would keep it.
    pub(crate) fn clear_all(&self) {
        // Locked memory takes more: one more call since Linux 5.18, three before.
        let given = self.advise(libc::MADV_DONTNEED)
            || self.advise(libc::MADV_DONTNEED_LOCKED)
            || self.give_back_unlocked();
        if !given {
            self.clear_what_is_set();
        }
    }

    /// Whether the kernel has taken the advice, which may make every word zero.
    fn advise(&self, advice: libc::c_int) -> bool {
        // SAFETY: exactly our private anonymous mapping; a reader sees the old or a zero word, as with
        // stores.
        unsafe { libc::madvise(self.base.as_ptr().cast(), self.len * 8, advice) == 0 }
    }

    /// Gives back memory that is locked, and locks what comes in its place. Whether it worked.
    fn give_back_unlocked(&self) -> bool {
        let (at, bytes) = (self.base.as_ptr().cast(), self.len * 8);
        // SAFETY: exactly our mapping, whose contents neither call changes.
        if unsafe { libc::munlock(at, bytes) } != 0 {
            return false;
        }
        let given = self.advise(libc::MADV_DONTNEED);
        // SAFETY: as above.
        if unsafe { libc::mlock2(at, bytes, libc::MLOCK_ONFAULT) } != 0 {
            let why = io::Error::last_os_error();
            report::warn(format_args!("lists of dirty pages are not locked in memory any more: {why}"));
        }
        given
    }

    /// A word without memory reads as zero without getting any: only the others are written.
    fn clear_what_is_set(&self) {
        let set = self.iter().filter(|word| word.load(Ordering::Relaxed) != 0);
        set.for_each(|word| word.store(0, Ordering::Relaxed));
    }

    /// Fetches a word into the cache; a word that does not exist does no harm.
    pub(crate) fn prefetch(&self, index: usize) {
        // Other architectures have no stable way to ask for it.
        #[cfg(not(target_arch = "x86_64"))]
        let _ = index;
        #[cfg(target_arch = "x86_64")]
        if let Some(word) = self.get(index) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: reads and writes nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(word).cast()) };
        }
    }

    /// As `populate`, in huge pages if the kernel provides them: for words that are used all over.
    pub(crate) fn populate_huge(&self, range: Range<usize>) {
        let align = |index: usize| index / WORDS_PER_PAGE * WORDS_PER_PAGE;
        let (start, end) = (align(range.start), range.end.min(self.len));
        if start < end {
            // SAFETY: whole pages of the mapping made in `reserve`. Failure costs speed only.
            unsafe {
                let first = self.base.as_ptr().add(start);
                libc::madvise(first.cast(), (end - start) * 8, libc::MADV_HUGEPAGE);
            }
        }
        self.populate(range);
    }

    /// The words as plain numbers.
    ///
    /// # Safety
    /// For the life of the slice nobody stores to these words.
    pub(crate) unsafe fn plain(&self, range: Range<usize>) -> &[u64] {
        let words = &self[range];
        // SAFETY: AtomicU64 has the layout of u64, and by the contract nothing is stored meanwhile.
        unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len()) }
    }
}

#[cfg(not(all(test, loom)))]
impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `reserve`; no reference outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len * 8) };
    }
}

// SAFETY: the mapping belongs to the value alone and is only reached as atomic words.
#[cfg(not(all(test, loom)))]
unsafe impl Send for Words {}
// SAFETY: as above; shared access is atomic.
#[cfg(not(all(test, loom)))]
unsafe impl Sync for Words {}

#[cfg(not(all(test, loom)))]
impl Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: `len` words of zeroed memory, valid as AtomicU64, mapped until `self` is dropped.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

#[cfg(all(test, loom))]
impl Words {
    pub(crate) fn populate_huge(&self, _: Range<usize>) {}

    /// As above, in ordinary memory.
    pub(crate) fn reserve(len: usize) -> io::Result<Words> {
        Ok(Words { words: (0..len.max(1)).map(|_| AtomicU64::new(0)).collect() })
    }

    pub(crate) fn clear_all(&self) {
        self.iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }
}

#[cfg(all(test, loom))]
impl Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        &self.words
    }
}

impl Words {
    /// Touches every page of the range, so that later use takes no page fault.
    pub(crate) fn populate(&self, range: Range<usize>) {
        let end = range.end.min(self.len());
        for word in self[range.start.min(end)..end].iter().step_by(WORDS_PER_PAGE) {
            // A number that the compiler does not know: it would drop an `or` of nothing.
            word.fetch_or(std::hint::black_box(0), Ordering::Relaxed);
        }
        // The range need not begin with a page.
        if let Some(last) = self[range.start.min(end)..end].last() {
            last.fetch_or(std::hint::black_box(0), Ordering::Relaxed);
        }
    }
}

/// Page faults of this thread until now.
#[cfg(all(test, not(loom)))]
pub(crate) fn faults() -> i64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: getrusage fills it.
    unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init().ru_minflt
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn what_was_populated_takes_no_fault() {
        let words = Words::reserve(1 << 20).unwrap();
        words.populate(700..(1 << 20) - 700);
        let before = faults();
        (700..(1 << 20) - 700).for_each(|index| words[index].store(1, Ordering::Relaxed));
        assert_eq!(faults(), before);
        words[0].store(1, Ordering::Relaxed);
        assert!(faults() > before, "the count works");
    }

    /// With `--lock-memory` a list that is given back must not be made real as a whole, and locked.
    #[test]
    fn locked_words_are_given_back_without_touching_the_rest() {
        const PAGES: usize = 2048;
        let words = Words::reserve(PAGES * WORDS_PER_PAGE).unwrap();
        let (at, bytes) = (words.base.as_ptr().cast(), words.len * 8);
        // SAFETY: exactly the mapping of `words`.
        if unsafe { libc::mlock2(at, bytes, libc::MLOCK_ONFAULT) } != 0 {
            return println!("skipped: this user may not lock 8 MiB: {}", io::Error::last_os_error());
        }
        assert!(!words.advise(libc::MADV_DONTNEED), "locked memory is not given back as a matter of course");
        let resident = || {
            let mut pages = vec![0_u8; PAGES];
            // SAFETY: a byte for each page of the mapping.
            assert_eq!(unsafe { libc::mincore(at, bytes, pages.as_mut_ptr()) }, 0);
            pages.into_iter().filter(|page| page & 1 != 0).count()
        };
        let before_linux_5_18 = |words: &Words| assert!(words.give_back_unlocked());
        for way in ["all", "before Linux 5.18"] {
            let clear = if way == "all" { Words::clear_all } else { before_linux_5_18 };
            words[700].store(7, Ordering::Relaxed);
            words[PAGES * WORDS_PER_PAGE - 1].store(7, Ordering::Relaxed);
            assert_eq!(resident(), 2, "{way}");
            clear(&words);
            assert_eq!(resident(), 0, "{way}");
            assert!(!words.advise(libc::MADV_DONTNEED), "{way}: it is locked as before");
            assert_eq!(words[700].load(Ordering::Relaxed), 0, "{way}");
            assert_eq!(words[PAGES * WORDS_PER_PAGE - 1].load(Ordering::Relaxed), 0, "{way}");
            words.clear_all();
        }
        words[700].store(7, Ordering::Relaxed);
        words.clear_what_is_set();
        assert_eq!(words[700].load(Ordering::Relaxed), 0);
    }

    #[test]
    fn reserves_far_more_than_memory_and_clears() {
        let words = Words::reserve(1 << 37).unwrap();
        words[1 << 36].store(7, Ordering::Relaxed);
        words.populate(0..4096);
        assert_eq!(words[1 << 36].load(Ordering::Relaxed), 7);
        words.clear_all();
        assert_eq!(words[1 << 36].load(Ordering::Relaxed), 0);
    }
}
