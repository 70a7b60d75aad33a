//! What a node is told of a definition before anything is started: what `outlive run` would refuse, and what this host
//! lacks for it. The options are read by the command's own parsers.

use std::path::Path;

use clap::parser::ValueSource;
use clap::{ArgMatches, FromArgMatches};
use outlive_node::{Remark, Sense};

use super::RunOptions;
use super::sense::SenseError;
use super::values::NetSpec;
use crate::link::Security;
use crate::network::UplinkSpec;
use crate::sandbox::{self, Mode, PrivilegeError};
use crate::vm::Remedied;
use crate::{arbiter, link};

/// Where the kernel shows the host's interfaces.
const INTERFACES: &str = "/sys/class/net";

/// Judges options that were read.
pub(super) fn judge(matches: &ArgMatches) -> Sense {
    let options = match RunOptions::from_arg_matches(matches) {
        Ok(options) => options,
        Err(error) => {
            return Sense {
                wrong: Some(Remark::new("", outlive_node::one_line(&error))),
                ..Sense::default()
            };
        }
    };
    let mut sense = Sense { wrong: wrong(&options), warnings: missing(&options) };
    match options.make_sense() {
        Ok(()) => {}
        Err(why) if may_change(&why) => sense.warnings.push(Remark::new("disk", why)),
        Err(why) => sense.wrong = sense.wrong.or(Some(Remark::new(key_of(&why), why))),
    }
    let has_guest = options.kernel.is_some() || options.boot.is_some();
    if !has_guest && matches.value_source("ip") != Some(ValueSource::CommandLine) {
        sense.warnings.push(Remark::new(
            "ip",
            "neither boot nor kernel is given, so this VM is the built-in guest, a Redis server: give one of them for a guest \
             of your own, or ip if the built-in one is meant",
        ));
    }
    sense
}

/// What no host would start.
fn wrong(options: &RunOptions) -> Option<Remark> {
    if let Err(why) = outlive_machine::ranges(options.memory_bytes()) {
        return Some(Remark::new("memory", Remedied(why)));
    }
    if let Some(Err(why)) = options.arbiter.as_deref().map(arbiter::read) {
        return Some(Remark::new("arbiter", why));
    }
    let active = &options.active;
    if active.user.is_some() && active.sandbox == Mode::Off {
        return Some(Remark::new("user", PrivilegeError::Off));
    }
    match &active.uplink {
        UplinkSpec::Named(name) if options.net.is_none() => {
            Some(Remark::new("uplink", format!("{name} makes no sense without net: leave it out")))
        }
        _ => None,
    }
}

/// What this host lacks, and may have by the time of the start.
fn missing(options: &RunOptions) -> Vec<Remark> {
    let mut missing = Vec::new();
    for (key, path) in [("kernel", &options.kernel), ("initrd", &options.initrd)] {
        missing.extend(path.as_deref().and_then(|path| no_file(key, path)));
    }
    missing.extend(options.disks.iter().filter_map(|disk| no_file("disk", &disk.path)));
    let active = &options.active;
    let folder = active.events.as_deref().and_then(Path::parent);
    if let Some(folder) = folder.filter(|it| !it.is_dir()) {
        missing.push(Remark::new("events", format!("there is no directory {}: make it", folder.display())));
    }
    let has_links = options.listen.is_some() || !active.standbys.is_empty();
    if let Security::Keys(directory) = active.security()
        && has_links
        && let Err(why) = link::usable(&directory)
    {
        missing.push(Remark::new("keys", why));
    }
    if let Some(Err(why @ PrivilegeError::NoUser(_))) = active.user.as_deref().map(sandbox::find_user) {
        missing.push(Remark::new("user", why));
    }
    missing.extend(options.net.as_ref().and_then(no_bridge));
    if let UplinkSpec::Named(name) = &active.uplink
        && !Path::new(INTERFACES).join(name).exists()
    {
        missing.push(Remark::new(
            "uplink",
            format!("there is no interface {name} on this host: give another one"),
        ));
    }
    missing
}

fn no_file(key: &'static str, path: &Path) -> Option<Remark> {
    let path_shown = path.display();
    // Whoever may not look is told so by the start.
    let is_missing = path.try_exists().is_ok_and(|it| !it);
    is_missing
        .then(|| Remark::new(key, format!("there is no file {path_shown}: the VM does not start without it")))
}

fn no_bridge(net: &NetSpec) -> Option<Remark> {
    let name = net.bridge.as_deref()?;
    let interface = Path::new(INTERFACES).join(name);
    if interface.join("bridge").exists() {
        return None;
    }
    Some(Remark::new(
        "net",
        if interface.exists() {
            format!("{name} is no bridge: give bridge= another name")
        } else {
            format!(
                "there is no bridge {name}: make it with `ip link add {name} type bridge` and `ip link set {name} up`"
            )
        },
    ))
}

/// Whether it is about files, which may be others by the time of the start.
fn may_change(why: &SenseError) -> bool {
    matches!(
        why,
        SenseError::PartOfSector { .. }
            | SenseError::NoDisk { .. }
            | SenseError::NotRaw(_)
            | SenseError::NoFolder(_)
            | SenseError::NotAnImage(_)
    )
}

fn key_of(why: &SenseError) -> &'static str {
    match why {
        SenseError::SameStandby(_) | SenseError::NoOtherHost => "standby",
        SenseError::NoUplink => "uplink-timeout",
        SenseError::FenceWithoutArbiter | SenseError::FenceWithoutPart => "fence",
        SenseError::SameImage(_) => "disk",
        SenseError::NoBootDisk(..) => "boot",
        _ => "",
    }
}
