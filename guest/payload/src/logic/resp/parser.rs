//! Requests: an incremental parser that takes the byte stream in any pieces.

use alloc::vec::Vec;
use core::fmt;

/// Longest argument in bytes (Redis: `proto-max-bulk-len`).
pub const MAX_BULK: usize = 16 << 20;
/// Most arguments of one command.
pub const MAX_ARGS: usize = 1 << 16;
/// Longest inline command or header line in bytes, as in Redis.
pub const MAX_LINE: usize = 64 << 10;
/// All arguments of one command together.
pub const MAX_COMMAND: usize = 2 * MAX_BULK;
/// Buffers longer than this are given back to the heap after use.
const KEEP: usize = 16 << 10;

/// Why a byte stream is not a request. The connection cannot continue after it; the text is Redis's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParseError {
    /// An inline command longer than [`MAX_LINE`].
    InlineTooLong,
    /// A quote that never ends.
    UnbalancedQuotes,
    /// The line after `*` is longer than any number.
    CountTooLong,
    /// Not a number after `*`, or more than [`MAX_ARGS`].
    BadCount,
    /// Something else where `$` has to be.
    NoBulk(u8),
    /// The line after `$` is longer than any number.
    LengthTooLong,
    /// Not a number after `$`, or more than [`MAX_BULK`].
    BadLength,
    /// The arguments together are longer than [`MAX_COMMAND`].
    CommandTooLong,
    /// No memory for the arguments.
    OutOfMemory,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InlineTooLong => f.write_str("Protocol error: too big inline request"),
            Self::UnbalancedQuotes => f.write_str("Protocol error: unbalanced quotes in request"),
            Self::CountTooLong => f.write_str("Protocol error: too big mbulk count string"),
            Self::BadCount => f.write_str("Protocol error: invalid multibulk length"),
            Self::NoBulk(byte) => {
                let shown = if byte.is_ascii_graphic() { char::from(*byte) } else { '?' };
                write!(f, "Protocol error: expected '$', got '{shown}'")
            }
            Self::LengthTooLong => f.write_str("Protocol error: too big bulk count string"),
            Self::BadLength => f.write_str("Protocol error: invalid bulk length"),
            Self::CommandTooLong => f.write_str("Protocol error: command too long"),
            Self::OutOfMemory => f.write_str("not enough memory for the request"),
        }
    }
}

/// The arguments of one command, command name first.
#[derive(Debug, Default)]
pub struct Args {
    data: Vec<u8>,
    ends: Vec<u32>,
}

impl Args {
    /// Number of arguments with the name of the command.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Argument `index`; empty when there is none.
    pub fn get(&self, index: usize) -> &[u8] {
        let Some(&end) = self.ends.get(index) else { return &[] };
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.data[start as usize..end as usize]
    }

    /// Arguments from `start` on.
    pub fn from(&self, start: usize) -> impl Iterator<Item = &[u8]> {
        (start..self.len()).map(|index| self.get(index))
    }

    fn clear(&mut self) {
        self.data.clear();
        self.ends.clear();
        if self.data.capacity() > KEEP {
            self.data = Vec::new();
        }
        if self.ends.capacity() > KEEP / 4 {
            self.ends = Vec::new();
        }
    }

    fn push_bytes(&mut self, bytes: &[u8]) -> Result<(), ParseError> {
        if self.data.len() + bytes.len() > MAX_COMMAND {
            return Err(ParseError::CommandTooLong);
        }
        self.data.try_reserve(bytes.len()).map_err(|_| ParseError::OutOfMemory)?;
        self.data.extend_from_slice(bytes);
        Ok(())
    }

    fn end_argument(&mut self) -> Result<(), ParseError> {
        if self.ends.len() == MAX_ARGS {
            return Err(ParseError::BadCount);
        }
        self.ends.try_reserve(1).map_err(|_| ParseError::OutOfMemory)?;
        self.ends.push(self.data.len() as u32);
        Ok(())
    }

    /// Splits a line into arguments as `redis-cli` and Redis's inline commands do.
    fn push_line(&mut self, line: &[u8]) -> Result<(), ParseError> {
        let mut rest = line;
        loop {
            rest = rest.trim_ascii_start();
            if rest.is_empty() {
                return Ok(());
            }
            rest = self.push_word(rest)?;
            self.end_argument()?;
        }
    }

    /// Adds one word, quoted or not, and returns what follows it.
    fn push_word<'a>(&mut self, mut rest: &'a [u8]) -> Result<&'a [u8], ParseError> {
        loop {
            match rest {
                [b'"', tail @ ..] => return close_quote(self.push_double_quoted(tail)?),
                [b'\'', tail @ ..] => return close_quote(self.push_single_quoted(tail)?),
                [byte, ..] if byte.is_ascii_whitespace() => return Ok(&rest[1..]),
                [byte, tail @ ..] => {
                    self.push_bytes(&[*byte])?;
                    rest = tail;
                }
                [] => return Ok(rest),
            }
        }
    }

    fn push_double_quoted<'a>(&mut self, mut rest: &'a [u8]) -> Result<&'a [u8], ParseError> {
        loop {
            let (byte, tail) = match rest {
                [b'"', tail @ ..] => return Ok(tail),
                [b'\\', b'x', high, low, tail @ ..]
                    if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() =>
                {
                    (hex(*high) << 4 | hex(*low), tail)
                }
                [b'\\', byte, tail @ ..] => (unescape(*byte), tail),
                [byte, tail @ ..] => (*byte, tail),
                [] => return Err(ParseError::UnbalancedQuotes),
            };
            self.push_bytes(&[byte])?;
            rest = tail;
        }
    }

    fn push_single_quoted<'a>(&mut self, mut rest: &'a [u8]) -> Result<&'a [u8], ParseError> {
        loop {
            let (byte, tail) = match rest {
                [b'\\', b'\'', tail @ ..] => (b'\'', tail),
                [b'\'', tail @ ..] => return Ok(tail),
                [byte, tail @ ..] => (*byte, tail),
                [] => return Err(ParseError::UnbalancedQuotes),
            };
            self.push_bytes(&[byte])?;
            rest = tail;
        }
    }
}

/// A closing quote has to be followed by a blank or by the end.
fn close_quote(rest: &[u8]) -> Result<&[u8], ParseError> {
    match rest {
        [byte, ..] if !byte.is_ascii_whitespace() => Err(ParseError::UnbalancedQuotes),
        _ => Ok(rest),
    }
}

fn hex(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        _ => (digit | 0x20) - b'a' + 10,
    }
}

fn unescape(byte: u8) -> u8 {
    match byte {
        b'n' => b'\n',
        b'r' => b'\r',
        b't' => b'\t',
        b'b' => 8,
        b'a' => 7,
        other => other,
    }
}

/// The result of feeding a piece of input.
#[derive(Debug, PartialEq, Eq)]
pub enum Fed {
    /// All input was taken and no command is complete.
    More,
    /// A command is complete in [`Parser::args`]; this many bytes of the input belong to it.
    Command(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Between commands.
    Start,
    /// In the line of an inline command.
    Inline,
    /// After `*`, in the number of arguments.
    Count,
    /// Before or in the line `$length`; this many arguments are missing.
    Length { missing: usize },
    /// In an argument: this many of its bytes are missing, including the two of the line end.
    Bulk { missing: usize, bytes: usize },
}

/// A request parser. After an error it must not be fed again.
#[derive(Debug)]
pub struct Parser {
    state: State,
    args: Args,
    /// The unfinished line at the end of the previous piece.
    line: Vec<u8>,
    complete: bool,
}

impl Default for Parser {
    fn default() -> Self {
        Self { state: State::Start, args: Args::default(), line: Vec::new(), complete: false }
    }
}

impl Parser {
    /// The complete command after [`Fed::Command`], until the next `feed`.
    pub fn args(&self) -> &Args {
        &self.args
    }

    /// Bytes of heap in use.
    pub fn footprint(&self) -> usize {
        self.args.data.capacity() + 4 * self.args.ends.capacity() + self.line.capacity()
    }

    /// Frees the arguments of the command that has been executed.
    pub fn finish(&mut self) {
        if self.complete {
            self.args.clear();
            self.complete = false;
        }
    }

    /// Takes input up to the end of the first complete command.
    pub fn feed(&mut self, input: &[u8]) -> Result<Fed, ParseError> {
        self.finish();
        let mut at = 0;
        while at < input.len() {
            let rest = &input[at..];
            at += match self.state {
                State::Start => self.start(rest[0]),
                State::Bulk { missing, bytes } => self.take_bulk(rest, missing, bytes)?,
                State::Inline | State::Count | State::Length { .. } => self.take_line(rest)?,
            };
            if self.complete {
                return Ok(Fed::Command(at));
            }
        }
        Ok(Fed::More)
    }

    fn start(&mut self, first: u8) -> usize {
        self.state = if first == b'*' { State::Count } else { State::Inline };
        usize::from(first == b'*')
    }

    fn take_bulk(&mut self, rest: &[u8], missing: usize, bytes: usize) -> Result<usize, ParseError> {
        let take = bytes.min(rest.len());
        let payload = take.min(bytes.saturating_sub(2));
        self.args.push_bytes(&rest[..payload])?;
        if take < bytes {
            self.state = State::Bulk { missing, bytes: bytes - take };
            return Ok(take);
        }
        self.args.end_argument()?;
        self.next_argument(missing - 1);
        Ok(take)
    }

    fn next_argument(&mut self, missing: usize) {
        self.complete = missing == 0;
        self.state = if missing == 0 { State::Start } else { State::Length { missing } };
    }

    /// Takes bytes up to and with the next line end; acts on the line when it is whole.
    fn take_line(&mut self, rest: &[u8]) -> Result<usize, ParseError> {
        let newline = rest.iter().position(|byte| *byte == b'\n');
        let piece = &rest[..newline.unwrap_or(rest.len())];
        if let (State::Length { .. }, true, Some(first)) = (self.state, self.line.is_empty(), rest.first())
            && *first != b'$'
        {
            return Err(ParseError::NoBulk(*first));
        }
        if self.line.len() + piece.len() > self.line_limit() {
            return Err(self.line_error());
        }
        if newline.is_none() {
            self.line.try_reserve(piece.len()).map_err(|_| ParseError::OutOfMemory)?;
            self.line.extend_from_slice(piece);
            return Ok(piece.len());
        }
        let mut line = core::mem::take(&mut self.line);
        if line.is_empty() {
            self.take_whole_line(piece)?;
        } else {
            line.try_reserve(piece.len()).map_err(|_| ParseError::OutOfMemory)?;
            line.extend_from_slice(piece);
            self.take_whole_line(&line)?;
        }
        line.clear();
        if line.capacity() <= KEEP {
            self.line = line;
        }
        Ok(piece.len() + 1)
    }

    /// A header line holds a number, so 32 bytes are plenty; Redis lets it grow to [`MAX_LINE`] before it
    /// complains.
    fn line_limit(&self) -> usize {
        if self.state == State::Inline { MAX_LINE } else { 32 }
    }

    fn line_error(&self) -> ParseError {
        match self.state {
            State::Inline => ParseError::InlineTooLong,
            State::Count => ParseError::CountTooLong,
            _ => ParseError::LengthTooLong,
        }
    }

    fn take_whole_line(&mut self, line: &[u8]) -> Result<(), ParseError> {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        match self.state {
            State::Inline => {
                self.args.push_line(line)?;
                self.state = State::Start;
                self.complete = self.args.len() > 0;
            }
            State::Count => {
                let count = number(line).ok_or(ParseError::BadCount)?;
                if count > MAX_ARGS as i64 {
                    return Err(ParseError::BadCount);
                }
                // Redis ignores `*0` and `*-1`.
                self.state = if count > 0 { State::Length { missing: count as usize } } else { State::Start };
            }
            State::Length { missing } => {
                let length = number(&line[1..]).and_then(|length| usize::try_from(length).ok());
                let length = length.filter(|length| *length <= MAX_BULK).ok_or(ParseError::BadLength)?;
                self.state = State::Bulk { missing, bytes: length + 2 };
            }
            State::Start | State::Bulk { .. } => {}
        }
        Ok(())
    }
}

/// A decimal number as Redis reads it: no blanks, no plus sign, no leading zeros.
pub fn number(text: &[u8]) -> Option<i64> {
    let (negative, digits) = match text {
        [b'-', digits @ ..] => (true, digits),
        digits => (false, digits),
    };
    match digits {
        [] => return None,
        [b'0'] => return if negative { None } else { Some(0) },
        [b'0', ..] => return None,
        _ => {}
    }
    digits.iter().try_fold(0_i64, |value, digit| {
        let digit = i64::from(digit.checked_sub(b'0').filter(|digit| *digit < 10)?);
        let value = value.checked_mul(10)?;
        if negative { value.checked_sub(digit) } else { value.checked_add(digit) }
    })
}
