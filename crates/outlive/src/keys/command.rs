//! `outlive keys`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::certificate::{Certificate, CertificateError};
use super::load::{self, LoadError, Loaded};
use super::make::{self, MakeError, Order};
use super::{Grant, Right, Vms, ca};
use crate::cli::{AnyAndOne, GrantOptions, KeysCommand, KeysOptions};
use crate::ui::shell_word;
use crate::{exit, process};

/// Why a command of `outlive keys` failed.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    /// The keys cannot be made.
    #[error(transparent)]
    Make(#[from] MakeError),
    /// The keys cannot be used.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Options contradict each other.
    #[error(transparent)]
    Vms(#[from] AnyAndOne),
    /// Two hosts would be one.
    #[error(
        "--issue {0}: another host has this name already, by --host or --issue (see `hostname`): give each host its own"
    )]
    SameName(String),
    /// The first keys are made, and not all the others.
    #[error("{why}; the keys in {} are made, so go on with `outlive keys issue --keys {0} --host {host}`", .keys.display())]
    Issue {
        /// Where the first ones are.
        keys: PathBuf,
        /// Whose are missing.
        host: String,
        /// Why.
        #[source]
        why: Box<CommandError>,
    },
    /// A certificate cannot be read.
    #[error("a CA's certificate cannot be read: {0}")]
    Certificate(#[from] CertificateError),
    /// The result cannot be shown.
    #[error("cannot print: {0}")]
    Print(#[from] io::Error),
}

/// Carries the command out. Returns the exit code.
pub fn command(options: &KeysOptions) -> u8 {
    let mut out = outlive_node::printed();
    let done = match &options.command {
        KeysCommand::Init { directory, host, issue, grant } => {
            init(directory, host.as_deref(), issue, grant, &mut out)
        }
        KeysCommand::Issue { host, keys, to, grant } => issue(keys, host, to.as_deref(), grant, &mut out),
        KeysCommand::Operator { name, keys, to, days } => {
            operator(keys, name, to.as_deref(), days.life(), &mut out)
        }
        KeysCommand::Rotate { keys, ca: true, .. } => rotate_ca(keys, &mut out),
        KeysCommand::Rotate { keys, forget_old_cas: true, force, .. } => {
            forget_old_cas(keys, *force, &mut out)
        }
        KeysCommand::Rotate { keys, force, days, .. } => rotate(keys, days.life(), *force, &mut out),
        KeysCommand::Show { keys, json } => show(keys, *json, &mut out),
        KeysCommand::Revoke { who, keys } => revoke(keys, who, &mut out),
    };
    match done {
        Ok(()) => exit::OK,
        Err(line) => exit::usage(line),
    }
}

/// What the options give a host: both rights to all VMs, unless they choose. An arbiter has no VMs, unless they say so.
fn grant(options: &GrantOptions) -> Result<Grant, AnyAndOne> {
    let chooses = options.send || options.hold || !options.vm.is_empty();
    if options.arbiter && !chooses {
        return Ok(Grant::ARBITER);
    }
    let ids = options.vms()?;
    let vms = if ids.is_empty() { Vms::Any } else { Vms::Only(ids) };
    let both = options.send == options.hold;
    let give = |is: bool| if is || both { vms.clone() } else { Vms::NONE };
    let (send, hold) = (give(options.send), give(options.hold));
    Ok(Grant { send, hold, arbiter: options.arbiter, ..Grant::NONE })
}

fn init(
    place: &Path,
    host: Option<&str>,
    others: &[String],
    about: &GrantOptions,
    out: &mut dyn Write,
) -> Result<(), CommandError> {
    let host = host.map_or_else(process::host_name, str::to_owned);
    let order = Order { host, grant: grant(about)?, life: about.days.life() };
    // All of it before anything is made.
    for (at, other) in others.iter().enumerate() {
        if *other == order.host || others[..at].contains(other) {
            return Err(CommandError::SameName(other.clone()));
        }
        make::can_issue(place, other, &usual_place(other))?;
    }
    let made = make::init(place, &order)?;
    let beside = ca::place(place);
    writeln!(out, "{} has the keys of {}", place.display(), Told(&made))?;
    writeln!(out, "{} has the new CA's private key: whoever has it can be any host", beside.display())?;
    if others.is_empty() {
        writeln!(
            out,
            "for the other host: outlive keys issue --keys {} --host NAME, and copy what it makes",
            shell_word(place)
        )?;
    }
    for other in others {
        issue(place, other, None, about, out).map_err(|why| CommandError::Issue {
            keys: place.to_owned(),
            host: other.clone(),
            why: Box::new(why),
        })?;
    }
    Ok(())
}

/// Where the keys of another host are made if nothing else is said.
fn usual_place(name: &str) -> PathBuf {
    format!("{name}.keys").into()
}

fn issue(
    keys: &Path,
    host: &str,
    to: Option<&Path>,
    about: &GrantOptions,
    out: &mut dyn Write,
) -> Result<(), CommandError> {
    let order = Order { host: host.to_owned(), grant: grant(about)?, life: about.days.life() };
    let usual = usual_place(host);
    let to = to.unwrap_or(&usual);
    let made = make::issue(keys, &order, to)?;
    writeln!(out, "{} has the keys of {}", to.display(), Told(&made))?;
    let to = shell_word(to);
    let there = super::USUAL;
    // The same for the first keys and for new ones: a directory that is there stays, and its files are replaced.
    writeln!(
        out,
        "copy its files and remove it here: ssh root@{host} mkdir -p -m 700 {there} && scp -p {to}/* \
         root@{host}:{there}/ && rm -r {to}"
    )?;
    still_count(keys, &made, out)?;
    who_waits(keys, host, out)
}

/// Says what else the same host or operator may do, and how that ends: a certificate that is replaced still counts. The keys
/// are made: what cannot be looked up now is no failure.
fn still_count(keys: &Path, made: &Certificate, out: &mut dyn Write) -> Result<(), CommandError> {
    let earlier = make::earlier(keys, made).unwrap_or_default();
    if earlier.is_empty() {
        return Ok(());
    }
    let name = &made.name;
    let option = match keys {
        usual if usual == Path::new(super::USUAL) => String::new(),
        keys => format!(" --keys {}", shell_word(keys)),
    };
    writeln!(
        out,
        "earlier certificates of {name} still count, with the rights that they have; once the new one is in use, this ends them:"
    )?;
    for it in earlier {
        writeln!(
            out,
            "  outlive keys revoke {}{option}    # {}, until {}",
            it.serial,
            it.grant,
            day(it.until)
        )?;
    }
    Ok(())
}

/// Says who must have a new CA before keys of it are used. The keys are made: what cannot be looked up now is no failure.
/// This host's own ones come last.
fn who_waits(keys: &Path, besides: &str, out: &mut dyn Write) -> Result<(), CommandError> {
    let own = load::load(keys).map(|loaded| loaded.host.name).unwrap_or_default();
    let mut waiting = make::waiting_for_new_ca(keys, besides).unwrap_or_default();
    waiting.retain(|name| *name != own);
    if !waiting.is_empty() {
        let (names, file) = (waiting.join(", "), keys.join(super::CAS));
        writeln!(out, "these keys are of a new CA: first copy {} to {names}", file.display())?;
    }
    Ok(())
}

fn operator(
    keys: &Path,
    name: &str,
    to: Option<&Path>,
    life: Duration,
    out: &mut dyn Write,
) -> Result<(), CommandError> {
    let order = Order { host: name.to_owned(), grant: Grant::OPERATOR, life };
    let usual = usual_place(name);
    let to = to.unwrap_or(&usual);
    let made = make::issue(keys, &order, to)?;
    writeln!(out, "{} has the keys of operator {}", to.display(), Told(&made))?;
    let to = shell_word(to);
    writeln!(
        out,
        "whoever has them may do everything with the VMs of every host whose node has --listen: move the directory to \
         where only {name} can read it (mode 700, {name}'s own), and there: outlive vm list --host HOST --keys {to}"
    )?;
    still_count(keys, &made, out)?;
    who_waits(keys, name, out)
}

fn rotate_ca(keys: &Path, out: &mut dyn Write) -> Result<(), CommandError> {
    let made = make::rotate_ca(keys)?;
    let (place, file) = (keys.display(), super::CAS);
    writeln!(out, "{place} has a new CA, {}; the old one still counts", made.name)?;
    writeln!(
        out,
        "now copy {place}/{file} to every host; then renew the keys of every other host (outlive keys issue), and at last \
         this host's (outlive keys rotate)"
    )?;
    Ok(())
}

fn forget_old_cas(keys: &Path, force: bool, out: &mut dyn Write) -> Result<(), CommandError> {
    let made = make::forget_old_cas(keys, force)?;
    let (place, file) = (keys.display(), super::CAS);
    writeln!(out, "only certificates of {} count in {place} now; copy {file} to every host", made.name)?;
    Ok(())
}

fn rotate(keys: &Path, life: Duration, force: bool, out: &mut dyn Write) -> Result<(), CommandError> {
    let made = make::rotate(keys, life, force)?;
    let place = keys.display();
    writeln!(out, "{place} has new keys of {}; links that are open go on with the old ones", Told(&made))?;
    Ok(())
}

fn revoke(keys: &Path, who: &str, out: &mut dyn Write) -> Result<(), CommandError> {
    let serials = make::revoke(keys, who)?;
    let file = keys.join(super::REVOKED);
    writeln!(out, "revoked {}: copy {} to every host", serials.join(", "), file.display())?;
    // It is done: what cannot be looked up now is no failure.
    let made = make::issued(keys).unwrap_or_default();
    if !made.is_empty() && !made.iter().any(|it| serials.contains(&it.serial)) {
        writeln!(
            out,
            "no certificate with this serial number was made here: compare it with what `outlive keys show` has"
        )?;
    }
    if let Some(own) = load::load(keys).ok().map(|it| it.host).filter(|it| serials.contains(&it.serial)) {
        let what = if own.grant.is_operators() { "the operator" } else { "this host" };
        writeln!(
            out,
            "this is the certificate of {what} itself, {}: no host accepts it any more; new keys: `outlive keys rotate` where \
             the CA is for that host, `outlive keys issue` or `outlive keys operator` there for others",
            own.name
        )?;
    }
    writeln!(
        out,
        "copy it also into each other directory of keys, as those of VMs that have keys of their own (--keys): where the list \
         is an old one, whoever was revoked is still let in"
    )?;
    writeln!(out, "a link that is open goes on until it ends: restart the standby to end it now")?;
    Ok(())
}

/// A host's certificate in a line.
struct Told<'a>(&'a Certificate);

impl std::fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Certificate { name, grant, serial, until, .. } = self.0;
        write!(f, "{name}: {grant}, until {}, serial {serial}", day(*until))
    }
}

fn day(at: SystemTime) -> String {
    humantime::format_rfc3339_seconds(at).to_string()[..10].to_owned()
}

/// A certificate, as JSON.
#[derive(Debug, Serialize)]
struct Entry {
    name: String,
    serial: String,
    until: String,
    days_left: u64,
    revoked: bool,
    /// Nothing for a CA.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    send: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    hold: Vec<String>,
    /// It may serve an arbiter.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    arbiter: bool,
    /// It may do everything at the API of every host's node.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    operate: bool,
}

impl Entry {
    fn new(about: &Certificate, keys: &Loaded) -> Self {
        let names = |vms: &Vms| match vms {
            Vms::Any => vec!["any".to_owned()],
            Vms::Only(ids) => ids.iter().map(ToString::to_string).collect(),
        };
        Self {
            name: about.name.clone(),
            serial: about.serial.clone(),
            until: humantime::format_rfc3339_seconds(about.until).to_string(),
            days_left: about.left(SystemTime::now()).as_secs() / (24 * 3600),
            revoked: keys.revoked.has(&about.serial),
            send: names(&about.grant.send),
            hold: names(&about.grant.hold),
            arbiter: about.grant.arbiter,
            operate: about.grant.operate,
        }
    }
}

/// What `outlive keys show` says.
#[derive(Debug, Serialize)]
struct Shown {
    host: Entry,
    cas: Vec<Entry>,
    /// Whether certificates can be made here.
    makes_certificates: bool,
    issued: Vec<Entry>,
    revoked: usize,
    warnings: Vec<String>,
}

fn show(keys: &Path, json: bool, out: &mut dyn Write) -> Result<(), CommandError> {
    load::load(keys)?;
    // Where the CA is, its remedy is the better one.
    let own_ca = make::own_ca(keys)?;
    let loaded = load::fitting(keys)?;
    let cas = loaded.cas.iter().map(|ca| Certificate::of_ca(ca)).collect::<Result<Vec<_>, _>>()?;
    let issued = make::issued(keys)?;
    let mut warnings = warnings(&loaded, &cas);
    warnings.extend(ca::misplaced(keys));
    warnings.extend(load::loose(keys));
    if json {
        let shown = Shown {
            host: Entry::new(&loaded.host, &loaded),
            cas: cas.iter().map(|ca| Entry::new(ca, &loaded)).collect(),
            makes_certificates: own_ca.is_some(),
            issued: issued.iter().map(|it| Entry::new(it, &loaded)).collect(),
            revoked: loaded.revoked.len(),
            warnings,
        };
        writeln!(out, "{}", serde_json::to_string(&shown).map_err(io::Error::other)?)?;
        return Ok(());
    }
    let who = if loaded.host.grant.is_operators() { "operator" } else { "host" };
    writeln!(out, "{who:<8} {}", Told(&loaded.host))?;
    for ca in &cas {
        writeln!(out, "CA       {}, until {}", ca.name, day(ca.until))?;
    }
    if let Some(ca) = own_ca {
        writeln!(out, "key of   {}", ca.name)?;
    }
    for it in &issued {
        let revoked = if loaded.revoked.has(&it.serial) { ", REVOKED" } else { "" };
        writeln!(out, "made     {}{revoked}", Told(it))?;
    }
    if !loaded.revoked.is_empty() {
        writeln!(out, "revoked  {}", loaded.revoked.len())?;
    }
    for warning in warnings {
        writeln!(out, "WARNING  {warning}")?;
    }
    Ok(())
}

fn warnings(keys: &Loaded, cas: &[Certificate]) -> Vec<String> {
    let now = SystemTime::now();
    let mut all: Vec<String> = [&keys.host]
        .into_iter()
        .chain(cas)
        .filter_map(|it| it.too_early(now).or_else(|| it.complaint(now)))
        .collect();
    if keys.revoked.has(&keys.host.serial) {
        all.push(format!("the certificate here, of {}, is revoked", keys.host.name));
    }
    // An arbiter and an operator need neither.
    let needs = !keys.host.grant.arbiter && !keys.host.grant.is_operators();
    let rights = [Right::Send, Right::Hold].into_iter().filter(|_| needs);
    for right in rights {
        let vms = if right == Right::Send { &keys.host.grant.send } else { &keys.host.grant.hold };
        if *vms == Vms::NONE {
            all.push(format!("this host may {right} no VM: it can be one side of a pair only"));
        }
    }
    all
}
