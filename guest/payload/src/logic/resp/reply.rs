//! Replies: an output buffer that never grows past its limit.

use alloc::vec::Vec;
use core::fmt::{self, Write};

/// Longest output waiting for one client; a reply that would not fit ends the connection.
pub const MAX_OUTPUT: usize = 32 << 20;
/// A buffer longer than this is given back to the heap once it is sent.
const KEEP: usize = 16 << 10;

/// The output of one connection.
#[derive(Debug, Default)]
pub struct Reply {
    data: Vec<u8>,
    sent: usize,
    overflow: bool,
}

impl Reply {
    /// Bytes that wait to be sent.
    pub fn pending(&self) -> &[u8] {
        &self.data[self.sent..]
    }

    /// The first `count` pending bytes were sent.
    pub fn advance(&mut self, count: usize) {
        self.sent += count.min(self.data.len() - self.sent);
        if self.sent == self.data.len() {
            self.data.clear();
            self.sent = 0;
            if self.data.capacity() > KEEP {
                self.data = Vec::new();
            }
        } else if self.sent > KEEP && self.sent > self.data.len() / 2 {
            // A client that never takes all of it must not make it grow: drop what is sent.
            self.data.drain(..self.sent);
            self.sent = 0;
        }
    }

    /// True when a reply was lost because it did not fit: the stream is broken and must be closed.
    pub fn overflowed(&self) -> bool {
        self.overflow
    }

    /// Bytes of heap in use.
    pub fn footprint(&self) -> usize {
        self.data.capacity()
    }

    /// Appends raw bytes.
    pub fn raw(&mut self, bytes: &[u8]) {
        if self.overflow
            || self.data.len() + bytes.len() > MAX_OUTPUT
            || self.data.try_reserve(bytes.len()).is_err()
        {
            self.overflow = true;
            return;
        }
        self.data.extend_from_slice(bytes);
    }

    fn format(&mut self, args: fmt::Arguments<'_>) {
        // `write_str` below never fails; overflow is kept in the flag.
        let _ = self.write_fmt(args);
    }

    /// `+text`.
    pub fn simple(&mut self, text: &str) {
        self.raw(b"+");
        self.raw(text.as_bytes());
        self.raw(b"\r\n");
    }

    /// `+OK`.
    pub fn ok(&mut self) {
        self.raw(b"+OK\r\n");
    }

    /// `-text`. Line ends in the text become blanks, so that it stays one line.
    pub fn error(&mut self, text: fmt::Arguments<'_>) {
        let start = self.data.len();
        self.raw(b"-");
        self.format(text);
        if let Some(line) = self.data.get_mut(start..) {
            line.iter_mut().filter(|byte| matches!(byte, b'\r' | b'\n')).for_each(|byte| *byte = b' ');
        }
        self.raw(b"\r\n");
    }

    /// `:value`.
    pub fn integer(&mut self, value: i64) {
        self.raw(b":");
        let mut digits = [0; 20];
        self.raw(decimal(value, &mut digits));
        self.raw(b"\r\n");
    }

    /// `$length`, the bytes, and a line end.
    pub fn bulk(&mut self, bytes: &[u8]) {
        self.header(b'$', bytes.len());
        self.raw(bytes);
        self.raw(b"\r\n");
    }

    /// The null bulk string.
    pub fn null(&mut self) {
        self.raw(b"$-1\r\n");
    }

    /// The bulk string or null.
    pub fn bulk_or_null(&mut self, bytes: Option<&[u8]>) {
        match bytes {
            Some(bytes) => self.bulk(bytes),
            None => self.null(),
        }
    }

    /// The head of an array; that many replies have to follow.
    pub fn array(&mut self, len: usize) {
        self.header(b'*', len);
    }

    fn header(&mut self, kind: u8, len: usize) {
        self.raw(&[kind]);
        let mut digits = [0; 20];
        self.raw(decimal(len as i64, &mut digits));
        self.raw(b"\r\n");
    }

    /// A name and an integer, as two elements of an array.
    pub fn field(&mut self, name: &str, value: u64) {
        self.bulk(name.as_bytes());
        self.integer(i64::try_from(value).unwrap_or(i64::MAX));
    }
}

impl Write for Reply {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.raw(text.as_bytes());
        Ok(())
    }
}

/// Writes `value` into the end of `buffer` and returns the digits. 20 bytes hold every `i64`.
pub fn decimal(value: i64, buffer: &mut [u8; 20]) -> &[u8] {
    let mut rest = value.unsigned_abs();
    let mut at = buffer.len();
    loop {
        at -= 1;
        buffer[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    if value < 0 {
        at -= 1;
        buffer[at] = b'-';
    }
    &buffer[at..]
}
