//! Hashes of guest memory, so that two hosts can compare theirs (invariant 4): one number for all of it, and one
//! for each page.

// UNSAFETY: pages of a stopped VM are read through their mapping.
#![allow(unsafe_code)]

use std::fs::File;

use outlive_dirty::Gfn;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{PAGE_SIZE, Ram, is_zero_page};

/// How many pages [`TouchedPages::of`] tells of.
const SPAN: u64 = u64::BITS as u64;

/// The hash of a page by which two hosts compare theirs. That of a page of zeroes is 0, so that a page that was
/// never touched need not be read.
pub fn page_sum(gfn: Gfn, page: &[u8; PAGE_SIZE]) -> u64 {
    if is_zero_page(page) { 0 } else { xxh3_64_with_seed(page, gfn.0) }
}

/// Tells which pages of a VM have ever been touched, for a few pages at a time.
pub struct TouchedPages {
    pagemap: Option<File>,
}

impl TouchedPages {
    /// Where the system does not tell, every page counts as touched.
    pub fn open() -> Self {
        let pagemap = File::open("/proc/self/pagemap");
        let pagemap = pagemap.inspect_err(|error| tracing::debug!(%error, "untouched pages are read too"));
        Self { pagemap: pagemap.ok() }
    }

    /// Which of the 64 pages from `first` on, a multiple of 64, have been touched; bit 0 is the first. All others
    /// that the VM has are zero.
    pub fn of(&self, ram: &Ram, first: Gfn) -> u64 {
        let mut entries = [0; 8 * SPAN as usize];
        let read =
            self.pagemap.as_ref().is_some_and(|pagemap| ram.read_pagemap(pagemap, first, &mut entries));
        if !read {
            return u64::MAX;
        }
        let (words, _) = entries.as_chunks::<8>();
        let touched = |word: &[u8; 8]| u64::from(u64::from_ne_bytes(*word) & super::KNOWN != 0);
        words.iter().enumerate().fold(0, |mask, (at, word)| mask | touched(word) << at)
    }
}

impl Ram {
    /// A hash of all memory of a stopped VM. It is a sum over the pages, and zero pages (which one host may
    /// have touched and the other not) add nothing.
    pub fn hash(&self) -> u64 {
        let touched = self.touched().unwrap_or_else(|_| self.gfns().collect());
        touched.into_iter().fold(0, |sum, gfn| sum.wrapping_add(self.page_hash(gfn)))
    }

    fn page_hash(&self, gfn: Gfn) -> u64 {
        let Some(host) = self.host(gfn) else { return 0 };
        // SAFETY: `host` is a whole mapped page, and nobody writes it: no vCPU runs and the devices rest.
        let page = unsafe { &*host.cast::<[u8; PAGE_SIZE]>() };
        page_sum(gfn, page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_were_never_touched_are_known_without_reading_them() {
        let ram = Ram::new(64 << 20, 64).unwrap();
        let touched = TouchedPages::open();
        assert_eq!(touched.of(&ram, Gfn(64)), 0);
        for gfn in [64, 100, 127] {
            ram.write_page(Gfn(gfn), &[1; PAGE_SIZE]);
        }
        assert_eq!(touched.of(&ram, Gfn(64)), 1 | 1 << 36 | 1 << 63);
        assert_eq!(touched.of(&ram, Gfn(128)), 0);
        assert_eq!(touched.of(&ram, Gfn(1 << 40)), u64::MAX, "nobody knows");
        assert_eq!(TouchedPages { pagemap: None }.of(&ram, Gfn(128)), u64::MAX);
    }

    #[test]
    fn memories_with_the_same_pages_have_the_same_hash_and_others_do_not() {
        let (a, b) = (Ram::new(64 << 20, 64).unwrap(), Ram::new(64 << 20, 64).unwrap());
        assert_eq!((a.hash(), b.hash()), (0, 0));
        for gfn in [3, 700, 16_383] {
            a.write_page(Gfn(gfn), &[gfn as u8; PAGE_SIZE]);
        }
        for gfn in [16_383, 3, 700] {
            b.write_page(Gfn(gfn), &[gfn as u8; PAGE_SIZE]);
        }
        // Touched here and zero, never touched there.
        b.write_page(Gfn(9), &[1; PAGE_SIZE]);
        b.zero_page(Gfn(9));
        assert_eq!(a.hash(), b.hash());
        let mut page = [3; PAGE_SIZE];
        page[4095] ^= 1;
        b.write_page(Gfn(3), &page);
        assert_ne!(a.hash(), b.hash(), "one bit");
        b.write_page(Gfn(3), &[3; PAGE_SIZE]);
        b.zero_page(Gfn(700));
        b.write_page(Gfn(701), &[(700u64 % 256) as u8; PAGE_SIZE]);
        assert_ne!(a.hash(), b.hash(), "the right page in the wrong place");
    }
}
