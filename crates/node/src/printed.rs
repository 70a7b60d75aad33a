//! Standard output of commands that have something to say once.

use std::io::{self, ErrorKind, StdoutLock, Write};

/// Takes what is printed. A reader that has left (a pipe into `head`) has what it wants: that is no error, and what the
/// command does goes on. So this is nothing for commands that print until somebody ends them.
#[derive(Debug)]
pub struct Printed<W>(W);

/// Standard output, locked.
pub fn printed() -> Printed<StdoutLock<'static>> {
    Printed(io::stdout().lock())
}

impl<W: Write> Write for Printed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.write(bytes) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(bytes.len()),
            other => other,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.0.flush() {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pipe without a reader, or a full disk.
    struct Ends(ErrorKind);

    impl Write for Ends {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Err(self.0.into())
        }
    }

    #[test]
    fn a_reader_that_has_left_is_no_error_and_a_full_disk_is_one() {
        let mut left = Printed(Ends(ErrorKind::BrokenPipe));
        writeln!(left, "one").and_then(|()| left.flush()).unwrap();
        let mut full = Printed(Ends(ErrorKind::StorageFull));
        assert_eq!(writeln!(full, "one").unwrap_err().kind(), ErrorKind::StorageFull);
        assert!(full.flush().is_err());
    }
}
