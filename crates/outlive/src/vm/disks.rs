//! The disks of a VM by where their writes go.

use std::path::PathBuf;
use std::sync::Arc;

use outlive_machine::{BlockDevice, GuestMemory, Machine};

/// A disk of the VM.
pub(crate) type Disk = Arc<BlockDevice<GuestMemory>>;

/// The disks that are replicated, with their images.
pub(crate) fn replicated(machine: &Machine) -> Vec<(u16, PathBuf)> {
    let written = machine.disks().iter().filter(|disk| !disk.is_shared() && !disk.is_readonly());
    written.map(|disk| (disk.index(), disk.image().path().to_path_buf())).collect()
}

/// The disks that both hosts write to.
pub(crate) fn shared(machine: &Machine) -> Vec<PathBuf> {
    let shared = machine.disks().iter().filter(|disk| disk.is_shared() && !disk.is_readonly());
    shared.map(|disk| disk.image().path().to_path_buf()).collect()
}
