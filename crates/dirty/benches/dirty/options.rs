//! The options of the command line.

use std::path::PathBuf;

use crate::workload::Pattern;

/// How much is measured.
pub(crate) struct Scale {
    pub(crate) rounds: usize,
    pub(crate) sizes: &'static [u64],
    pub(crate) patterns: &'static [Pattern],
    pub(crate) dirty: &'static [u64],
    pub(crate) large_sizes: &'static [u64],
    pub(crate) large_dirty: &'static [u64],
    pub(crate) epoch_gib: u64,
    pub(crate) epoch_dirty: &'static [u64],
    pub(crate) fetch_gib: u64,
    pub(crate) fetch_dirty: &'static [u64],
}

pub(crate) const FULL: Scale = Scale {
    rounds: 11,
    sizes: &[1, 4, 8, 16],
    patterns: &[Pattern::Scattered, Pattern::Contiguous],
    dirty: &[0, 1, 100, 300, 1000, 3000],
    large_sizes: &[1, 8, 64, 1024],
    large_dirty: &[100, 300, 1000],
    epoch_gib: 8,
    epoch_dirty: &[100, 300, 1000, 3000],
    fetch_gib: 8,
    fetch_dirty: &[300, 1000, 3000, 8000],
};

pub(crate) const QUICK: Scale = Scale {
    rounds: 5,
    sizes: &[1, 8],
    patterns: &[Pattern::Scattered],
    dirty: &[1, 300, 1000],
    large_sizes: &[1, 64],
    large_dirty: &[300],
    epoch_gib: 8,
    epoch_dirty: &[300],
    fetch_gib: 8,
    fetch_dirty: &[1000],
};

/// So little that it only shows that everything works.
pub(crate) const SMOKE: Scale = Scale {
    rounds: 1,
    sizes: &[1],
    patterns: &[Pattern::Scattered],
    dirty: &[0, 20],
    large_sizes: &[1, 2],
    large_dirty: &[20],
    epoch_gib: 1,
    epoch_dirty: &[20],
    fetch_gib: 1,
    fetch_dirty: &[20],
};

pub(crate) struct Options {
    pub(crate) scale: &'static Scale,
    /// Also measure the ring without the library.
    pub(crate) floor: bool,
    pub(crate) json: Option<PathBuf>,
    /// Under `cargo test`: run as a test.
    pub(crate) is_test: bool,
    /// Only name the tests.
    pub(crate) list: bool,
    /// A word that the names of the tests to run contain.
    pub(crate) filter: Option<String>,
}

impl Options {
    /// As with other benches without the usual harness: `cargo bench` passes `--bench`; without it the
    /// program is run as a test, with the arguments of tests.
    pub(crate) fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options, String> {
        let (mut scale, mut json, mut filter) = (&FULL, None, None);
        let (mut floor, mut is_test, mut list) = (false, true, false);
        let mut unknown = Vec::new();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--bench" => is_test = false,
                "--quick" => scale = &QUICK,
                "--smoke" => scale = &SMOKE,
                "--floor" => floor = true,
                "--json" => json = Some(arguments.next().ok_or("--json wants a file")?.into()),
                "--list" => list = true,
                option if option.starts_with('-') => unknown.push(option.to_string()),
                word => filter = Some(word.to_string()),
            }
        }
        match unknown.first() {
            // A test ignores options of the usual harness.
            _ if is_test => scale = &SMOKE,
            Some(option) => return Err(format!("unknown option {option}")),
            None => (),
        }
        Ok(Options { scale, floor, json, is_test, list, filter })
    }
}
