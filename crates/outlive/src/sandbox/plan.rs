//! What a process needs, from its command line.

use std::path::{Path, PathBuf};

use nix::unistd::User;

use super::places::Places;
use super::privileges::find_user;
use super::steward::{AllowedVlan, Charter};
use super::{Mode, PrivilegeError};
use crate::cli::{ActiveOptions, ConsoleSpec, NetSpec, RewindOptions, RunOptions, StandbyOptions};
use crate::link::Security;
use crate::rewind::Folder;
use crate::{arbiter, disk, keys, status};

/// What a process needs once it is confined.
pub(crate) struct Plan {
    pub(super) mode: Mode,
    pub(super) user: Option<User>,
    pub(super) places: Places,
    pub(super) charter: Charter,
    /// Its keys, where it has a user of its own because the guest is not trusted.
    pub(super) exposed_keys: Option<PathBuf>,
    /// Whether all of its memory is to be locked.
    pub(super) lock_memory: bool,
}

impl Plan {
    /// Of `outlive run`. Makes directories and files that a rule needs; with the sandbox off, nothing.
    ///
    /// # Errors
    /// The user that is named.
    pub(crate) fn of_run(options: &RunOptions) -> Result<Self, PrivilegeError> {
        let mut plan = Self::of(&options.active, options.net.as_ref(), options.arbiter.as_deref())?;
        if let Some(net) = &options.net {
            plan.charter.vlan = AllowedVlan::Only(net.vlan);
        }
        if plan.mode == Mode::Off {
            return Ok(plan);
        }
        options.kernel.iter().chain(&options.initrd).for_each(|file| plan.places.read(file));
        for disk in &options.disks {
            plan.places.image(&disk.path, disk.readonly, Path::new(disk::STATE_DIR));
        }
        Ok(plan)
    }

    /// Of `outlive standby`; likewise.
    ///
    /// # Errors
    /// The user that is named.
    pub(crate) fn of_standby(options: &StandbyOptions) -> Result<Self, PrivilegeError> {
        let mut plan = Self::of(&options.active, options.net.as_ref(), Some(&options.arbiter))?;
        if plan.mode == Mode::Off {
            return Ok(plan);
        }
        for disk in &options.disks {
            plan.places.image(&disk.path, false, Path::new(disk::STATE_DIR));
        }
        Ok(plan)
    }

    /// Of `outlive rewind`, whose VM has its disks in this folder; likewise.
    ///
    /// # Errors
    /// The user that is named.
    pub(crate) fn of_rewind(
        options: &RewindOptions,
        active: &ActiveOptions,
        folder: &Folder,
    ) -> Result<Self, PrivilegeError> {
        let mut plan = Self::of(active, options.net.as_ref(), None)?;
        if let Some(net) = &options.net {
            plan.charter.vlan = AllowedVlan::Only(net.vlan);
        }
        if plan.mode != Mode::Off {
            plan.places.read(&options.record);
            plan.places.folder(folder.path(), folder.is_new());
        }
        Ok(plan)
    }

    fn of(
        active: &ActiveOptions,
        net: Option<&NetSpec>,
        arbiter: Option<&str>,
    ) -> Result<Self, PrivilegeError> {
        if active.user.is_some() && active.sandbox == Mode::Off {
            return Err(PrivilegeError::Off);
        }
        let user = active.user.as_deref().map(find_user).transpose()?;
        let charter = Charter {
            card: net.map(|net| (net.tap.clone(), net.bridge.clone())),
            vlan: AllowedVlan::Any,
            fence: active.fence().map(|fence| (fence.command, fence.limit)),
        };
        let (mode, lock_memory) = (active.sandbox, active.lock_memory);
        let exposed_keys = match active.security() {
            Security::Keys(directory) if user.is_some() => Some(directory.to_path_buf()),
            _ => None,
        };
        let places = Places::of(user.clone());
        let mut plan = Self { mode, places, user, charter, exposed_keys, lock_memory };
        if plan.mode != Mode::Off {
            plan.add(active, arbiter);
        }
        Ok(plan)
    }

    fn add(&mut self, active: &ActiveOptions, arbiter: Option<&str>) {
        let places = &mut self.places;
        places.device("/dev/kvm");
        places.guard(Path::new(keys::USUAL));
        if let Security::Keys(directory) = active.security() {
            places.guard(&directory);
            places.read(directory);
        }
        let needs = arbiter.map(arbiter::needs).unwrap_or_default();
        // Its own keys among them, if it has some.
        needs.read.iter().for_each(|place| places.guard(place));
        needs.kept.into_iter().for_each(|directory| places.keep(directory));
        needs.read.into_iter().for_each(|file| places.read(file));
        needs.renewed.iter().for_each(|file| places.renewed(file));
        if let Some(events) = active.events.as_deref().filter(|it| it.as_os_str() != "-") {
            places.append(events, active.events_max.is_some());
        }
        if let Some(record) = &active.record {
            places.record(&record.directory);
        }
        if let Some(ConsoleSpec::Directory(directory)) = &active.console {
            places.sockets(directory);
        }
        match &active.status {
            Some(path) => places.sockets(match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            }),
            None => {
                // The first one may be somebody else's. Of the others none is made.
                let mut found = false;
                for folder in status::folders() {
                    if !found || folder.is_dir() {
                        places.sockets(&folder);
                    }
                    found |= folder.is_dir();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};
    use crate::keys::{Grant, Order};

    /// A process whose keys are in `directory`, with the CA beside them.
    fn plan(directory: &Path, options: &[&str]) -> Plan {
        let (keys, socket) = (directory.join("keys"), directory.join("run/a.sock"));
        let own = ["--keys", keys.to_str().unwrap(), "--status", socket.to_str().unwrap()];
        let cli = Cli::try_parse_from(["outlive", "run"].iter().chain(&own).chain(options)).unwrap();
        let Command::Run(options) = cli.command else { unreachable!() };
        Plan::of_run(&options).unwrap()
    }

    #[test]
    fn the_card_of_a_run_stays_in_its_vlan() {
        let directory = tempfile::tempdir().unwrap();
        let of = |net: &str| plan(directory.path(), &["--net", net]).charter.vlan;
        assert_eq!(of("tap=vm0,bridge=br0,vlan=10"), AllowedVlan::Only(Some(10)));
        assert_eq!(of("tap=vm0,bridge=br0"), AllowedVlan::Only(None));
    }

    #[test]
    fn no_plan_reaches_the_key_of_the_ca() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let order = Order { host: "a".into(), grant: Grant::ALL, life: Duration::from_secs(60) };
        keys::init(&path("keys"), &order).unwrap();
        ["etcd-ca.pem", "web.img", "events"].into_iter().for_each(|it| fs::write(path(it), "").unwrap());
        let text = |name: &str| path(name).display().to_string();
        let arbiter = format!("etcd:https://10.0.0.1:2379?ca={}", text("etcd-ca.pem"));
        for beside in
            [&["--arbiter", &arbiter][..], &["--events", &text("events")], &["--kernel", &text("web.img")]]
        {
            let plan = plan(directory.path(), beside);
            plan.places.check_secrets().unwrap();
            assert!(plan.places.all().any(|(place, _)| beside[1].ends_with(place.to_str().unwrap())));
        }
        for around in [
            &["--disk", &format!("path={}", text("web.img"))][..],
            &["--events", &text("events"), "--events-max", "1M"],
            &["--console", &text("")],
            &["--arbiter", &format!("file:{}", text(""))],
        ] {
            let refused = plan(directory.path(), around).places.check_secrets();
            assert!(
                refused.is_err_and(|why| why.to_string().contains("keys-ca/ca.pem is below it")),
                "{around:?}"
            );
        }
    }
}
