//! Makes CAs, certificates and directories of keys.
//!
//! A new directory is made beside its place and moved there when it is whole; a file is replaced at once. So whoever
//! reads keys finds old ones or new ones, and an attempt that fails leaves nothing behind.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType, SerialNumber, date_time_ymd,
};
use rustls::pki_types::CertificateDer;

use super::certificate::{Certificate, CertificateError};
use super::grant::Grant;
use super::load::{self, LoadError};
use super::revoked::is_serial;
use super::{CA_KEY, CAS, HOST, ISSUED, REVOKED};
use crate::process;

/// How long a CA counts.
const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How long before its making a certificate counts: clocks of hosts differ.
const SKEW: Duration = Duration::from_secs(3600);

/// What is to be made for a host.
#[derive(Clone, Debug)]
pub struct Order {
    /// The host's name.
    pub host: String,
    /// What it may do.
    pub grant: Grant,
    /// How long the certificate counts.
    pub life: Duration,
}

/// Why keys cannot be made. Each message has the remedy.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// Keys that are used would be lost.
    #[error("{} is there already: `outlive keys rotate` renews keys; or name a new directory", .0.display())]
    Exists(PathBuf),
    /// The CA's key is elsewhere.
    #[error("{} is not here: certificates are made where the CA's private key is, with `outlive keys issue`", .0.display())]
    NoCa(PathBuf),
    /// No certificate can have it.
    #[error("'{0}' cannot be a host's name: use letters, digits, '.' and '-'")]
    Name(String),
    /// Nothing is known by that name.
    #[error(
        "no certificate of '{0}' was made here: give its serial number, which `outlive keys show` on its host has"
    )]
    Unknown(String),
    /// The new CA has signed nothing yet.
    #[error("{} counts under an old CA: `outlive keys rotate` first, here and on every host", .0.display())]
    StillOld(PathBuf),
    /// The keys that are there cannot be used.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A certificate that is there cannot be read.
    #[error("a certificate cannot be read: {0}")]
    Certificate(#[from] CertificateError),
    /// The library's.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// The operating system's.
    #[error("cannot write {}: {source}", .path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// There are no random numbers.
    #[error("the system gives no random numbers: {0}")]
    Random(#[source] io::Error),
}

/// A CA whose private key is here.
struct Ca {
    issuer: Issuer<'static, KeyPair>,
    /// Its certificate.
    pem: String,
}

/// A new key with a certificate.
struct Made {
    key: String,
    certificate: String,
    about: Certificate,
}

/// Makes a directory with a CA and the certificate of a host.
///
/// # Errors
/// See [`MakeError`].
pub fn init(directory: &Path, order: &Order) -> Result<Certificate, MakeError> {
    let ca = new_ca(&order.host)?;
    let made = ca.make(order)?;
    let ca_file = (CA_KEY, format!("{}{}", ca.issuer.key().serialize_pem(), ca.pem));
    new_directory(directory, &ca.pem, &made, Some(ca_file))
}

/// Makes a directory for another host, to be copied there.
///
/// # Errors
/// See [`MakeError`].
pub fn issue(directory: &Path, order: &Order, to: &Path) -> Result<Certificate, MakeError> {
    let ca = open_ca(directory)?;
    let cas = text(&directory.join(CAS))?;
    let made = ca.make(order)?;
    // First: one that is handed out and not known here could not be revoked by its host's name.
    note_issued(directory, &made)?;
    let about = new_directory(to, &cas, &made, None)?;
    // A host that cannot refuse what was revoked before would accept it.
    if directory.join(REVOKED).exists() {
        replace(&to.join(REVOKED), &text(&directory.join(REVOKED))?, 0o600)?;
    }
    Ok(about)
}

/// Gives this host a new key and certificate, with the rights that it has.
///
/// # Errors
/// See [`MakeError`].
pub fn rotate(directory: &Path, life: Duration) -> Result<Certificate, MakeError> {
    let old = load::load(directory)?.host;
    let ca = open_ca(directory)?;
    let made = ca.make(&Order { host: old.name, grant: old.grant, life })?;
    note_issued(directory, &made)?;
    replace(&directory.join(HOST), &format!("{}{}", made.key, made.certificate), 0o600)?;
    Ok(made.about)
}

/// Makes a new CA, which certificates are made with from now on. Those of the old ones still count.
///
/// # Errors
/// See [`MakeError`].
pub fn rotate_ca(directory: &Path) -> Result<Certificate, MakeError> {
    let host = load::load(directory)?.host;
    open_ca(directory)?;
    let ca = new_ca(&host.name)?;
    let old = text(&directory.join(CAS))?;
    // Before anybody is given a certificate of it.
    replace(&directory.join(CAS), &format!("{}{old}", ca.pem), 0o644)?;
    replace(&directory.join(CA_KEY), &format!("{}{}", ca.issuer.key().serialize_pem(), ca.pem), 0o600)?;
    ca.about()
}

/// From now on only certificates of the newest CA count.
///
/// # Errors
/// See [`MakeError`].
pub fn forget_old_cas(directory: &Path) -> Result<Certificate, MakeError> {
    let loaded = load::load(directory)?;
    let ca = open_ca(directory)?;
    let signed = |host: &CertificateDer<'_>| {
        use x509_parser::prelude::{FromDer, X509Certificate};
        let ca = load::certificates(&directory.join(CA_KEY), ca.pem.as_bytes()).ok()?;
        let (_, ca) = X509Certificate::from_der(&ca[0]).ok()?;
        let (_, host) = X509Certificate::from_der(host).ok()?;
        Some(host.issuer() == ca.subject())
    };
    if signed(&loaded.chain[0]) != Some(true) {
        return Err(MakeError::StillOld(directory.join(HOST)));
    }
    replace(&directory.join(CAS), &ca.pem, 0o644)?;
    ca.about()
}

/// Puts certificates on the list of those that count no longer: all that were made here for a host, or the one with
/// this serial number. Returns their serial numbers.
///
/// # Errors
/// See [`MakeError`].
pub fn revoke(directory: &Path, who: &str) -> Result<Vec<String>, MakeError> {
    load::closed(directory, "700")?;
    let before = load::revoked(directory)?;
    let serials: Vec<String> = if is_serial(who) {
        vec![who.to_ascii_lowercase()]
    } else {
        issued(directory)?.into_iter().filter(|it| it.name == who).map(|it| it.serial).collect()
    };
    if serials.is_empty() {
        return Err(MakeError::Unknown(who.to_owned()));
    }
    let file = directory.join(REVOKED);
    let mut list = if file.exists() { text(&file)? } else { String::new() };
    let when = humantime::format_rfc3339_seconds(SystemTime::now());
    for serial in serials.iter().filter(|serial| !before.has(serial)) {
        list += &format!("{serial} {who} {when}\n");
    }
    replace(&file, &list, 0o600)?;
    Ok(serials)
}

/// The certificates that were made here.
pub(super) fn issued(directory: &Path) -> Result<Vec<Certificate>, MakeError> {
    let Ok(files) = fs::read_dir(directory.join(ISSUED)) else { return Ok(Vec::new()) };
    let mut all = Vec::new();
    for file in files.flatten() {
        let path = file.path();
        let pem = text(&path)?;
        all.push(Certificate::of_host(&load::certificates(&path, pem.as_bytes())?[0])?);
    }
    all.sort_by(|one, other| (&one.name, one.from).cmp(&(&other.name, other.from)));
    Ok(all)
}

/// The CA whose key is here, if it is.
pub(super) fn own_ca(directory: &Path) -> Result<Option<Certificate>, MakeError> {
    match open_ca(directory) {
        Ok(ca) => ca.about().map(Some),
        Err(MakeError::NoCa(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Ca {
    fn about(&self) -> Result<Certificate, MakeError> {
        let der = load::certificates(Path::new(CA_KEY), self.pem.as_bytes())?;
        Ok(Certificate::of_ca(&der[0])?)
    }

    fn make(&self, order: &Order) -> Result<Made, MakeError> {
        let good = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
        let name = order.host.as_str();
        if !(1..=64).contains(&name.len()) || !name.chars().all(good) || name.starts_with(['.', '-']) {
            return Err(MakeError::Name(name.to_owned()));
        }
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![name.to_owned()])?;
        for right in order.grant.to_names() {
            params.subject_alt_names.push(SanType::URI(right.try_into()?));
        }
        params.distinguished_name = named(name);
        params.serial_number = Some(serial()?);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // A host is a server where it waits and a client where it has the VM.
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        set_span(&mut params, order.life);
        let certificate = params.signed_by(&key, &self.issuer)?;
        let about = Certificate::of_host(certificate.der())?;
        Ok(Made { key: key.serialize_pem(), certificate: certificate.pem(), about })
    }
}

fn new_ca(host: &str) -> Result<Ca, MakeError> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    let number = serial()?;
    let short: String = number.to_bytes().iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    params.distinguished_name = named(&format!("Outlive CA {short} of {host}"));
    params.serial_number = Some(number);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_span(&mut params, CA_LIFE);
    let certificate = params.self_signed(&key)?;
    Ok(Ca { issuer: Issuer::new(params, key), pem: certificate.pem() })
}

fn open_ca(directory: &Path) -> Result<Ca, MakeError> {
    let file = directory.join(CA_KEY);
    if !file.exists() {
        return Err(MakeError::NoCa(file));
    }
    load::closed(directory, "700")?;
    let pem = load::secret(&file)?;
    let certificate = load::certificates(&file, &pem)?.swap_remove(0);
    let pem = String::from_utf8_lossy(&pem).into_owned();
    let key = KeyPair::from_pem(&pem)?;
    let begins = pem.find("-----BEGIN CERTIFICATE").unwrap_or(0);
    Ok(Ca { issuer: Issuer::from_ca_cert_der(&certificate, key)?, pem: pem[begins..].to_owned() })
}

fn named(name: &str) -> DistinguishedName {
    let mut all = DistinguishedName::new();
    all.push(DnType::CommonName, name);
    all
}

/// A random number, positive and without leading zeros, so that all tools write it alike.
fn serial() -> Result<SerialNumber, MakeError> {
    let mut bytes: [u8; 16] = process::random().map_err(MakeError::Random)?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

/// Says from when on, and until when.
fn set_span(params: &mut CertificateParams, life: Duration) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = date_time_ymd(1970, 1, 1) + Duration::from_secs(now.as_secs());
    (params.not_before, params.not_after) = (now - SKEW, now + life);
}

/// Makes a directory that is whole from the first moment.
fn new_directory(
    place: &Path,
    cas: &str,
    made: &Made,
    ca: Option<(&str, String)>,
) -> Result<Certificate, MakeError> {
    let failed = |path: &Path, source| MakeError::Write { path: path.to_owned(), source };
    if fs::read_dir(place).is_ok_and(|mut files| files.next().is_some()) || place.is_file() {
        return Err(MakeError::Exists(place.to_owned()));
    }
    let parent = place.parent().filter(|it| !it.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let new_parent = fs::create_dir(parent).is_ok();
    let name = place.file_name().unwrap_or_default().to_string_lossy();
    let beside = parent.join(format!(".{name}.new-{}", std::process::id()));
    let fill = || {
        let builder = |path: &Path| {
            fs::DirBuilder::new().mode(0o700).create(path).map_err(|error| failed(place, error))
        };
        builder(&beside)?;
        write(&beside.join(CAS), cas, 0o644)?;
        write(&beside.join(REVOKED), "", 0o600)?;
        write(&beside.join(HOST), &format!("{}{}", made.key, made.certificate), 0o600)?;
        if let Some((file, text)) = &ca {
            write(&beside.join(file), text, 0o600)?;
            note_issued(&beside, made)?;
        }
        fs::rename(&beside, place).map_err(|error| failed(place, error))
    };
    fill().inspect_err(|_| {
        // There is nothing better to do about an error now.
        let _ = fs::remove_dir_all(&beside);
        if new_parent {
            let _ = fs::remove_dir(parent);
        }
    })?;
    Ok(made.about.clone())
}

fn note_issued(directory: &Path, made: &Made) -> Result<(), MakeError> {
    let folder = directory.join(ISSUED);
    match fs::DirBuilder::new().mode(0o700).create(&folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(MakeError::Write { path: folder, source: error });
        }
        _ => {}
    }
    let name = format!("{}-{}.crt", made.about.name, &made.about.serial[..8]);
    write(&folder.join(name), &made.certificate, 0o644)
}

fn text(path: &Path) -> Result<String, MakeError> {
    let read = fs::read_to_string(path);
    read.map_err(|source| LoadError::Read { path: path.to_owned(), source }.into())
}

/// Writes a new file, durably.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), MakeError> {
    let failed = |source| MakeError::Write { path: path.to_owned(), source };
    let file = File::options().write(true).create_new(true).mode(mode).open(path);
    let mut file = file.map_err(failed)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)
}

/// Replaces a file: whoever opens it gets the old one or the new one.
fn replace(path: &Path, text: &str, mode: u32) -> Result<(), MakeError> {
    let new = path.with_extension(format!("new-{}", std::process::id()));
    write(&new, text, mode)?;
    fs::rename(&new, path).map_err(|source| {
        let _ = fs::remove_file(&new);
        MakeError::Write { path: path.to_owned(), source }
    })
}
