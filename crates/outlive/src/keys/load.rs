//! Reads a directory of keys, and refuses one that others may read.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use nix::unistd::geteuid;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::CertifiedKey;
use rustls::{CertificateError as Wrong, Error, InconsistentKeys, RootCertStore};

use super::certificate::{self, Certificate, CertificateError};
use super::revoked::Revoked;
use super::{CA_KEY, CAS, HOST, REVOKED, REVOKED_HERE};

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
        /// The directory.
        path: String,
    },
    /// It is something else.
    #[error("{} is not a directory: name the directory that has host.pem (--keys)", .0.display())]
    NoDirectory(PathBuf),
    /// It has other files.
    #[error(
        "{path} has files, but no keys (host.pem): name the directory that has them (--keys), or copy again what \
         `outlive keys issue` has made; `outlive keys init` wants a new or empty directory"
    )]
    Foreign {
        /// The directory.
        path: String,
    },
    /// This process may not read them.
    #[error(
        "{}: user {user} has no permission to read it: become root or its owner, or give it to that user (chown); \
         after the directory was replaced, restart the process", .path.display()
    )]
    Denied {
        /// The file or directory.
        path: PathBuf,
        /// The number of this process's user.
        user: u32,
    },
    /// The CAs are not there.
    #[error("{} is missing, so nobody can be known: copy it from another host of the same CA", .0.display())]
    NoCas(PathBuf),
    /// The list is not there, so nobody knows who is on it.
    #[error(
        "{path} is missing, so nobody is let in: copy it from another host; only if no certificate was ever revoked, \
         make an empty list: touch {path}"
    )]
    NoList {
        /// The file.
        path: String,
    },
    /// The list has something else.
    #[error(
        "{} has a line that is no serial number, so nobody is let in: {line}: correct or remove the line, or copy the \
         list from another host", .path.display()
    )]
    Line {
        /// The file.
        path: PathBuf,
        /// The line.
        line: String,
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
    #[error(
        "{path} belongs to user {owner}, not to root or to user {user}, who runs this process: start it as their owner, or \
         chown {user}: {path}"
    )]
    Owner {
        /// The file or directory.
        path: String,
        /// Its owner's number.
        owner: u32,
        /// The number of this process's user.
        user: u32,
    },
    /// The files are of two sets of keys.
    #[error(
        "{host} has a certificate of {ca}, which is not in {cas}, so no other host would accept it: copy the {file} of the host \
         with that CA, or make new keys where the CA is (`outlive keys issue --host {name}`) and copy all their files", host = .host.display(),
        cas = .cas.display(), file = CAS
    )]
    OtherCa {
        /// The file with the certificate.
        host: PathBuf,
        /// Whose certificate it is.
        name: String,
        /// The CA that made it.
        ca: String,
        /// The CAs that count.
        cas: PathBuf,
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
    #[error("{} {what}: {remedy}", .path.display())]
    Damaged {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
}

impl LoadError {
    pub(super) fn damaged(path: &Path, what: impl Into<String>) -> Self {
        let remedy = match path.file_name().and_then(|name| name.to_str()) {
            Some(CAS) => "copy it from another host of the same CA",
            Some(CA_KEY) => {
                "copy it from a backup, or make a new CA in a new directory with `outlive keys init`"
            }
            Some(HOST) => "copy it again, or make new keys where the CA is, with `outlive keys issue`",
            _ => "copy it again, or remove it",
        };
        Self::Damaged { path: path.to_owned(), what: what.into(), remedy }
    }

    /// Of a file or directory that cannot be read.
    pub(super) fn read(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::PermissionDenied => Self::Denied { path, user: geteuid().as_raw() },
            io::ErrorKind::NotFound if path.file_name().is_some_and(|name| name == CAS) => Self::NoCas(path),
            _ => Self::Read { path, source },
        }
    }
}

/// Reads the keys in a directory. Whoever begins to use them takes [`fitting`].
///
/// # Errors
/// See [`LoadError`].
pub fn load(directory: &Path) -> Result<Loaded, LoadError> {
    let file = directory.join(HOST);
    fs::metadata(&file).map_err(|error| absent(directory, error))?;
    closed(directory, "700")?;
    let pem = secret(&file)?;
    let key =
        PrivateKeyDer::from_pem_slice(&pem).map_err(|_| LoadError::damaged(&file, "has no private key"))?;
    let chain = certificates(&file, &pem)?;
    let host = Certificate::of_host(&chain[0]).map_err(|why: CertificateError| {
        LoadError::damaged(&file, format!("has a wrong certificate: {why}"))
    })?;
    if !belongs(&key, &chain) {
        return Err(LoadError::damaged(&file, "has a private key that does not belong to its certificate"));
    }
    Ok(Loaded { cas: cas(directory)?, chain, key, host, revoked: revoked(directory)? })
}

/// Reads the keys in a directory, and finds out at once what otherwise the other end of the first link would: whether
/// certificate and CA belong together. A link does not ask for it: while a CA is replaced, the other end may know more.
///
/// # Errors
/// See [`LoadError`].
pub fn fitting(directory: &Path) -> Result<Loaded, LoadError> {
    let keys = load(directory)?;
    let file = directory.join(CAS);
    for ca in &keys.cas {
        if !certificate::is_cas(ca) {
            let name = Certificate::of_ca(ca).map_or_else(|_| "nobody".into(), |it| it.name);
            let what = format!("has a certificate of {name} which is no CA's, so {name} could make others");
            return Err(LoadError::damaged(&file, what));
        }
    }
    made_by(&keys).map_err(|why| {
        let host = directory.join(HOST);
        let Certificate { name, ca, .. } = &keys.host;
        match why {
            Error::InvalidCertificate(Wrong::UnknownIssuer | Wrong::BadSignature) => {
                LoadError::OtherCa { host, name: name.clone(), ca: ca.clone(), cas: file }
            }
            why => LoadError::damaged(&host, format!("has a certificate that does not count: {why}")),
        }
    })?;
    Ok(keys)
}

/// What others than the owner could change, were the directory open, and what belongs to another user: a line for each
/// file. Nobody else comes to it while the directory is closed, so no start fails for it.
pub fn loose(directory: &Path) -> Vec<String> {
    let files = [CAS, REVOKED, REVOKED_HERE].map(|name| directory.join(name));
    let complaint = |file: &PathBuf| kept(file, 0o022, "go-w").err().map(|why| why.to_string());
    files.iter().filter(|file| file.exists()).filter_map(complaint).collect()
}

/// Whether a private key is that of the first certificate. What the library cannot say, the first link finds.
fn belongs(key: &PrivateKeyDer<'_>, chain: &[CertificateDer<'static>]) -> bool {
    let Ok(key) = ring::sign::any_supported_type(key) else { return true };
    let mismatch = Error::InconsistentKeys(InconsistentKeys::KeyMismatch);
    CertifiedKey::new(chain.to_vec(), key).keys_match() != Err(mismatch)
}

/// Whether one of the CAs has made the certificate, at a time when it counts: its end is another matter.
fn made_by(keys: &Loaded) -> Result<(), Error> {
    let mut cas = RootCertStore::empty();
    for ca in &keys.cas {
        cas.add(ca.clone())?;
    }
    let provider = Arc::new(ring::default_provider());
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(cas), provider).build();
    let clients = clients.map_err(|why| Error::General(why.to_string()))?;
    let begins = keys.host.from.duration_since(UNIX_EPOCH).unwrap_or_default();
    clients.verify_client_cert(&keys.chain[0], &keys.chain[1..], UnixTime::since_unix_epoch(begins)).map(drop)
}

/// Why a directory has no keys for this process.
fn absent(directory: &Path, error: io::Error) -> LoadError {
    let path = directory.display().to_string();
    let files = fs::read_dir(directory);
    match (error.kind(), files.map(|mut files| files.next().is_some())) {
        (io::ErrorKind::NotFound, Ok(true)) => LoadError::Foreign { path },
        (io::ErrorKind::NotFound, Ok(false)) => LoadError::Missing { path },
        (io::ErrorKind::NotFound, Err(error)) if error.kind() == io::ErrorKind::NotFound => {
            LoadError::Missing { path }
        }
        (io::ErrorKind::NotADirectory, _) => LoadError::NoDirectory(directory.to_owned()),
        (_, Err(error)) => LoadError::read(directory, error),
        (_, Ok(_)) => LoadError::read(&directory.join(HOST), error),
    }
}

/// The CAs of a directory.
pub(super) fn cas(directory: &Path) -> Result<Vec<CertificateDer<'static>>, LoadError> {
    let file = directory.join(CAS);
    certificates(&file, &read(&file)?)
}

/// What a directory has revoked. `init` and `issue` make the list: a missing one was lost, and who was on it is unknown.
pub(super) fn revoked(directory: &Path) -> Result<Revoked, LoadError> {
    let file = directory.join(REVOKED);
    let text = match read(&file) {
        Err(LoadError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Err(LoadError::NoList { path: file.display().to_string() });
        }
        other => other?,
    };
    Ok(list(&file, &text)?.and(revoked_here(directory)?))
}

/// What was revoked with this directory. Only then there is a list.
fn revoked_here(directory: &Path) -> Result<Revoked, LoadError> {
    let file = directory.join(REVOKED_HERE);
    match read(&file) {
        Err(LoadError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(Revoked::default())
        }
        text => list(&file, &text?),
    }
}

fn list(file: &Path, text: &[u8]) -> Result<Revoked, LoadError> {
    let wrong = |line| LoadError::Line { path: file.to_owned(), line };
    Revoked::parse(&String::from_utf8_lossy(text)).map_err(wrong)
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

pub(super) fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    fs::read(path).map_err(|source| LoadError::read(path, source))
}

/// Refuses what others than its owner may use, or what another user owns.
pub(super) fn closed(path: &Path, remedy: &'static str) -> Result<(), LoadError> {
    kept(path, 0o077, remedy)
}

/// Refuses what others may do one of these things with, or what another user owns.
fn kept(path: &Path, closed: u32, remedy: &'static str) -> Result<(), LoadError> {
    let about = fs::metadata(path).map_err(|source| LoadError::read(path, source))?;
    let mode = about.mode() & 0o7777;
    if mode & closed != 0 {
        return Err(LoadError::Open { path: path.display().to_string(), mode, remedy });
    }
    let (owner, user) = (about.uid(), geteuid().as_raw());
    if owner != 0 && owner != user {
        return Err(LoadError::Owner { path: path.display().to_string(), owner, user });
    }
    Ok(())
}
