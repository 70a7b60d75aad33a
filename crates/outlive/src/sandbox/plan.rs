//! What a process needs, from its command line.

use std::path::Path;

use nix::unistd::User;

use super::places::Places;
use super::privileges::find_user;
use super::steward::Charter;
use super::{Mode, PrivilegeError};
use crate::cli::{ActiveOptions, ConsoleSpec, NetSpec, RunOptions, StandbyOptions};
use crate::link::Security;
use crate::{arbiter, disk, status};

/// What a process needs once it is confined.
pub(crate) struct Plan {
    pub(super) mode: Mode,
    pub(super) user: Option<User>,
    pub(super) places: Places,
    pub(super) charter: Charter,
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
            fence: active.fence().map(|fence| (fence.command, fence.limit)),
        };
        let (mode, lock_memory) = (active.sandbox, active.lock_memory);
        let mut plan = Self { mode, places: Places::of(user.clone()), user, charter, lock_memory };
        if plan.mode != Mode::Off {
            plan.add(active, arbiter);
        }
        Ok(plan)
    }

    fn add(&mut self, active: &ActiveOptions, arbiter: Option<&str>) {
        let places = &mut self.places;
        places.device("/dev/kvm");
        if let Security::Keys(directory) = active.security() {
            places.read(directory);
        }
        let needs = arbiter.map(arbiter::needs).unwrap_or_default();
        needs.kept.into_iter().for_each(|directory| places.keep(directory));
        needs.read.into_iter().for_each(|file| places.read(file));
        if let Some(events) = active.events.as_deref().filter(|it| it.as_os_str() != "-") {
            places.append(events, active.events_max.is_some());
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
