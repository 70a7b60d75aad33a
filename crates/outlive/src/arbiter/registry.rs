//! The kinds of arbiters.

use std::path::PathBuf;

use super::{Arbiter, ArbiterSpecError, Initialized, etcd, file, manual, served};

/// Opens the arbiter at a place.
type Open = fn(&str) -> Result<Box<dyn Arbiter>, ArbiterSpecError>;
/// Reads a place without asking anybody.
type Read = fn(&str) -> Result<(), ArbiterSpecError>;
/// Makes a place an arbiter.
type Init = fn(&str) -> Result<(Box<dyn Arbiter>, Initialized), ArbiterSpecError>;

/// What a process needs of its host for an arbiter.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    /// Directories in which files come and go.
    pub(crate) kept: Vec<PathBuf>,
    /// Files and directories to read.
    pub(crate) read: Vec<PathBuf>,
    /// Files to read that are renewed by putting others in their place.
    pub(crate) renewed: Vec<PathBuf>,
}

/// A kind of arbiter. To add one, implement [`Arbiter`], add a line to [`KINDS`], and let the tests in
/// `tests/arbiter/conformance` run over it.
struct Kind {
    /// The word before the colon in `--arbiter`.
    scheme: &'static str,
    /// How to write the rest, for people.
    form: &'static str,
    read: Read,
    open: Open,
    init: Init,
    needs: fn(&str) -> Needs,
    servers: fn(&str) -> Vec<String>,
}

const KINDS: [Kind; 4] = [
    Kind {
        scheme: "file",
        form: file::FORM,
        read: file::read,
        open: file::open,
        init: file::init,
        needs: file::needs,
        servers: nobody,
    },
    Kind {
        scheme: "etcd",
        form: etcd::FORM,
        read: etcd::read,
        open: etcd::open,
        init: etcd::init,
        needs: etcd::needs,
        servers: etcd::servers,
    },
    Kind {
        scheme: "outlive",
        form: served::FORM,
        read: served::read,
        open: served::open,
        init: served::init,
        needs: served::needs,
        servers: served::servers,
    },
    Kind {
        scheme: "manual",
        form: manual::FORM,
        read: manual::read,
        open: manual::open,
        init: manual::init,
        needs: nothing,
        servers: nobody,
    },
];

fn nobody(_place: &str) -> Vec<String> {
    Vec::new()
}

fn nothing(_place: &str) -> Needs {
    Needs::default()
}

/// What a process needs of its host for the arbiter of an `--arbiter` option; nothing for what names none.
pub(crate) fn needs(text: &str) -> Needs {
    find(text).map(|(kind, place)| (kind.needs)(place)).unwrap_or_default()
}

/// The servers that an `--arbiter` option names, as `HOST:PORT`; none for an arbiter without servers.
pub(super) fn servers(text: &str) -> Vec<String> {
    find(text).map(|(kind, place)| (kind.servers)(place)).unwrap_or_default()
}

/// Whether an `--arbiter` option names a person.
pub(crate) fn is_manual(text: &str) -> bool {
    find(text).is_ok_and(|(kind, _)| kind.scheme == "manual")
}

/// The kind of an `--arbiter` option, and the place after the colon.
fn find(text: &str) -> Result<(&'static Kind, &str), ArbiterSpecError> {
    let (scheme, place) = text.split_once(':').unwrap_or((text, ""));
    let kind = KINDS.iter().find(|kind| kind.scheme == scheme);
    kind.map(|kind| (kind, place)).ok_or_else(|| ArbiterSpecError::Form(text.to_owned()))
}

/// Opens the arbiter of an `--arbiter` option.
///
/// # Errors
/// Why it is none, or why this host cannot use it; one line that names the remedy.
pub fn parse(text: &str) -> Result<Box<dyn Arbiter>, ArbiterSpecError> {
    let (kind, place) = find(text)?;
    (kind.open)(place)
}

/// Looks at how an `--arbiter` option is written, and at nothing else.
///
/// # Errors
/// It names no arbiter; one line that names the remedy.
pub(crate) fn read(text: &str) -> Result<(), ArbiterSpecError> {
    let (kind, place) = find(text)?;
    (kind.read)(place)
}

/// Makes the place of an `--arbiter` option an arbiter: an operator says that this is the place.
///
/// # Errors
/// Why it cannot be one; nothing was changed then. One line that names the remedy.
pub fn init(text: &str) -> Result<(Box<dyn Arbiter>, Initialized), ArbiterSpecError> {
    let (kind, place) = find(text)?;
    (kind.init)(place)
}

/// How an arbiter is written, for people.
pub(super) fn forms() -> String {
    let forms: Vec<&str> = KINDS.iter().map(|kind| kind.form).collect();
    forms.join("; or ")
}
