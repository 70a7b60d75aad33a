//! Writes lines to a file, pipe or terminal.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Writes whole lines. If a write fails in the middle of a line, the line is ended before the next begins, so
/// a reader loses no more than that line.
#[derive(Debug)]
pub(crate) struct LineFile {
    file: File,
    /// Whether the last line has no end.
    torn: bool,
}

impl LineFile {
    /// Lines to this file.
    pub(crate) fn new(file: File) -> Self {
        Self { file, torn: false }
    }

    /// Writes a line, which ends with a newline, in one write if the file takes it, so the lines of several
    /// processes that append to one file do not mix. Waits until there is room.
    ///
    /// # Errors
    /// The operating system's. The line is not written, or not to its end.
    pub(crate) fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if self.torn {
            self.put(b"\n")?;
        }
        self.put(line)
    }

    fn put(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.file.write(bytes) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => {
                    self.torn = bytes[count - 1] != b'\n';
                    bytes = &bytes[count..];
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Another process that shares the file may have made it non-blocking.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    poll(&mut [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::unistd::pipe;

    use super::*;

    #[test]
    fn a_line_that_was_cut_is_ended_before_the_next() {
        let (mut read, write) = pipe().map(|(read, write)| (File::from(read), File::from(write))).unwrap();
        let mut lines = LineFile::new(write);
        lines.write(b"one\n").unwrap();
        // As after an error in the middle.
        lines.file.write_all(b"tw").unwrap();
        lines.torn = true;
        lines.write(b"three\n").unwrap();
        lines.write(b"four\n").unwrap();
        drop(lines);
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        assert_eq!(text, "one\ntw\nthree\nfour\n");
    }

    #[test]
    fn a_pipe_that_does_not_block_is_waited_for() {
        let (mut read, write) = pipe().map(|(read, write)| (File::from(read), File::from(write))).unwrap();
        fcntl(&write, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let line = [vec![b'x'; 300_000], vec![b'\n']].concat();
        let expected = line.clone();
        let writer = std::thread::spawn(move || LineFile::new(write).write(&line));
        let mut text = Vec::new();
        read.read_to_end(&mut text).unwrap();
        writer.join().unwrap().unwrap();
        assert_eq!(text, expected);
    }
}
