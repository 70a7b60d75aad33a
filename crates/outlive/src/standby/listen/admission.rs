//! How far an introduction is believed.
//!
//! A certificate names VMs by their ids. Everything else in an introduction is chosen by the host that sends it: the
//! VM's name, its ancestors, and what its disks are. A host whose certificate allows every VM may send any of them
//! anyway. Of a host with a right to some VMs nothing is believed that would give it another VM's standby or image.

use std::path::PathBuf;

use outlive_epoch::{DeviceInfo, DeviceKind, Hello, Lineage, VmId};

use crate::cli::{DiskUse, StandbyDisk, StandbyOptions};
use crate::disk::{OverwriteError, Target};
use crate::keys::{Certificate, Right, Vms};

/// Why a host gets no image here. The words go to that host, so they do not say which other VM an image is of; and they
/// are short, so that the remedy arrives.
#[derive(Debug, thiserror::Error)]
pub(in crate::standby) enum Overreach {
    /// An image is another VM's.
    #[error(
        "{} is the image of a VM that host {host} may not send: give VM {vm} its own, or the host a certificate for \
         both (`outlive keys issue`, --vm for each)",
        .image.display()
    )]
    Image { image: PathBuf, host: String, vm: VmId },
    /// Only the primary says that a disk is its VM's.
    #[error(
        "host {host} says that its VM shares the disk {}, but nothing beside the disk says so: wait for it with \
         `outlive standby --vm {vm}`",
        .image.display()
    )]
    Shared { image: PathBuf, host: String, vm: VmId },
    /// What the disk is to the VM is another thing to this host's operator.
    #[error(
        "this host was started with the disk {} {here}, and the primary says that it is {there}: give both hosts the same \
         --disk options",
        .image.display()
    )]
    Otherwise { image: PathBuf, here: &'static str, there: &'static str },
    /// The card's VLAN is another one to this host's operator.
    #[error(
        "this host was started with {here} in --net, and the primary's card is in {there}: give both hosts the same VLAN"
    )]
    Vlan { here: String, there: String },
    /// Nobody can say whose an image is.
    #[error(transparent)]
    Unknown(#[from] OverwriteError),
}

/// Whether a standby that is kept for this VM, by its id or its name, is kept for the one that is introduced. An id is
/// compared with ids alone: whoever starts a VM chooses its name. What `was_run` has the VM's name, whatever it looks like.
pub(super) fn is_kept_for(served: &str, was_run: bool, name: &str, vm: VmId) -> bool {
    match served.parse::<VmId>() {
        Ok(id) if !was_run => id == vm,
        _ => served == name,
    }
}

/// The ancestors that a host with this certificate may name: those that it may send. Without a certificate the link is
/// open, and nobody is told from anybody.
pub(super) fn believed(lineage: &Lineage, sender: Option<&Certificate>) -> Lineage {
    let may_name = |vm: &VmId| sender.is_none_or(|host| host.grant.allows(Right::Send, vm));
    Lineage::new(lineage.ancestors().iter().filter(|ancestor| may_name(&ancestor.vm)).copied())
}

/// Whether the primary's disks are what this host's operator has said, if one has.
///
/// # Errors
/// [`Overreach::Otherwise`].
pub(super) fn are_as_said<'d>(
    mut disks: impl Iterator<Item = (&'d DeviceInfo, &'d StandbyDisk)>,
) -> Result<(), Overreach> {
    disks.try_for_each(|(info, disk)| {
        let Some(here) = disk.said else { return Ok(()) };
        let there = DiskUse { readonly: info.flags.read_only, shared: info.flags.shared };
        if here == there {
            return Ok(());
        }
        let image = disk.path.clone();
        Err(Overreach::Otherwise { image, here: words(here), there: words(there) })
    })
}

/// Whether the card is in the VLAN that this host's operator has said, if one has.
///
/// # Errors
/// [`Overreach::Vlan`].
pub(super) fn is_wired_as_said(hello: &Hello, standby: &StandbyOptions) -> Result<(), Overreach> {
    let Some(here) = standby.net.as_ref().filter(|_| standby.was_run).map(|net| net.vlan) else {
        return Ok(());
    };
    let card = hello.devices.iter().find(|device| device.kind == DeviceKind::Net);
    match card.map(|card| card.wiring.vlan) {
        Some(there) if there != here => {
            let words =
                |vlan: Option<u16>| vlan.map_or_else(|| "no VLAN".into(), |vlan| format!("VLAN {vlan}"));
            Err(Overreach::Vlan { here: words(here), there: words(there) })
        }
        _ => Ok(()),
    }
}

fn words(of: DiskUse) -> &'static str {
    match (of.shared, of.readonly) {
        (false, false) => "of the VM's own",
        (true, false) => "shared",
        (false, true) => "readonly",
        (true, true) => "shared and readonly",
    }
}

/// A VM that a host introduces whose certificate allows some VMs only.
pub(super) struct Restricted<'a> {
    host: &'a Certificate,
    vm: VmId,
    /// Whether an operator has named the VM by its id here.
    is_expected: bool,
    /// Whether a VM has run here before, which [`continues`](Self::continues) compares this one with.
    has_run: bool,
}

impl<'a> Restricted<'a> {
    /// `None` if the host may send every VM, or is not known.
    pub(super) fn of(sender: Option<&'a Certificate>, vm: VmId, standby: &StandbyOptions) -> Option<Self> {
        let host = sender.filter(|host| host.grant.send != Vms::Any)?;
        let is_named = !standby.was_run && standby.vm.as_ref().is_some_and(|it| it.parse() == Ok(vm));
        let is_expected = is_named || standby.known == Some(vm);
        Some(Self { host, vm, is_expected, has_run: standby.known.is_some() })
    }

    /// Whether this may be the VM that ran here before, or one that has come from it. Its name is no proof.
    pub(super) fn continues(&self, known: Option<VmId>, believed: &Lineage) -> bool {
        known.is_none_or(|known| {
            self.vm == known || believed.ancestors().iter().any(|ancestor| ancestor.vm == known)
        })
    }

    /// Whether these images may be the VM's disks, as far as that depends on whose they are.
    ///
    /// # Errors
    /// See [`Overreach`].
    pub(super) fn may_have<'d>(
        &self,
        mut disks: impl Iterator<Item = (&'d DeviceInfo, &'d StandbyDisk)>,
    ) -> Result<(), Overreach> {
        disks.try_for_each(|(info, disk)| self.may_have_one(info, disk))
    }

    /// What kind of disk it is, is the host's word. So the files beside the image count for each kind.
    fn may_have_one(&self, info: &DeviceInfo, disk: &StandbyDisk) -> Result<(), Overreach> {
        let is_replaced = !info.flags.shared && !info.flags.read_only;
        if is_replaced && disk.overwrite {
            return Ok(());
        }
        let owners = Target::owners(&disk.path, is_replaced)?;
        let (image, host, vm) = (disk.path.clone(), self.host.name.clone(), self.vm);
        if !owners.iter().all(|owner| self.host.grant.allows(Right::Send, owner)) {
            return Err(Overreach::Image { image, host, vm });
        }
        // A disk that is shared for reading has no note.
        let is_written = info.flags.shared && !info.flags.read_only;
        // Of a VM that only has the name of the one that this host waits for, nobody has said that.
        let has_said = self.has_run && disk.said.is_some_and(|it| it.shared);
        let is_expected = self.is_expected || has_said;
        if is_written && owners.is_empty() && !is_expected {
            return Err(Overreach::Shared { image, host, vm });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::path::Path;
    use std::time::SystemTime;

    use clap::Parser as _;
    use outlive_epoch::{Ancestor, DeviceFlags, Wiring};

    use super::*;
    use crate::cli::{Cli, Command};
    use crate::disk::Note;
    use crate::disk::tests::provenance;
    use crate::keys::Grant;

    const X: VmId = VmId([7; 16]);
    const Y: VmId = VmId([9; 16]);

    /// Of a host that may send these VMs.
    fn certificate(send: Vms) -> Certificate {
        let (from, until) = (SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH);
        let grant = Grant { send, ..Grant::NONE };
        Certificate { name: "elsewhere".into(), ca: "ca".into(), grant, serial: "01".into(), from, until }
    }

    fn of_x() -> Certificate {
        certificate(Vms::Only(vec![X]))
    }

    /// A standby that is kept for this VM, or for any.
    fn standby(vm: Option<&str>) -> StandbyOptions {
        let usual = ["outlive", "standby", "--listen", "127.0.0.1:0", "--arbiter", "file:/x"];
        let vm = vm.map(|vm| ["--vm", vm]);
        let cli = Cli::try_parse_from(usual.into_iter().chain(vm.into_iter().flatten())).unwrap();
        let Command::Standby(options) = cli.command else { panic!("{cli:?}") };
        options
    }

    fn device(flags: DeviceFlags) -> DeviceInfo {
        DeviceInfo { flags, ..DeviceInfo::new(DeviceKind::Disk, 1) }
    }

    /// What a host is told that introduces X with this disk on an image.
    fn refusal(image: &Path, flags: DeviceFlags, served: Option<&str>, more: &str) -> Option<String> {
        let host = of_x();
        let disk = format!("path={}{more}", image.display()).parse().unwrap();
        let vm = Restricted::of(Some(&host), X, &standby(served)).unwrap();
        vm.may_have([(&device(flags), &disk)].into_iter()).err().map(|why| why.to_string())
    }

    /// Every kind of disk: an own one, a shared one, a read-only one, and one that is both.
    fn kinds() -> [DeviceFlags; 4] {
        [(false, false), (true, false), (false, true), (true, true)].map(|(shared, read_only)| DeviceFlags {
            shared,
            read_only,
            ..DeviceFlags::default()
        })
    }

    fn image(directory: &Path, of: Option<VmId>) -> PathBuf {
        let image = directory.join(of.map_or_else(|| "blank".into(), |vm| vm.to_string()));
        File::create(&image).unwrap().set_len(4096).unwrap();
        if let Some(vm) = of {
            Note::here(&provenance(vm), 1).unwrap().write(&image).unwrap();
        }
        image
    }

    #[test]
    fn a_standby_of_an_id_takes_no_name_for_it() {
        let id = Y.to_string();
        assert!(is_kept_for("web", false, "web", X) && is_kept_for(&id, false, "web", Y));
        assert!(is_kept_for(&id.to_uppercase(), false, "web", Y) && is_kept_for(&id, false, &id, Y));
        assert!(!is_kept_for(&id, false, &id, X), "a name is no id");
        assert!(is_kept_for(&id, true, &id, X) && !is_kept_for(&id, true, "web", Y), "a run has a name");
        assert!(!is_kept_for("web", false, "mail", Y) && !is_kept_for("web", true, "mail", Y));
    }

    #[test]
    fn a_host_names_no_ancestor_that_it_may_not_send() {
        let (near, far) = (Ancestor { vm: X, through: 3 }, Ancestor { vm: Y, through: u64::MAX });
        let said = Lineage::new([near, far]);
        assert_eq!(believed(&said, None), said);
        assert_eq!(believed(&said, Some(&certificate(Vms::Any))), said);
        assert_eq!(believed(&said, Some(&certificate(Vms::Only(vec![X, Y])))), said);
        assert_eq!(believed(&said, Some(&of_x())), Lineage::new([near]));
    }

    #[test]
    fn only_a_host_with_a_right_to_some_vms_is_restricted() {
        assert!(Restricted::of(None, X, &standby(None)).is_none());
        assert!(Restricted::of(Some(&certificate(Vms::Any)), X, &standby(None)).is_none());
        assert!(Restricted::of(Some(&of_x()), X, &standby(None)).is_some());
    }

    /// A `run` that has become a standby is kept for a name, which any host may give its VM.
    #[test]
    fn a_host_with_a_right_to_one_vm_does_not_go_on_with_another_that_ran_here() {
        let (host, of_y) = (of_x(), Lineage::new([Ancestor { vm: Y, through: 3 }]));
        let vm = Restricted::of(Some(&host), X, &standby(Some("web"))).unwrap();
        assert!(vm.continues(None, &Lineage::default()) && vm.continues(Some(X), &Lineage::default()));
        assert!(!vm.continues(Some(Y), &Lineage::default()));
        assert!(!vm.continues(Some(Y), &believed(&of_y, Some(&host))), "it may not send Y");
        let both = certificate(Vms::Only(vec![X, Y]));
        assert!(vm.continues(Some(Y), &believed(&of_y, Some(&both))), "X was begun from an image of Y");
    }

    #[test]
    fn a_disk_is_what_this_hosts_operator_has_said() {
        for (here, there) in kinds().into_iter().flat_map(|here| kinds().map(|there| (here, there))) {
            let said = Some(DiskUse { readonly: here.read_only, shared: here.shared });
            let disk = StandbyDisk { path: "disk.img".into(), overwrite: false, thin: false, said };
            let told = are_as_said([(&device(there), &disk)].into_iter()).map_err(|why| why.to_string());
            assert_eq!(told.is_ok(), here == there, "{told:?}");
            let why = told.err().unwrap_or_default();
            assert!(here == there || why.contains("give both hosts the same --disk options"), "{why}");
            let unsaid = StandbyDisk { said: None, ..disk };
            assert!(are_as_said([(&device(there), &unsaid)].into_iter()).is_ok());
        }
    }

    #[test]
    fn a_card_of_a_run_is_in_its_own_vlan() {
        let net = |vlan| Some(crate::cli::NetSpec { vlan, ..standby_net() });
        let hello = |vlan| {
            let card = DeviceInfo {
                wiring: Wiring { vlan, ..Wiring::default() },
                ..DeviceInfo::new(DeviceKind::Net, 1)
            };
            Hello { devices: vec![card], ..crate::primary::test_hello() }
        };
        for (here, there) in
            [(None, None), (None, Some(7)), (Some(7), None), (Some(7), Some(7)), (Some(7), Some(8))]
        {
            let of = |was_run| StandbyOptions { net: net(here), was_run, ..standby(None) };
            assert_eq!(is_wired_as_said(&hello(there), &of(true)).is_ok(), here == there);
            assert!(is_wired_as_said(&hello(there), &of(false)).is_ok(), "the primary says it");
        }
        assert!(
            is_wired_as_said(
                &crate::primary::test_hello(),
                &StandbyOptions { was_run: true, ..standby(None) }
            )
            .is_ok()
        );
    }

    fn standby_net() -> crate::cli::NetSpec {
        let card = "tap=vm0,bridge=br0";
        card.parse().unwrap()
    }

    /// The VM ran here, with a disk that it shares. Nothing is beside the disk.
    #[test]
    fn a_shared_disk_needs_no_note_where_its_operator_has_said_so() {
        let (directory, host) = (tempfile::tempdir().unwrap(), of_x());
        let [_, shared, ..] = kinds();
        let said = Some(DiskUse { readonly: false, shared: true });
        let path = image(directory.path(), None);
        let disk = StandbyDisk { path, overwrite: false, thin: false, said };
        let of = |known| {
            let standby = StandbyOptions { known, was_run: true, ..standby(Some("web")) };
            let vm = Restricted::of(Some(&host), X, &standby).unwrap();
            vm.may_have([(&device(shared), &disk)].into_iter())
        };
        of(Some(X)).unwrap();
        assert!(of(None).is_err(), "a run that has only waited knows a name");
    }

    #[test]
    fn another_vms_image_is_refused_whatever_the_disk_is_said_to_be() {
        let directory = tempfile::tempdir().unwrap();
        let (own, others) = (image(directory.path(), Some(X)), image(directory.path(), Some(Y)));
        for flags in kinds() {
            assert_eq!(refusal(&own, flags, Some("web"), ""), None, "{flags:?}");
            for served in [None, Some("web"), Some(X.to_string().as_str())] {
                let why = refusal(&others, flags, served, "").expect("a refusal");
                assert!(
                    why.contains("is the image of a VM that host elsewhere may not send"),
                    "{flags:?}: {why}"
                );
                assert!(why.contains("give VM 0707"), "{why}");
                assert!(why.contains("outlive keys issue") && why.lines().count() == 1, "{why}");
                // The image's path has the id in this test.
                let words = why.replace(&others.display().to_string(), "");
                assert!(!words.contains(&Y.to_string()), "{why}");
            }
        }
        // An operator has said that it is to be overwritten, not that anybody may use what it holds.
        let refused = kinds().map(|flags| refusal(&others, flags, Some("web"), ",overwrite").is_some());
        assert_eq!(refused, [false, true, true, true]);
    }

    #[test]
    fn a_disk_of_nobody_is_written_where_it_is_only_by_the_vm_that_the_standby_is_kept_for() {
        let directory = tempfile::tempdir().unwrap();
        let blank = image(directory.path(), None);
        let [own, shared, read_only, both] = kinds();
        for flags in [own, read_only, both] {
            assert_eq!(refusal(&blank, flags, Some("web"), ""), None, "{flags:?}");
        }
        for served in [None, Some("web")] {
            let why = refusal(&blank, shared, served, "").expect("a refusal");
            assert!(why.contains(&format!("`outlive standby --vm {X}`")), "{why}");
            assert_eq!(why.lines().count(), 1);
        }
        assert_eq!(refusal(&blank, shared, Some(&X.to_string()), ""), None);
    }

    #[test]
    fn an_image_whose_sidecar_nobody_can_read_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let damaged = image(directory.path(), None);
        fs::write(directory.path().join("blank.outlive"), "vm = nonsense").unwrap();
        for flags in kinds() {
            let why = refusal(&damaged, flags, Some("web"), "").expect("a refusal");
            assert!(why.contains("is invalid") && why.contains("outlive image accept"), "{why}");
        }
        assert_eq!(refusal(&damaged, kinds()[0], Some("web"), ",overwrite"), None);
    }
}
