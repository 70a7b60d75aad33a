//! One number for all of guest memory, so that two hosts can compare theirs (invariant 4).

// UNSAFETY: pages of a stopped VM are read through their mapping.
#![allow(unsafe_code)]

use outlive_dirty::Gfn;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{PAGE_SIZE, Ram, is_zero_page};

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
        if is_zero_page(page) { 0 } else { xxh3_64_with_seed(page, gfn.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
