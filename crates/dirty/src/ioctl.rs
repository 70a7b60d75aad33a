//! The common part of all ioctls.

use std::io;

/// The result of an ioctl, or why it failed.
pub(crate) fn checked(result: i32) -> io::Result<u64> {
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}
