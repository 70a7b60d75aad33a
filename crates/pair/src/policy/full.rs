//! Logs that are full; a checkpoint empties them.

use super::{Facts, Next, Rule, Why};

/// Ends an epoch when a dirty ring is full: KVM holds the vCPU until the ring is emptied.
#[derive(Debug)]
pub struct DirtyLogFull;

impl Rule for DirtyLogFull {
    fn next(&self, facts: &Facts) -> Next {
        if facts.dirty_log_full { Next::Now(Why::DirtyLogFull) } else { Next::Nothing }
    }
}

/// Ends an epoch when the log of disk writes is full: the guest's requests wait until the log is emptied.
#[derive(Debug)]
pub struct DiskLogFull;

impl Rule for DiskLogFull {
    fn next(&self, facts: &Facts) -> Next {
        if facts.disk_log_full { Next::Now(Why::DiskLogFull) } else { Next::Nothing }
    }
}
