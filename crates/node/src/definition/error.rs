//! What is wrong with a definition: one line with the file, the key and what helps.

use std::fmt;
use std::path::{Path, PathBuf};

/// A definition that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct DefinitionError {
    /// Its file; empty for a text that is in none.
    pub file: PathBuf,
    /// The key; empty if it is about the whole file.
    pub key: String,
    /// What is wrong.
    #[source]
    pub fault: Box<Fault>,
}

impl DefinitionError {
    /// A fault of this file, or of this key in it.
    pub(crate) fn new(file: &Path, key: &str, fault: Fault) -> Self {
        Self { file: file.to_owned(), key: key.to_owned(), fault: Box::new(fault) }
    }

    /// The same of a text that is in no file of the node's. Whoever has the text knows where it is from.
    pub(crate) fn of_text(self) -> Self {
        Self { file: PathBuf::new(), ..self }
    }
}

impl fmt::Display for DefinitionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.file.as_os_str().is_empty() {
            write!(f, "{}: ", self.file.display())?;
        }
        match &*self.fault {
            // A sentence about the key.
            Fault::Type { .. } => write!(f, "{} ", self.key)?,
            _ if !self.key.is_empty() => write!(f, "{}: ", self.key)?,
            _ => {}
        }
        self.fault.fmt(f)
    }
}

/// What may be wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The name of its file.
    #[error(
        "'{0}' cannot be a VM's name: it has 1 to 48 letters, digits, '-', '_' and '.', and begins with a letter or a \
         digit; rename the file"
    )]
    Name(String),
    /// It is no TOML.
    #[error("line {line}: {what}; text stands in quotes, and a key once")]
    Syntax {
        /// From 1.
        line: usize,
        /// What the parser says.
        what: String,
    },
    /// No option of this name.
    #[error(
        "unknown key: {}", match .0 {
            Some(it) => format!("{it} is alike; `outlive run --help` lists all options"),
            None => "the keys are the long options of outlive run, see `outlive run --help`".to_owned(),
        }
    )]
    Unknown(Option<String>),
    /// There is no VM in it.
    #[error(
        "says nothing of a VM: give at least boot or kernel, or ip for the built-in guest (docs/node.md)"
    )]
    Empty,
    /// A pair needs it.
    #[error("a VM that either host may start needs one: {0}")]
    Needed(&'static str),
    /// Another type.
    #[error("is {is}: give {wanted}")]
    Type {
        /// What it is.
        is: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
    /// Not a key of a definition.
    #[error("cannot be given here: {0}")]
    NotHereBut(&'static str),
    /// The node's directory is not where the operator was.
    #[error("'{0}' is not an absolute path: give one that begins with /")]
    Relative(String),
    /// The program does not read the value.
    #[error("{0}")]
    Value(String),
    /// Options that do not go together.
    #[error("{0}; the same options are keys here, without --")]
    Together(String),
    /// It is for other hosts.
    #[error("is for {hosts} and not for {host}: add [host.{host}], or remove the file from this host")]
    NotHere {
        /// This host.
        host: String,
        /// Those that have tables.
        hosts: String,
    },
    /// Another VM has it.
    #[error("{what} {value} is {of}'s, too ({}): give each VM its own", .file.display())]
    Shared {
        /// What it is, for example "the disk image".
        what: &'static str,
        /// Which.
        value: String,
        /// The other VM.
        of: String,
        /// Its file.
        file: PathBuf,
    },
    /// The operating system does not let it be read.
    #[error("cannot be read: {0}; make it a file that this user may read")]
    Unreadable(String),
    /// Too long to be one.
    #[error("is longer than {} KiB: it is no definition; remove it", super::LONGEST / 1024)]
    TooLong,
}
