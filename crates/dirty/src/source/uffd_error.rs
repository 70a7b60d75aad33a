//! Errors of userfaultfd.

use std::io;

/// Why writes to memory of this process cannot be tracked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UffdError {
    /// The kernel is built without userfaultfd (`CONFIG_USERFAULTFD`).
    #[error("this kernel has no userfaultfd")]
    Missing,
    /// userfaultfd is refused. The requests here need no privilege, whatever `vm.unprivileged_userfaultfd`
    /// says, so a filter refuses them: usually that of a container.
    #[error(
        "userfaultfd is not permitted: allow the system call (a seccomp filter or security module forbids it), \
         or give access to /dev/userfaultfd"
    )]
    Denied(#[source] io::Error),
    /// userfaultfd failed otherwise.
    #[error("cannot make a userfaultfd")]
    Open(#[source] io::Error),
    /// The kernel lacks this part.
    #[error("this kernel cannot track writes of user space: no {0} (Linux 6.7 or later)")]
    TooOld(&'static str),
    /// /proc/self/pagemap cannot be opened or scanned (no /proc, no `CONFIG_PROC_PAGE_MONITOR`).
    #[error("cannot scan /proc/self/pagemap")]
    Pagemap(#[source] io::Error),
    /// Two slots share addresses: a write would be reported in only one of them.
    #[error("memory slots {0} and {1} have the same host addresses")]
    Shared(u32, u32),
}

impl UffdError {
    pub(crate) fn from_open(error: io::Error) -> UffdError {
        match error.raw_os_error() {
            Some(libc::ENOSYS) => UffdError::Missing,
            Some(libc::EPERM) => UffdError::Denied(error),
            // The flags are those of Linux 5.11.
            Some(libc::EINVAL) => UffdError::TooOld("UFFD_FEATURE_WP_ASYNC"),
            _ => UffdError::Open(error),
        }
    }
}
