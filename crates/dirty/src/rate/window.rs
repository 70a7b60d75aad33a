//! A stretch of time with its dirty pages, and its line of text.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::layout::Gfn;

/// The most pages that a line may stand for: 1 TiB. A peer's line must not fill memory.
const MAX_PAGES: u64 = 1 << 28;
const MAX_VCPUS: usize = 4096;

/// A stretch of time in which the dirty pages were found: an epoch, or the time from one fetch to the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// How long the guest ran.
    pub time: Duration,
    /// Dirty pages by vCPU: [`crate::Tracker::harvest_vcpu`]. Empty if this is not known.
    pub vcpus: Vec<u64>,
    /// Pages that the VMM has marked.
    pub devices: u64,
    /// The hot pages among them: listed without a trap.
    pub hot: u64,
    /// Every dirty page once.
    pub pages: Vec<Gfn>,
}

/// The line that a VMM sends before its windows: `vm gfn-space HEX fault-ns N copy-ns N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmLine {
    /// [`crate::GlobalLog::gfn_space`].
    pub gfn_space: u64,
    /// The trap at the first write to a page; 0 if it was not measured.
    pub fault_ns: u32,
    /// A copy of a page; 0 if it was not measured.
    pub copy_ns: u32,
}

impl fmt::Display for VmLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let VmLine { gfn_space, fault_ns, copy_ns } = self;
        write!(f, "vm gfn-space {gfn_space:x} fault-ns {fault_ns} copy-ns {copy_ns}")
    }
}

impl FromStr for VmLine {
    type Err = WindowError;

    fn from_str(line: &str) -> Result<VmLine, WindowError> {
        let mut words = Words::of(line, "vm")?;
        let gfn_space = number(words.field("gfn-space")?, 16)?;
        let mut small = |name| {
            let word = words.field(name)?;
            u32::try_from(number(word, 10)?).map_err(|_| WindowError::Number(word.into()))
        };
        Ok(VmLine { gfn_space, fault_ns: small("fault-ns")?, copy_ns: small("copy-ns")? })
    }
}

/// Why a line is not a window.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WindowError {
    /// It begins with another word: skip it.
    #[error("another line: {0:?}")]
    OtherLine(String),
    /// A field is missing, or another one is in its place.
    #[error("the field {0:?} is not where it should be")]
    Field(&'static str),
    /// A number is malformed or too large.
    #[error("{0:?} is not a number that can be here")]
    Number(String),
    /// Frame numbers do not ascend, or are too many.
    #[error("the pages do not ascend, or are more than {MAX_PAGES}")]
    Pages,
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "window {} vcpus ", self.time.as_micros())?;
        for (index, pages) in self.vcpus.iter().enumerate() {
            write!(f, "{}{pages}", if index > 0 { "," } else { "" })?;
        }
        let none = |empty: bool| if empty { "-" } else { "" };
        write!(f, "{} devices {} hot {} pages ", none(self.vcpus.is_empty()), self.devices, self.hot)?;
        let mut pages = self.pages.clone();
        pages.sort_unstable();
        pages.dedup();
        for (index, run) in pages.chunk_by(|one, next| next.0 - one.0 == 1).enumerate() {
            write!(f, "{}{:x}", if index > 0 { "," } else { "" }, run[0].0)?;
            if run.len() > 1 {
                write!(f, "+{:x}", run.len())?;
            }
        }
        write!(f, "{}", none(pages.is_empty()))
    }
}

impl FromStr for Window {
    type Err = WindowError;

    fn from_str(line: &str) -> Result<Window, WindowError> {
        let mut words = Words::of(line, "window")?;
        let time = number(words.0.next().unwrap_or_default(), 10)?;
        let mut field = |name| words.field(name);
        let vcpus = list(field("vcpus")?).map(|word| number(word, 10)).collect::<Result<Vec<_>, _>>()?;
        if vcpus.len() > MAX_VCPUS {
            return Err(WindowError::Field("vcpus"));
        }
        let devices = number(field("devices")?, 10)?;
        let hot = number(field("hot")?, 10)?;
        let pages = pages(field("pages")?)?;
        Ok(Window { time: Duration::from_micros(time), vcpus, devices, hot, pages })
    }
}

/// The rest of a line.
struct Words<'l>(std::str::SplitAsciiWhitespace<'l>);

impl<'l> Words<'l> {
    fn of(line: &'l str, first: &str) -> Result<Words<'l>, WindowError> {
        let mut words = line.split_ascii_whitespace();
        let found = words.next().unwrap_or_default();
        if found == first {
            Ok(Words(words))
        } else {
            Err(WindowError::OtherLine(found.chars().take(20).collect()))
        }
    }

    fn field(&mut self, name: &'static str) -> Result<&'l str, WindowError> {
        match (self.0.next(), self.0.next()) {
            (Some(word), Some(value)) if word == name => Ok(value),
            _ => Err(WindowError::Field(name)),
        }
    }
}

fn list(field: &str) -> impl Iterator<Item = &str> {
    field.split(',').filter(move |_| field != "-")
}

fn number(word: &str, radix: u32) -> Result<u64, WindowError> {
    // The library would take a sign.
    let digits = word.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let number = digits.then(|| u64::from_str_radix(word, radix).ok()).flatten();
    number.ok_or_else(|| WindowError::Number(word.chars().take(20).collect()))
}

fn pages(field: &str) -> Result<Vec<Gfn>, WindowError> {
    let (mut pages, mut next) = (Vec::new(), 0);
    for word in list(field) {
        let (first, count) = word.split_once('+').unwrap_or((word, "1"));
        let (first, count) = (number(first, 16)?, number(count, 16)?);
        let end = first.checked_add(count).ok_or(WindowError::Pages)?;
        if first < next || count == 0 || pages.len() as u64 + count > MAX_PAGES {
            return Err(WindowError::Pages);
        }
        pages.extend((first..end).map(Gfn));
        next = end;
    }
    Ok(pages)
}
