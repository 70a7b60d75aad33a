//! The command line.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use outlive_dirty::{BackendChoice, PAGE_SIZE};

/// Guest physical address of the pages that the guest writes; below are its code and tables.
pub(crate) const DATA: u64 = 4 << 20;

pub(crate) const HELP: &str = "\
A live table of the pages that a small guest dirties, as outlive-dirty sees them.

Usage: dirty_top [OPTIONS]

  --vcpus N        vCPUs of the guest, 1 to 64 [2]
  --memory SIZE    its memory, 16M to 256G; it takes only what it touches [256M]
  --pages N        pages that each vCPU writes in an epoch [300]
  --hot PERCENT    how many of them are the same in every epoch; the others are drawn at random [50]
  --interval MS    time from epoch to epoch; 0: as fast as it goes [10]
  --backend NAME   auto, ring, clear-log or bitmap [auto]
  --rearm-all      trap every page anew in every epoch, hot or not
  --rates SOCKET   hand the dirty pages of every epoch to whoever connects: see the example dirty_rate
  --seconds S      stop after so long; 0: at Ctrl-C [0]
  -h, --help       this text

Examples:
  dirty_top                                    what it looks like
  dirty_top --hot 90 --interval 0              hot pages stop trapping after a few epochs: watch epochs/s
  dirty_top --hot 90 --interval 0 --rearm-all  the same guest without that
  dirty_top --memory 16G --backend bitmap      harvest + rearm grows with the VM; compare --backend ring
  dirty_top --seconds 5 | cat                  one line a second for a file or a pipe
";

pub(crate) struct Options {
    pub(crate) vcpus: usize,
    /// In bytes.
    pub(crate) memory: u64,
    pub(crate) pages: u64,
    pub(crate) hot: u64,
    pub(crate) interval: Duration,
    pub(crate) backend: BackendChoice,
    pub(crate) rearm_all: bool,
    pub(crate) rates: Option<PathBuf>,
    pub(crate) duration: Option<Duration>,
}

impl Options {
    /// None if help was asked for; an error is one line for the user.
    pub(crate) fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Option<Options>, String> {
        let mut options = Options {
            vcpus: 2,
            memory: 256 << 20,
            pages: 300,
            hot: 50,
            interval: Duration::from_millis(10),
            backend: BackendChoice::Auto,
            rearm_all: false,
            rates: None,
            duration: None,
        };
        while let Some(name) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{name} wants a value"));
            match name.as_str() {
                "-h" | "--help" => return Ok(None),
                "--vcpus" => options.vcpus = number(&name, &value()?, 1, 64)?,
                "--memory" => options.memory = size(&name, &value()?)?,
                "--pages" => options.pages = number(&name, &value()?, 1, 1 << 26)?,
                "--hot" => options.hot = number(&name, value()?.trim_end_matches('%'), 0, 100)?,
                "--interval" => {
                    options.interval = Duration::from_millis(number(&name, &value()?, 0, 60_000)?)
                }
                "--backend" => options.backend = backend(&value()?)?,
                "--rates" => options.rates = Some(value()?.into()),
                "--rearm-all" => options.rearm_all = true,
                "--seconds" => {
                    let seconds = number(&name, &value()?, 0, 1_000_000)?;
                    options.duration = (seconds > 0).then(|| Duration::from_secs(seconds));
                }
                _ => return Err(format!("there is no option {name}; try --help")),
            }
        }
        let room = (options.memory - DATA) / PAGE_SIZE / options.vcpus as u64;
        if options.pages > room {
            return Err(format!(
                "--pages {} is more than the {room} that each vCPU has in this memory",
                options.pages
            ));
        }
        Ok(Some(options))
    }
}

fn number<N: FromStr + PartialOrd + std::fmt::Display>(
    name: &str,
    text: &str,
    from: N,
    to: N,
) -> Result<N, String> {
    match text.parse() {
        Ok(number) if from <= number && number <= to => Ok(number),
        _ => Err(format!("{name} wants a number from {from} to {to}, not {text:?}")),
    }
}

fn size(name: &str, text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((end, 'M' | 'm')) => (&text[..end], 20),
        Some((end, 'G' | 'g')) => (&text[..end], 30),
        _ => (text, 0),
    };
    let bytes = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes
        .filter(|bytes| (16 << 20..=256 << 30).contains(bytes) && bytes % 4096 == 0)
        .ok_or_else(|| format!("{name} wants a size from 16M to 256G, not {text:?}"))
}

fn backend(text: &str) -> Result<BackendChoice, String> {
    match text {
        "auto" => Ok(BackendChoice::Auto),
        "ring" => Ok(BackendChoice::Ring),
        "clear-log" => Ok(BackendChoice::ClearLog),
        "bitmap" => Ok(BackendChoice::Bitmap),
        _ => Err(format!("--backend is auto, ring, clear-log or bitmap, not {text:?}")),
    }
}
