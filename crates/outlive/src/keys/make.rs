//! Makes CAs, certificates and directories of keys. An attempt that fails leaves nothing behind; `files.rs` says how.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::certificate::{Certificate, CertificateError};
use super::files::{self, WriteError, new_directory, replace, write};
use super::grant::Grant;
use super::load::{self, LoadError};
use super::revoked::is_serial;
use super::sign::{Ca, Made, new_ca, open_ca};
use super::{CA_KEY, CAS, HOST, ISSUED, REVOKED, REVOKED_HERE, ca};
use crate::ui::shell_word;

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
    /// A CA without keys: `init` was killed, or the keys are lost.
    #[error(
        "{} has a CA's private key, but {} has no keys: if `outlive keys init` was cut off and no host has keys of this CA, \
         remove it (rm -r {}) and try again; otherwise copy ca.crt and revoked of another host there, and `outlive keys \
         issue` makes this host's keys", .ca.display(), .keys.display(), shell_word(.ca)
    )]
    CaAlone {
        /// The directory with the CA.
        ca: PathBuf,
        /// The directory that should have the keys.
        keys: PathBuf,
    },
    /// A process that runs a VM could read them.
    #[error(
        "{} is within {}, where a process that runs a VM may read it, too: name another directory with --to",
        .to.display(), .keys.display()
    )]
    Within {
        /// The new directory.
        to: PathBuf,
        /// The directory of keys that it would be in.
        keys: PathBuf,
    },
    /// Keys that were made before, perhaps for a host that has not got them yet.
    #[error(
        "{} is there already: copy its files to the host, remove it and try again, or name another directory with --to",
        .0.display()
    )]
    NotCopied(PathBuf),
    /// The CA's key is elsewhere.
    #[error(
        "{} is not here: certificates are made where the CA's private key is, with `outlive keys issue`; `outlive keys \
         init` makes a CA, once", .0.display()
    )]
    NoCa(PathBuf),
    /// No certificate can have it.
    #[error(
        "'{0}' cannot be a host's name, or an operator's: use letters, digits, '.' and '-', at most 64, first and last a letter \
         or a digit, no address, and not 16 or more hexadecimal digits alone, which is a serial number"
    )]
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
    /// The CA's key makes certificates that nobody accepts.
    #[error(
        "{cas} does not have the CA whose private key is in {file}, so no host that has it would accept what is made: copy a \
         newer {cas} from another host, or add the CA: sed -n '/BEGIN CERTIFICATE/,$p' {} >> {}",
        shell_word(.file), shell_word(.cas), cas = .cas.display(), file = .file.display()
    )]
    UnknownCa {
        /// The file with the CA's key.
        file: PathBuf,
        /// The CAs that count.
        cas: PathBuf,
    },
    /// The clock is wrong, or was.
    #[error(
        "this host's clock says {now}, and {ca} was made later, at {from}: set the clock, then try again"
    )]
    TooEarly {
        /// What the clock says.
        now: String,
        /// The CA.
        ca: String,
        /// From when on it counts.
        from: String,
    },
    /// The CA is over, or the clock is wrong.
    #[error(
        "this host's clock says {now}, and {ca} has expired at {until}: set the clock if it is wrong, or make a new CA with \
         `outlive keys rotate --ca`"
    )]
    CaOver {
        /// What the clock says.
        now: String,
        /// The CA.
        ca: String,
        /// Until when it counts.
        until: String,
    },
    /// Another command changes the same files.
    #[error("another `outlive keys` has been at work in {} for 5 s: try again when it has ended", .0.display())]
    Busy(PathBuf),
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
    #[error(transparent)]
    Write(#[from] WriteError),
    /// There are no random numbers.
    #[error("the system gives no random numbers: {0}")]
    Random(#[source] io::Error),
}

/// Makes a directory with a CA and the certificate of a host.
///
/// # Errors
/// See [`MakeError`].
pub fn init(directory: &Path, order: &Order) -> Result<Certificate, MakeError> {
    let place = ca::place(directory);
    vacant(directory, MakeError::Exists)?;
    vacant(&place, |ca| MakeError::CaAlone { ca, keys: directory.to_owned() })?;
    check_name(&order.host)?;
    let new_parent = !files::parent(directory).exists();
    let ca = new_ca(&order.host)?;
    let made = ca.make(order)?;
    new_directory(&place, |beside| {
        write(&beside.join(CA_KEY), &ca.whole(), 0o600)?;
        note_issued(beside, &made).map(drop)
    })?;
    let keys = new_directory(directory, |beside| fill(beside, &ca.pem, "", &made));
    keys.inspect_err(|_| {
        // There is nothing better to do about an error now.
        let _ = fs::remove_dir_all(&place);
        if new_parent {
            let _ = fs::remove_dir(files::parent(directory));
        }
    })?;
    Ok(made.about)
}

/// Makes a directory for another host, or for an operator, to be copied there.
///
/// # Errors
/// See [`MakeError`].
pub fn issue(directory: &Path, order: &Order, to: &Path) -> Result<Certificate, MakeError> {
    let _held = hold(directory)?;
    let ca = open_ca(directory)?;
    can_issue(directory, &order.host, to)?;
    // A file without a certificate would be handed out as it is.
    load::cas(directory)?;
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

/// Refuses a name that no certificate can have, and a place for its keys that is taken or that others may read.
pub(super) fn can_issue(directory: &Path, name: &str, to: &Path) -> Result<(), MakeError> {
    check_name(name)?;
    vacant(to, MakeError::NotCopied)?;
    let whole = |it: &Path| fs::canonicalize(it).or_else(|_| std::path::absolute(it)).ok();
    let (place, keys) = (whole(files::parent(to)), whole(directory));
    if place.zip(keys).is_some_and(|(place, keys)| place.starts_with(keys)) {
        return Err(MakeError::Within { to: to.to_owned(), keys: directory.to_owned() });
    }
    Ok(())
}

/// Refuses what cannot be a DNS name and the name of a file, or is taken for a serial number.
fn check_name(name: &str) -> Result<(), MakeError> {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    let ends = |name: &str| name.starts_with(['.', '-']) || name.ends_with(['.', '-']);
    let fits = (1..=64).contains(&name.len()) && name.chars().all(good);
    let is_address = name.parse::<std::net::IpAddr>().is_ok();
    if fits && !ends(name) && !name.contains("..") && !is_serial(name) && !is_address {
        return Ok(());
    }
    // It is told in a line.
    let told: String = outlive_node::shown_in_line(name).chars().take(80).collect();
    Err(MakeError::Name(told))
}

/// Waits for another command at work there.
fn hold(directory: &Path) -> Result<Option<fs::File>, MakeError> {
    files::hold(directory).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => MakeError::Busy(directory.to_owned()),
        _ => LoadError::read(directory, error).into(),
    })
}

/// Refuses a host the name of an operator, and the other way round, while that has a certificate that counts.
fn other_kind(directory: &Path, order: &Order) -> Result<(), MakeError> {
    let is_operators = order.grant.is_operators();
    let taken = |it: &Certificate| it.name == order.host && it.grant.is_operators() != is_operators;
    if !still_counting(directory)?.iter().any(taken) {
        return Ok(());
    }
    let whose = if is_operators { "a host" } else { "an operator" };
    Err(MakeError::NameTaken { name: order.host.clone(), whose })
}

/// This host's certificate, and the CA. A `ca.crt` that lacks the CA has a better remedy here than elsewhere, so it is told
/// before what does not fit because of it.
fn open_both(directory: &Path) -> Result<(Certificate, Ca), MakeError> {
    load::load(directory)?;
    let ca = open_ca(directory)?;
    Ok((load::fitting(directory)?.host, ca))
}

/// Gives this host a new key and certificate, with the rights that it has. The first one of a new CA is given when all
/// other hosts have theirs, because these know that CA; with `force` at once.
///
/// # Errors
/// See [`MakeError`].
pub fn rotate(directory: &Path, life: Duration, force: bool) -> Result<Certificate, MakeError> {
    let _held = hold(directory)?;
    let (old, ca) = open_both(directory)?;
    if old.ca != ca.about()?.name && !force {
        let hosts = hosts_of_old_ca(directory, &ca, &old.name)?;
        if !hosts.is_empty() {
            return Err(MakeError::CaNotCopied { hosts: hosts.join(", "), file: directory.join(CAS) });
        }
    }
    let made = ca.make(&Order { host: old.name, grant: old.grant, life })?;
    let noted = note_issued(&ca::found(directory), &made)?;
    replace(&directory.join(HOST), &format!("{}{}", made.key, made.certificate), 0o600).inspect_err(
        |_| {
            let _ = fs::remove_file(noted);
        },
    )?;
    Ok(made.about)
}

/// Makes a new CA, which certificates are made with from now on. Those of the old ones still count.
///
/// # Errors
/// See [`MakeError`].
pub fn rotate_ca(directory: &Path) -> Result<Certificate, MakeError> {
    let _held = hold(directory)?;
    let (host, _) = open_both(directory)?;
    let ca = new_ca(&host.name)?;
    let old = text(&directory.join(CAS))?;
    let file = ca::found(directory).join(CA_KEY);
    // Before anybody is given a certificate of it.
    replace(&directory.join(CAS), &format!("{}{old}", ca.pem), 0o644)?;
    replace(&file, &ca.whole(), 0o600).inspect_err(|_| {
        // A CA without a key would do no harm.
        let _ = replace(&directory.join(CAS), &old, 0o644);
    })?;
    ca.about()
}

/// From now on only certificates of the newest CA count. Refused while a host has only older ones, unless `force` is
/// given.
///
/// # Errors
/// See [`MakeError`].
pub fn forget_old_cas(directory: &Path, force: bool) -> Result<Certificate, MakeError> {
    let _held = hold(directory)?;
    let (host, ca) = open_both(directory)?;
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
    let (newest, mut all) = (ca.about()?.name, still_counting(directory)?);
    all.retain(|it| it.name != besides);
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
    let _held = hold(directory)?;
    load::closed(directory, "700")?;
    let before = load::revoked(directory)?;
    let made = issued(directory)?;
    let mut serials: Vec<String> =
        made.iter().filter(|it| it.name == who).map(|it| it.serial.clone()).collect();
    // Some programs write a serial number with colons.
    let serial = who.replace(':', "").to_ascii_lowercase();
    if serials.is_empty() && is_serial(&serial) {
        serials.push(serial);
    }
    if serials.is_empty() {
        return Err(MakeError::Unknown(outlive_node::shown_in_line(who).into_owned()));
    }
    let whose = |serial: &String| made.iter().find(|it| it.serial == *serial).map_or(who, |it| &it.name);
    let when = humantime::format_rfc3339_seconds(SystemTime::now());
    let new = serials.iter().filter(|serial| !before.has(serial));
    let all = list(directory)?
        + &new.map(|serial| format!("{serial} {} {when}\n", whose(serial))).collect::<String>();
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
            if files::is_new(&path) {
                continue;
            }
            let pem = text(&path)?;
            all.push(Certificate::of_host(&load::certificates(&path, pem.as_bytes())?[0])?);
        }
    }
    all.sort_by(|one, other| (&one.name, one.from).cmp(&(&other.name, other.from)));
    Ok(all)
}

/// Other certificates of a name that count, and with them the rights that they have.
pub(super) fn earlier(directory: &Path, new: &Certificate) -> Result<Vec<Certificate>, MakeError> {
    let mut all = still_counting(directory)?;
    all.retain(|it| it.name == new.name && it.serial != new.serial);
    Ok(all)
}

/// The certificates that were made here, and are neither over nor revoked.
fn still_counting(directory: &Path) -> Result<Vec<Certificate>, MakeError> {
    let (revoked, mut all, now) = (load::revoked(directory)?, issued(directory)?, SystemTime::now());
    all.retain(|it| !it.left(now).is_zero() && !revoked.has(&it.serial));
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

/// Refuses a place where something is.
fn vacant(place: &Path, taken: impl FnOnce(PathBuf) -> MakeError) -> Result<(), MakeError> {
    let is_taken = match fs::read_dir(place) {
        Ok(mut files) => files.next().is_some(),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Err(LoadError::read(place, error).into());
        }
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    };
    if is_taken { Err(taken(place.to_owned())) } else { Ok(()) }
}

/// Writes the files of a host's keys.
fn fill(directory: &Path, cas: &str, revoked: &str, made: &Made) -> Result<(), MakeError> {
    write(&directory.join(CAS), cas, 0o644)?;
    write(&directory.join(REVOKED), revoked, 0o600)?;
    write(&directory.join(HOST), &format!("{}{}", made.key, made.certificate), 0o600)?;
    Ok(())
}

/// Keeps a certificate that is handed out. Returns its file.
fn note_issued(directory: &Path, made: &Made) -> Result<PathBuf, MakeError> {
    let folder = directory.join(ISSUED);
    match files::private_directory(&folder) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            return Err(WriteError { path: folder, source }.into());
        }
        _ => {}
    }
    let name = format!("{}-{}.crt", made.about.name, &made.about.serial[..8]);
    let file = folder.join(name);
    // A part of a certificate would be in the way of every command.
    replace(&file, &made.certificate, 0o644)?;
    Ok(file)
}

fn text(path: &Path) -> Result<String, MakeError> {
    Ok(String::from_utf8_lossy(&load::read(path)?).into_owned())
}
