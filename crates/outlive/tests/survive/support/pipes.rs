//! Pipes that nobody reads.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::AsFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// Fills a pipe to its last byte. A writer then waits until somebody reads.
pub(crate) fn fill(pipe: impl AsFd) {
    let file = File::from(pipe.as_fd().try_clone_to_owned().unwrap());
    fcntl(&file, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    fcntl(&file, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let mut length = 4096;
    while length > 0 {
        match (&file).write(&vec![b'\n'; length]) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => length /= 2,
            Err(error) => panic!("{error}"),
        }
    }
    fcntl(&file, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
}
