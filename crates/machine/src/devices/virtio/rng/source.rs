//! Where random bytes come from.

// UNSAFETY: getrandom(2) writes to a buffer by address.
#![allow(unsafe_code)]

use std::io;

/// Gives random bytes.
pub trait EntropySource: Send + Sync {
    /// Fills all of `to`, without blocking.
    ///
    /// # Errors
    /// When there are none at the moment.
    fn fill(&self, to: &mut [u8]) -> io::Result<()>;
}

/// This host's kernel.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostEntropy;

impl EntropySource for HostEntropy {
    fn fill(&self, to: &mut [u8]) -> io::Result<()> {
        let mut rest = to;
        while !rest.is_empty() {
            // SAFETY: the kernel writes at most `len` bytes to the slice, which is ours alone.
            let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), libc::GRND_NONBLOCK) };
            match usize::try_from(got) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => rest = rest.split_at_mut(count).1,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }
}
