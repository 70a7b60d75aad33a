//! The files with the secrets of an etcd cluster, which others renew while the process lives.
//!
//! A file that is being renewed may be missing, half written or closed to this user for a moment, or for good. What was
//! read last is used until there is something better: an arbiter that is lost for a file's sake helps nobody.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use ureq::Agent;
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, parse_pem};

use super::fault::SecretError;
use super::spec::Spec;

/// How often the files are looked at. The arbiter is probed each 10 s, so a probe finds what is new.
const LOOK: Duration = Duration::from_secs(2);

/// A password in a file.
pub(super) struct Password {
    file: PathBuf,
    last: Mutex<Last>,
}

struct Last {
    password: String,
    /// Somebody was told that the file cannot be read any more.
    told: bool,
}

impl Password {
    /// # Errors
    /// The file cannot be used.
    pub(super) fn read(file: &Path) -> Result<Self, SecretError> {
        let last = Last { password: password(file)?, told: false };
        Ok(Self { file: file.to_owned(), last: Mutex::new(last) })
    }

    /// What is in the file, or what was in it last.
    pub(super) fn newest(&self) -> String {
        // Without the lock: the file may be on a server that does not answer, and nobody else waits for that.
        let read = password(&self.file);
        let mut last = lock(&self.last);
        match read {
            Ok(password) => *last = Last { password, told: false },
            Err(error) if !last.told => {
                tracing::warn!("{error}; etcd gets the password that was read before");
                last.told = true;
            }
            Err(_) => {}
        }
        last.password.clone()
    }
}

/// What says that a file is another one, or has been written to: device, inode, and the time of the last change in
/// seconds and nanoseconds. `None` if it is not there.
type Mark = Option<(u64, u64, i64, i64)>;

/// Makes connections with the newest certificates and keys.
pub(super) struct Renewed {
    spec: Spec,
    make: fn(TlsConfig) -> Agent,
    loaded: Mutex<Loaded>,
}

struct Loaded {
    agent: Agent,
    /// Of the files that it has.
    marks: Vec<Mark>,
    looked: Instant,
    /// Somebody was told that newer files cannot be used.
    told: bool,
}

impl Renewed {
    /// # Errors
    /// A file cannot be used.
    pub(super) fn load(spec: &Spec, make: fn(TlsConfig) -> Agent) -> Result<Self, SecretError> {
        // Before they are read, so that a change meanwhile is seen later.
        let marks = marks(spec);
        let loaded = Loaded { agent: make(tls(spec)?), marks, looked: Instant::now(), told: false };
        Ok(Self { spec: spec.clone(), make, loaded: Mutex::new(loaded) })
    }

    /// With the files as they were [`LOOK`] ago or later, as far as they can be used.
    pub(super) fn newest(&self) -> Agent {
        let known = {
            let mut loaded = lock(&self.loaded);
            if loaded.looked.elapsed() < LOOK {
                return loaded.agent.clone();
            }
            loaded.looked = Instant::now();
            loaded.marks.clone()
        };
        // Without the lock, as above; whoever else asks meanwhile gets what was read before.
        let marks = marks(&self.spec);
        let read = (marks != known).then(|| tls(&self.spec));
        let mut loaded = lock(&self.loaded);
        match read {
            None => loaded.told = false,
            Some(Ok(tls)) => {
                tracing::info!("the certificates for etcd are new");
                *loaded = Loaded { agent: (self.make)(tls), marks, looked: loaded.looked, told: false };
            }
            // Also of a pair of which only one file has been replaced yet.
            Some(Err(error)) if !loaded.told => {
                tracing::warn!("{error}; etcd gets the certificates that were read before");
                loaded.told = true;
            }
            Some(Err(_)) => {}
        }
        loaded.agent.clone()
    }
}

fn lock<T>(state: &Mutex<T>) -> MutexGuard<'_, T> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn marks(spec: &Spec) -> Vec<Mark> {
    let mark = |file: &PathBuf| {
        let about = fs::metadata(file).ok()?;
        Some((about.dev(), about.ino(), about.ctime(), about.ctime_nsec()))
    };
    [&spec.ca, &spec.certificate, &spec.key].into_iter().flatten().map(mark).collect()
}

fn tls(spec: &Spec) -> Result<TlsConfig, SecretError> {
    let mut config = TlsConfig::builder().unversioned_rustls_crypto_provider(Arc::new(default_provider()));
    if let Some(ca) = &spec.ca {
        config = config.root_certs(RootCerts::Specific(Arc::new(certificates(ca)?)));
    }
    if let (Some(certificate), Some(key)) = (&spec.certificate, &spec.key) {
        let chain = certificates(certificate)?;
        let client = ClientCert::new_with_certs(&chain, private_key(key, &chain)?);
        config = config.client_cert(Some(client));
    }
    Ok(config.build())
}

fn certificates(file: &Path) -> Result<Vec<Certificate<'static>>, SecretError> {
    let bytes = read(file)?;
    let found: Vec<_> = parse_pem(&bytes)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if found.is_empty() {
        let (file, what) = (file.to_owned(), "certificate in PEM");
        return Err(SecretError::Content {
            file,
            what,
            remedy: "it begins with -----BEGIN CERTIFICATE-----",
        });
    }
    Ok(found)
}

fn private_key(file: &Path, chain: &[Certificate]) -> Result<PrivateKey<'static>, SecretError> {
    let wrong = || SecretError::Content {
        file: file.to_owned(),
        what: "private key in PEM that belongs to the certificate",
        remedy: "give both of the same pair",
    };
    let bytes = secret(file)?;
    let key = PrivateKeyDer::from_pem_slice(&bytes).map_err(|_| wrong())?;
    let chain = chain.iter().map(|it| CertificateDer::from(it.der().to_vec())).collect();
    // What does not fit would end the thread that connects.
    CertifiedKey::from_der(chain, key, &default_provider()).map_err(|_| wrong())?;
    PrivateKey::from_pem(&bytes).map_err(|_| wrong())
}

/// The first line of a file.
fn password(file: &Path) -> Result<String, SecretError> {
    let bytes = secret(file)?;
    let text = String::from_utf8(bytes).unwrap_or_default();
    match text.lines().next() {
        Some(line) if !line.is_empty() => Ok(line.to_owned()),
        _ => Err(SecretError::Content {
            file: file.to_owned(),
            what: "password",
            remedy: "write it into the first line",
        }),
    }
}

fn secret(file: &Path) -> Result<Vec<u8>, SecretError> {
    let metadata =
        fs::metadata(file).map_err(|source| SecretError::Read { file: file.to_owned(), source })?;
    if metadata.mode() & 0o077 != 0 {
        return Err(SecretError::Open(file.to_owned()));
    }
    read(file)
}

fn read(file: &Path) -> Result<Vec<u8>, SecretError> {
    fs::read(file).map_err(|source| SecretError::Read { file: file.to_owned(), source })
}
