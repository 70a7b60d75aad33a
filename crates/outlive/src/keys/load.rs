//! Reads a directory of keys, and refuses one that others may read.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::certificate::{Certificate, CertificateError};
use super::revoked::Revoked;
use super::{CAS, HOST, REVOKED};

/// What a link needs.
#[derive(Debug)]
pub struct Loaded {
    /// The CAs whose certificates count.
    pub cas: Vec<CertificateDer<'static>>,
    /// This host's certificate.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its private key.
    pub key: PrivateKeyDer<'static>,
    /// What the certificate says.
    pub host: Certificate,
    /// Certificates that count no longer.
    pub revoked: Revoked,
}

/// Why keys cannot be used. Each message has the remedy.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// There are none.
    #[error(
        "{path} has no keys: `outlive keys init {path}` makes a CA and this host's certificate; for a second host copy \
         what `outlive keys issue` has made for it"
    )]
    Missing {
        /// The file or directory.
        path: String,
    },
    /// Somebody else may read or change them.
    #[error("{path} may be used by others than its owner (mode {mode:04o}): chmod {remedy} {path}")]
    Open {
        /// The file or directory.
        path: String,
        /// Its mode.
        mode: u32,
        /// The mode that it should have.
        remedy: &'static str,
    },
    /// Somebody else owns them.
    #[error("{} belongs to user {owner}, not to root or to the user of this process: chown it", .path.display())]
    Owner {
        /// The file or directory.
        path: PathBuf,
        /// Its owner's number.
        owner: u32,
    },
    /// The operating system's.
    #[error("cannot read {}: {source}", .path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The file does not have what it must.
    #[error("{} {what}: copy it again, or make it anew with `outlive keys`", .path.display())]
    Damaged {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

impl LoadError {
    pub(super) fn damaged(path: &Path, what: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), what: what.into() }
    }
}

/// Reads the keys in a directory.
///
/// # Errors
/// See [`LoadError`].
pub fn load(directory: &Path) -> Result<Loaded, LoadError> {
    let file = directory.join(HOST);
    if !file.exists() && fs::metadata(directory).is_ok() || !directory.exists() {
        return Err(LoadError::Missing { path: directory.display().to_string() });
    }
    closed(directory, "700")?;
    let pem = secret(&file)?;
    let key =
        PrivateKeyDer::from_pem_slice(&pem).map_err(|_| LoadError::damaged(&file, "has no private key"))?;
    let chain = certificates(&file, &pem)?;
    let host = Certificate::of_host(&chain[0]).map_err(|why: CertificateError| {
        LoadError::damaged(&file, format!("has a wrong certificate: {why}"))
    })?;
    Ok(Loaded { cas: cas(directory)?, chain, key, host, revoked: revoked(directory)? })
}

/// The CAs of a directory.
pub(super) fn cas(directory: &Path) -> Result<Vec<CertificateDer<'static>>, LoadError> {
    let file = directory.join(CAS);
    certificates(&file, &read(&file)?)
}

/// The list of a directory. A missing one is empty.
pub(super) fn revoked(directory: &Path) -> Result<Revoked, LoadError> {
    let file = directory.join(REVOKED);
    let text = match read(&file) {
        Ok(text) => text,
        Err(LoadError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    let wrong =
        |line: String| LoadError::damaged(&file, format!("has a line that is no serial number: {line}"));
    Revoked::parse(&String::from_utf8_lossy(&text)).map_err(wrong)
}

/// The certificates of a file, at least one.
pub(super) fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, LoadError> {
    let all = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    all.ok().filter(|all| !all.is_empty()).ok_or_else(|| LoadError::damaged(path, "has no certificate"))
}

/// Reads a file with a private key.
pub(super) fn secret(path: &Path) -> Result<Vec<u8>, LoadError> {
    closed(path, "600")?;
    read(path)
}

fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    fs::read(path).map_err(|source| LoadError::Read { path: path.to_owned(), source })
}

/// Refuses what others than its owner may use, or what another user owns.
pub(super) fn closed(path: &Path, remedy: &'static str) -> Result<(), LoadError> {
    let about = fs::metadata(path).map_err(|source| LoadError::Read { path: path.to_owned(), source })?;
    let mode = about.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(LoadError::Open { path: path.display().to_string(), mode, remedy });
    }
    if about.uid() != 0 && about.uid() != geteuid().as_raw() {
        return Err(LoadError::Owner { path: path.to_owned(), owner: about.uid() });
    }
    Ok(())
}
