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

use super::certificate::{Certificate, CertificateError};
use super::grant::Grant;
use super::load::{self, LoadError};
use super::revoked::is_serial;
use super::{CA_KEY, CAS, HOST, ISSUED, REVOKED, REVOKED_HERE, ca};
use crate::process;

/// How long a CA counts.
const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How long before its making a certificate counts: clocks of hosts differ.
const SKEW: Duration = Duration::from_secs(3600);

/// What is to be made for a host, or for an operator.
#[derive(Clone, Debug)]
pub struct Order {
    /// Its name.
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
    #[error("{} is there already: `outlive keys rotate` renews this host's keys; or name a new directory", .0.display())]
    Exists(PathBuf),
    /// Keys that were made before, perhaps for a host that has not got them yet.
    #[error(
        "{} is there already: copy its files to the host, remove it and try again, or name another directory with --to",
        .0.display()
    )]
    NotCopied(PathBuf),
    /// The CA's key is elsewhere.
    #[error("{} is not here: certificates are made where the CA's private key is, with `outlive keys issue`", .0.display())]
    NoCa(PathBuf),
    /// No certificate can have it.
    #[error("'{0}' cannot be a host's name, or an operator's: use letters, digits, '.' and '-'")]
    Name(String),
    /// One name would mean two things in logs, and for `revoke`.
    #[error(
        "{name} is the name of {whose} already, whose certificate counts: take another name, or `outlive keys revoke {name}` first"
    )]
    NameTaken {
        /// The name.
        name: String,
        /// Of what.
        whose: &'static str,
    },
    /// Nothing is known by that name.
    #[error(
        "no certificate of '{0}' was made here: give its serial number, which `outlive keys show` on its host has"
    )]
    Unknown(String),
    /// The new CA has signed nothing yet.
    #[error("{} counts under an old CA: `outlive keys rotate` first, here and on every host", .0.display())]
    StillOld(PathBuf),
    /// Hosts would be shut out.
    #[error(
        "{hosts}: certificates of an old CA, which would count no longer: make new keys with `outlive keys issue --host \
         NAME` (for an operator `outlive keys operator NAME`) and copy them there, or `outlive keys revoke NAME` for one \
         that is gone; --force does it all the same"
    )]
    HostsOfOldCa {
        /// Their names.
        hosts: String,
    },
    /// Hosts would not know this one.
    #[error(
        "{hosts}: certificates of an old CA only, so perhaps not yet the new {}, without which this host's new key is \
         refused there: make new keys for them first with `outlive keys issue --host NAME` (for an operator \
         `outlive keys operator NAME`) and copy them there; --force if they all have the file", .file.display()
    )]
    CaNotCopied {
        /// Their names.
        hosts: String,
        /// The new CAs.
        file: PathBuf,
    },
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
    let place = ca::place(directory);
    for place in [directory, &place] {
        vacant(place, MakeError::Exists)?;
    }
    let ca = new_ca(&order.host)?;
    let made = ca.make(order)?;
    new_directory(&place, |beside| {
        write(&beside.join(CA_KEY), &format!("{}{}", ca.issuer.key().serialize_pem(), ca.pem), 0o600)?;
        note_issued(beside, &made).map(drop)
    })?;
    let keys = new_directory(directory, |beside| fill(beside, &ca.pem, "", &made));
    keys.inspect_err(|_| {
        // There is nothing better to do about an error now.
        let _ = fs::remove_dir_all(&place);
    })?;
    Ok(made.about)
}

/// Makes a directory for another host, or for an operator, to be copied there.
///
/// # Errors
/// See [`MakeError`].
pub fn issue(directory: &Path, order: &Order, to: &Path) -> Result<Certificate, MakeError> {
    let ca = open_ca(directory)?;
    vacant(to, MakeError::NotCopied)?;
    let cas = text(&directory.join(CAS))?;
    // A host that cannot refuse what was revoked before would accept it.
    let revoked = list(directory)?;
    other_kind(directory, order)?;
    let made = ca.make(order)?;
    // First: one that is handed out and not known here could not be revoked by its host's name.
    let noted = note_issued(&ca::found(directory), &made)?;
    new_directory(to, |beside| fill(beside, &cas, &revoked, &made)).inspect_err(|_| {
        let _ = fs::remove_file(noted);
    })?;
    Ok(made.about)
}

/// Refuses a host the name of an operator, and the other way round, while that has a certificate that counts.
fn other_kind(directory: &Path, order: &Order) -> Result<(), MakeError> {
    let (now, is_operators) = (SystemTime::now(), order.grant.is_operators());
    let (revoked, all) = (load::revoked(directory)?, issued(directory)?);
    let counts = |it: &Certificate| !it.left(now).is_zero() && !revoked.has(&it.serial);
    let taken = |it: &Certificate| it.name == order.host && it.grant.is_operators() != is_operators;
    if !all.iter().any(|it| taken(it) && counts(it)) {
        return Ok(());
    }
    let whose = if is_operators { "a host" } else { "an operator" };
    Err(MakeError::NameTaken { name: order.host.clone(), whose })
}

/// Gives this host a new key and certificate, with the rights that it has. The first one of a new CA is given when all
/// other hosts have theirs, because these know that CA; with `force` at once.
///
/// # Errors
/// See [`MakeError`].
pub fn rotate(directory: &Path, life: Duration, force: bool) -> Result<Certificate, MakeError> {
    let old = load::load(directory)?.host;
    let ca = open_ca(directory)?;
    if old.ca != ca.about()?.name && !force {
        let hosts = hosts_of_old_ca(directory, &ca, &old.name)?;
        if !hosts.is_empty() {
            return Err(MakeError::CaNotCopied { hosts: hosts.join(", "), file: directory.join(CAS) });
        }
    }
    let made = ca.make(&Order { host: old.name, grant: old.grant, life })?;
    note_issued(&ca::found(directory), &made)?;
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
    let file = ca::found(directory).join(CA_KEY);
    // Before anybody is given a certificate of it.
    replace(&directory.join(CAS), &format!("{}{old}", ca.pem), 0o644)?;
    replace(&file, &format!("{}{}", ca.issuer.key().serialize_pem(), ca.pem), 0o600)?;
    ca.about()
}

/// From now on only certificates of the newest CA count. Refused while a host has only older ones, unless `force` is
/// given.
///
/// # Errors
/// See [`MakeError`].
pub fn forget_old_cas(directory: &Path, force: bool) -> Result<Certificate, MakeError> {
    let host = load::load(directory)?.host;
    let ca = open_ca(directory)?;
    let about = ca.about()?;
    if host.ca != about.name {
        return Err(MakeError::StillOld(directory.join(HOST)));
    }
    let hosts = hosts_of_old_ca(directory, &ca, &host.name)?;
    if !hosts.is_empty() && !force {
        return Err(MakeError::HostsOfOldCa { hosts: hosts.join(", ") });
    }
    replace(&directory.join(CAS), &ca.pem, 0o644)?;
    Ok(about)
}

/// The other hosts that have a certificate that counts, and none of the newest CA.
pub(super) fn waiting_for_new_ca(directory: &Path, besides: &str) -> Result<Vec<String>, MakeError> {
    hosts_of_old_ca(directory, &open_ca(directory)?, besides)
}

fn hosts_of_old_ca(directory: &Path, ca: &Ca, besides: &str) -> Result<Vec<String>, MakeError> {
    let (newest, now) = (ca.about()?.name, SystemTime::now());
    let (revoked, mut all) = (load::revoked(directory)?, issued(directory)?);
    all.retain(|it| it.name != besides && !it.left(now).is_zero() && !revoked.has(&it.serial));
    let (new, mut old): (Vec<_>, Vec<_>) = all.into_iter().partition(|it| it.ca == newest);
    old.retain(|it| new.iter().all(|new| new.name != it.name));
    old.dedup_by(|one, other| one.name == other.name);
    Ok(old.into_iter().map(|it| it.name).collect())
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
    let when = humantime::format_rfc3339_seconds(SystemTime::now());
    let new = serials.iter().filter(|serial| !before.has(serial));
    let all = list(directory)? + &new.map(|serial| format!("{serial} {who} {when}\n")).collect::<String>();
    // All of it in both: a list that is copied from another host replaces the second one, and may have less.
    for file in [REVOKED_HERE, REVOKED] {
        replace(&directory.join(file), &all, 0o600)?;
    }
    Ok(serials)
}

/// What a directory has revoked, as a list.
fn list(directory: &Path) -> Result<String, MakeError> {
    load::revoked(directory)?;
    let here = directory.join(REVOKED_HERE);
    let mut all = text(&directory.join(REVOKED))?;
    if !all.is_empty() && !all.ends_with('\n') {
        all.push('\n');
    }
    let more = if here.exists() { text(&here)? } else { String::new() };
    let missing: String = more
        .lines()
        .filter(|line| !all.lines().any(|it| it == *line))
        .map(|line| format!("{line}\n"))
        .collect();
    Ok(all + &missing)
}

/// The certificates that were made here.
pub(super) fn issued(directory: &Path) -> Result<Vec<Certificate>, MakeError> {
    let mut all = Vec::new();
    // Those of release 0.2.0 are among the keys.
    for folder in [ca::place(directory).join(ISSUED), directory.join(ISSUED)] {
        let Ok(files) = fs::read_dir(folder) else { continue };
        for file in files.flatten() {
            let path = file.path();
            let pem = text(&path)?;
            all.push(Certificate::of_host(&load::certificates(&path, pem.as_bytes())?[0])?);
        }
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
        // A host is a server where it waits and a client where it has the VM. Nothing answers with an operator's.
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if !order.grant.is_operators() {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
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
    let place = ca::found(directory);
    let file = place.join(CA_KEY);
    if !ca::may_be_at(&file) {
        return Err(MakeError::NoCa(file));
    }
    load::closed(&place, "700")?;
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

/// Refuses a place where something is.
fn vacant(place: &Path, taken: fn(PathBuf) -> MakeError) -> Result<(), MakeError> {
    let is_taken = match fs::read_dir(place) {
        Ok(mut files) => files.next().is_some(),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Err(LoadError::read(place, error).into());
        }
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    };
    if is_taken { Err(taken(place.to_owned())) } else { Ok(()) }
}

/// Makes a directory that is whole from the first moment.
fn new_directory(place: &Path, fill: impl FnOnce(&Path) -> Result<(), MakeError>) -> Result<(), MakeError> {
    let failed = |source| MakeError::Write { path: place.to_owned(), source };
    let parent = place.parent().filter(|it| !it.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let new_parent = fs::create_dir(parent).is_ok();
    let name = place.file_name().unwrap_or_default().to_string_lossy();
    let beside = parent.join(format!(".{name}.new-{}", std::process::id()));
    let make = || {
        fs::DirBuilder::new().mode(0o700).create(&beside).map_err(failed)?;
        fill(&beside)?;
        fs::rename(&beside, place).map_err(failed)
    };
    make().inspect_err(|_| {
        // There is nothing better to do about an error now.
        let _ = fs::remove_dir_all(&beside);
        if new_parent {
            let _ = fs::remove_dir(parent);
        }
    })
}

/// Writes the files of a host's keys.
fn fill(directory: &Path, cas: &str, revoked: &str, made: &Made) -> Result<(), MakeError> {
    write(&directory.join(CAS), cas, 0o644)?;
    write(&directory.join(REVOKED), revoked, 0o600)?;
    write(&directory.join(HOST), &format!("{}{}", made.key, made.certificate), 0o600)
}

/// Keeps a certificate that is handed out. Returns its file.
fn note_issued(directory: &Path, made: &Made) -> Result<PathBuf, MakeError> {
    let folder = directory.join(ISSUED);
    match fs::DirBuilder::new().mode(0o700).create(&folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(MakeError::Write { path: folder, source: error });
        }
        _ => {}
    }
    let name = format!("{}-{}.crt", made.about.name, &made.about.serial[..8]);
    let file = folder.join(name);
    write(&file, &made.certificate, 0o644)?;
    Ok(file)
}

fn text(path: &Path) -> Result<String, MakeError> {
    Ok(String::from_utf8_lossy(&load::read(path)?).into_owned())
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
