//! The types of kvm-ioctls, without `unsafe` in the VMM.
// UNSAFETY: borrows the descriptors of types that only tell their number.
#![allow(unsafe_code)]

use std::os::fd::BorrowedFd;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// A file of kvm-ioctls (0.25): `Kvm`, `VmFd` and `VcpuFd`, which do not implement `AsFd` themselves.
///
/// The descriptor is borrowed for one call. Nothing here depends on how long the file lives: a
/// [`crate::Tracker`] holds a duplicate of the VM's descriptor, and a mapped ring keeps its vCPU. With
/// another version of kvm-ioctls, or none, pass anything that is `AsFd`.
pub trait KvmFile: sealed::Sealed {
    /// The descriptor, in the form that the functions of this crate take.
    fn descriptor(&self) -> BorrowedFd<'_>;
}

mod sealed {
    pub trait Sealed: std::os::fd::AsRawFd {}
    impl Sealed for kvm_ioctls::Kvm {}
    impl Sealed for kvm_ioctls::VmFd {}
    impl Sealed for kvm_ioctls::VcpuFd {}
}

/// The descriptor of a file, which is open as long as the file is borrowed.
fn borrowed(file: &impl sealed::Sealed) -> BorrowedFd<'_> {
    // SAFETY: each of the sealed types owns the descriptor that it names, and closes it when it is dropped.
    unsafe { BorrowedFd::borrow_raw(file.as_raw_fd()) }
}

impl KvmFile for Kvm {
    fn descriptor(&self) -> BorrowedFd<'_> {
        borrowed(self)
    }
}

impl KvmFile for VmFd {
    fn descriptor(&self) -> BorrowedFd<'_> {
        borrowed(self)
    }
}

impl KvmFile for VcpuFd {
    fn descriptor(&self) -> BorrowedFd<'_> {
        borrowed(self)
    }
}
