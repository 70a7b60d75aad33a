//! Why an arbiter gives no answer, and why an `--arbiter` option cannot be used. Every text names the remedy.

use std::path::PathBuf;

use super::etcd::{EtcdFault, EtcdSpecError};
use super::file::{DirectoryFault, FileSpecError};
use super::registry;
use super::served::{ServedFault, ServedSpecError};

/// Why an arbiter gave no answer. Until it gives one, nobody knows who may run the VM.
#[derive(Debug, thiserror::Error)]
pub enum ArbiterError {
    /// Of a directory.
    #[error("arbiter directory {directory}: {fault}")]
    Directory {
        /// The directory.
        directory: PathBuf,
        /// What is wrong.
        #[source]
        fault: DirectoryFault,
    },
    /// Of an etcd cluster.
    #[error("arbiter {place}: {fault}")]
    Etcd {
        /// As it was given.
        place: String,
        /// What is wrong.
        #[source]
        fault: EtcdFault,
    },
    /// Of an arbiter that Outlive serves.
    #[error("arbiter {place}: {fault}")]
    Served {
        /// As it was given.
        place: String,
        /// What is wrong.
        #[source]
        fault: ServedFault,
    },
}

/// Why an `--arbiter` option cannot be used. Each text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ArbiterSpecError {
    /// The text is not of a known form.
    #[error("unknown arbiter '{0}': write {forms}", forms = registry::forms())]
    Form(String),
    /// A directory is no arbiter.
    #[error(transparent)]
    Directory(#[from] FileSpecError),
    /// A cluster is no arbiter.
    #[error(transparent)]
    Etcd(#[from] EtcdSpecError),
    /// A served arbiter cannot be used.
    #[error(transparent)]
    Served(#[from] ServedSpecError),
    /// This kind is made elsewhere, or needs no making.
    #[error("'{place}' is not made by this command: {remedy}")]
    NoInit {
        /// As it was given.
        place: String,
        /// What to do instead.
        remedy: &'static str,
    },
}
