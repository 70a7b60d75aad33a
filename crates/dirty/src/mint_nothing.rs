//! Ring entries without a write of the guest: only x86 has a way to make them. So a trigger is never exact
//! here, and [`crate::Tracker::is_exact`] says so.

use std::io;
use std::os::fd::OwnedFd;

use crate::layout::MemoryLayout;

/// As on x86; without meaning here.
pub(crate) const ENTRIES_PER_WRITE: u64 = 1;

/// Makes no entries.
pub(crate) fn mint(_vcpu: &OwnedFd, _entries: u64, _layout: &MemoryLayout) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
