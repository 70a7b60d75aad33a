//! The method of other VMMs: KVM_GET_DIRTY_LOG, then a search of the bitmap, word by word. It does not use
//! the library, so that no change of the library affects the comparison.
// UNSAFETY: an ioctl with a pointer to the bitmap.
#![allow(unsafe_code)]

use std::io;

use kvm_bindings::{KVMIO, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1};
use kvm_ioctls::VmFd;
use outlive_dirty::Gfn;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);

pub(crate) struct Peer {
    bitmap: Vec<u64>,
    pages: Vec<Gfn>,
}

impl Peer {
    /// For a VM of this many pages in slot 0. Takes all memory that it will ever need.
    pub(crate) fn new(pages: u64, max_dirty: usize) -> Peer {
        let mut peer = Peer { bitmap: vec![!0; pages.div_ceil(64) as usize], pages: vec![Gfn(0); max_dirty] };
        peer.pages.clear();
        peer
    }

    /// Copies the log, clears it and protects its pages: the kernel's part.
    pub(crate) fn get(&mut self, vm: &VmFd) {
        let bitmap = kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: self.bitmap.as_mut_ptr().cast() };
        let request = kvm_dirty_log { slot: 0, padding1: 0, __bindgen_anon_1: bitmap };
        // SAFETY: the structure of the request; the bitmap has a bit for every page of the slot.
        let result = unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &request) };
        assert_eq!(result, 0, "KVM_GET_DIRTY_LOG: {}", io::Error::last_os_error());
    }

    /// The pages of the log.
    pub(crate) fn scan(&mut self) -> &[Gfn] {
        self.pages.clear();
        for (index, &word) in self.bitmap.iter().enumerate() {
            let mut word = word;
            while word != 0 {
                self.pages.push(Gfn(index as u64 * 64 + u64::from(word.trailing_zeros())));
                word &= word - 1;
            }
        }
        &self.pages
    }

    pub(crate) fn pages(&self) -> &[Gfn] {
        &self.pages
    }
}
