//! Never two VMs from one, and never the only good image overwritten: every image that is refused, the word
//! that accepts it, and what a loss of power leaves behind.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use outlive_epoch::{Ancestor, Lineage, VmId};

use super::provenance;
use crate::arbiter::{Arbiter, ArbiterError, Claim, Ending, FileArbiter, Mode, Win, process_token};
use crate::disk::Start;
use crate::disk::provenance::{DangerKind, KnownArbiter, Provenance};
use crate::disk::sidecar::{CopyEnd, Role, Sidecar, beside};
use crate::disk::stamp::Stamp;

pub(super) const VM: VmId = VmId([9; 16]);
pub(super) const OTHER: VmId = VmId([8; 16]);

const DANGERS: [DangerKind; 8] = [
    DangerKind::StaleImage,
    DangerKind::Replica,
    DangerKind::OtherArbiter,
    DangerKind::LostClaims,
    DangerKind::NoArbiter,
    DangerKind::ForeignImage,
    DangerKind::MovedImage,
    DangerKind::OtherDisks,
];

/// A host with images, and an arbiter.
pub(super) struct Stage {
    directory: tempfile::TempDir,
    pub(super) arbiter: FileArbiter,
}

impl Stage {
    /// With an arbiter where `VM` has won generation 1, by this process.
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut stage = Self { arbiter: make_arbiter(directory.path(), "arbiter"), directory };
        stage.win(VM, 1);
        stage
    }

    pub(super) fn image(&self, name: &str) -> PathBuf {
        let image = self.directory.path().join(name);
        if !image.exists() {
            File::create(&image).unwrap().set_len(1 << 20).unwrap();
        }
        image
    }

    pub(super) fn win(&mut self, vm: VmId, generation: u64) {
        assert_eq!(self.arbiter.claim(&vm, generation, "standby on host b"), Claim::Won);
    }

    /// The sidecar of an image that `VM` continued in generation 1, on a host that has lost its power.
    pub(super) fn sidecar(&self) -> Sidecar {
        let arbiter = KnownArbiter::Id(self.arbiter.identity().to_owned());
        let provenance = Provenance { arbiter, ..provenance(VM) };
        Sidecar::primary(&provenance, 1, Some("a process that is gone"))
    }

    fn plan(&mut self, images: &[&str], accept: &[DangerKind]) -> Result<Start, String> {
        let images: Vec<PathBuf> = images.iter().map(|name| self.image(name)).collect();
        let given: Vec<(u16, &Path)> = (0..).zip(images.iter().map(PathBuf::as_path)).collect();
        Start::plan(&given, &[], Some(&mut self.arbiter), Some("server"), accept)
            .map_err(|error| error.to_string())
    }

    pub(super) fn disks(&self, images: &[&str]) -> Vec<(u16, PathBuf)> {
        images.iter().enumerate().map(|(disk, name)| (disk as u16, self.image(name))).collect()
    }

    /// Starts a VM and lets its process be gone.
    fn start(&mut self, images: &[&str], accept: &[DangerKind]) -> Result<Start, String> {
        let start = self.plan(images, accept)?;
        start.carry_out(&self.disks(images), Some(&mut self.arbiter)).map_err(|error| error.to_string())?;
        Ok(start)
    }

    fn read(&self, image: &str) -> Sidecar {
        Sidecar::read(&self.image(image)).unwrap().unwrap()
    }
}

fn make_arbiter(directory: &Path, name: &str) -> FileArbiter {
    let place = directory.join(name);
    fs::create_dir(&place).unwrap();
    FileArbiter::init(&place).unwrap().0
}

#[test]
fn a_vm_goes_on_with_its_images_in_the_next_generation() {
    let mut stage = Stage::new();
    let first = stage.start(&["a", "b"], &[]).unwrap();
    let vm = first.provenance.vm;
    assert_eq!((first.generation, stage.arbiter.highest(&vm).unwrap()), (1, Some(1)));
    let known = KnownArbiter::Id(stage.arbiter.identity().to_owned());
    for (disk, name) in ["a", "b"].into_iter().enumerate() {
        let Sidecar { generation, role, whole, disk: at, provenance, .. } = stage.read(name);
        assert_eq!((generation, role, whole, usize::from(at)), (1, Role::Primary, true, disk));
        assert_eq!((provenance.vm, provenance.name.as_str(), &provenance.arbiter), (vm, "server", &known));
    }
    let second = stage.start(&["a", "b"], &[]).unwrap();
    assert_eq!((second.provenance.vm, second.generation), (vm, 2));
    // A disk that is added belongs to the VM from then on.
    let third = stage.start(&["a", "b", "c"], &[]).unwrap();
    assert_eq!((third.provenance.vm, third.generation, stage.read("c").generation), (vm, 3, 3));
    assert!(third.accepted().is_empty() && third.provenance.lineage == Lineage::default());
}

/// The primary was killed, its standby cannot reach the arbiter yet, and the operator starts the server
/// again.
#[test]
fn a_vm_started_anew_from_an_image_is_not_taken_over_any_more() {
    let mut stage = Stage::new();
    stage.sidecar().write(&stage.image("a")).unwrap();
    stage.start(&["a"], &[]).unwrap();
    let mut standby = FileArbiter::open(&stage.directory.path().join("arbiter")).unwrap();
    assert!(matches!(standby.claim(&VM, 2, "standby"), Claim::Lost { .. }));

    // The other way round: the standby wins between the look and the claim.
    let start = stage.plan(&["a"], &[]).unwrap();
    assert_eq!(standby.claim(&VM, 3, "standby on b"), Claim::Won);
    let error = start.carry_out(&stage.disks(&["a"]), Some(&mut stage.arbiter)).unwrap_err().to_string();
    assert!(error.contains("standby on b has just taken over"), "{error}");
}

/// Without an arbiter nothing is left beside an image that had nothing, and a VM that gets an arbiter later
/// begins there with its first generation.
#[test]
fn a_vm_without_an_arbiter_can_have_one_later() {
    let mut stage = Stage::new();
    let image = stage.image("a");
    let start = Start::plan(&[(0, &image)], &[], None, Some("server"), &[]).unwrap();
    start.carry_out(&stage.disks(&["a"]), None).unwrap();
    assert_eq!((start.generation, Sidecar::read(&image).unwrap()), (1, None));

    let alone = Provenance { arbiter: KnownArbiter::None, ..provenance(OTHER) };
    Sidecar::primary(&alone, 0, None).write(&image).unwrap();
    let start = Start::plan(&[(0, &image)], &[], None, Some("server"), &[]).unwrap();
    start.carry_out(&stage.disks(&["a"]), None).unwrap();
    assert_eq!((start.provenance.vm, start.generation, stage.read("a").generation), (OTHER, 1, 0));
    let start = stage.start(&["a"], &[]).unwrap();
    assert_eq!((start.provenance.vm, start.generation, stage.read("a").generation), (OTHER, 1, 1));
    // A copy of the image with its sidecar of before: the VM went on elsewhere.
    Sidecar::primary(&alone, 0, None).write(&stage.image("copy")).unwrap();
    let error = stage.plan(&["copy"], &[]).map(drop).unwrap_err();
    assert!(error.contains("is out of date: it has generation 0"), "{error}");
}

/// What is accepted with one word and refused with all others.
fn check_word(stage: &mut Stage, images: &[&str], word: DangerKind, says: &[&str]) -> Start {
    let refuses = |stage: &mut Stage, accept: &[DangerKind]| {
        let error = stage.plan(images, accept).map(drop).unwrap_err();
        for said in says.iter().chain(&[word.option()]) {
            assert!(error.contains(said), "{word:?}: {error}");
        }
        assert_eq!(error.lines().count(), 1, "{error}");
    };
    refuses(stage, &[]);
    let others: Vec<DangerKind> = DANGERS.into_iter().filter(|other| *other != word).collect();
    refuses(stage, &others);
    let start = stage.start(images, &[word]).unwrap();
    let recorded = stage.read(images[0]).accepted;
    assert!(recorded.iter().any(|it| it.danger == word), "{recorded:?}");
    assert!(start.accepted().iter().any(|it| it.danger == word));
    // It is settled with that.
    let again = stage.plan(images, &[]).unwrap();
    assert_eq!((again.provenance.vm, again.generation), (start.provenance.vm, start.generation + 1));
    start
}

/// A new VM whose ancestor is `VM` as of generation 1.
fn assert_forked(start: &Start) {
    assert_ne!(start.provenance.vm, VM);
    assert_eq!(start.generation, 1);
    assert_eq!(start.provenance.lineage, Lineage::new([Ancestor { vm: VM, through: 1 }]));
}

#[test]
fn an_image_whose_vm_went_on_elsewhere_is_refused() {
    let mut stage = Stage::new();
    stage.sidecar().write(&stage.image("a")).unwrap();
    stage.win(VM, 2);
    stage.win(VM, 3);
    let says = [
        "is out of date: it has generation 1",
        "continued in generation 3, won by standby on host \
    b;",
    ];
    let start = check_word(&mut stage, &["a"], DangerKind::StaleImage, &says);
    assert_forked(&start);
    // A standby of the generation that was given up cannot go on.
    assert_eq!(stage.arbiter.highest(&VM).unwrap(), Some(4));
}

#[test]
fn an_image_that_its_standby_gave_up_is_refused() {
    let mut stage = Stage::new();
    let released = Sidecar { role: Role::Replica, end: Some(CopyEnd::Released), ..stage.sidecar() };
    released.write(&stage.image("a")).unwrap();
    let says = ["is out of date", "gave it up in generation 1"];
    assert_forked(&check_word(&mut stage, &["a"], DangerKind::StaleImage, &says));
}

#[test]
fn a_standbys_copy_is_refused_unless_the_vm_ended_with_it() {
    let mut stage = Stage::new();
    let copy = Sidecar { role: Role::Replica, ..stage.sidecar() };
    copy.write(&stage.image("a")).unwrap();
    let start = check_word(&mut stage, &["a"], DangerKind::Replica, &["a standby's copy", "may be newer"]);
    // It is in the VM's line, as a takeover is.
    assert_eq!((start.provenance.vm, start.generation), (VM, 2));
    assert_eq!(start.provenance.lineage, Lineage::default());

    let mut stage = Stage::new();
    Sidecar { end: Some(CopyEnd::Followed), ..copy }.write(&stage.image("a")).unwrap();
    stage.sidecar().write(&stage.image("b")).unwrap();
    let arbiter = KnownArbiter::Id(stage.arbiter.identity().to_owned());
    let mut followed = stage.read("a");
    followed.provenance.arbiter = arbiter;
    followed.write(&stage.image("a")).unwrap();
    assert_eq!(stage.start(&["a"], &[]).unwrap().generation, 2);
    // And then the other host's is older.
    assert!(stage.plan(&["b"], &[]).map(drop).unwrap_err().contains("is out of date"));
}

#[test]
fn an_image_with_another_arbiter_is_refused() {
    let mut stage = Stage::new();
    stage.sidecar().write(&stage.image("a")).unwrap();
    let right = stage.arbiter.identity().to_owned();
    stage.arbiter = make_arbiter(stage.directory.path(), "another");
    let given = stage.arbiter.identity().to_owned();
    let says = ["another arbiter", right.as_str(), given.as_str()];
    assert_forked(&check_word(&mut stage, &["a"], DangerKind::OtherArbiter, &says));
}

/// The mount is missing and somebody made the bare directory an arbiter, or it was emptied, or an old copy
/// was put back.
#[test]
fn an_image_of_a_vm_that_the_arbiter_has_forgotten_is_refused() {
    let mut stage = Stage::new();
    stage.sidecar().write(&stage.image("a")).unwrap();
    fs::remove_dir_all(stage.directory.path().join("arbiter").join(VM.to_string())).unwrap();
    let says = ["the arbiter does not know the VM", "the arbiter was emptied or is an old copy"];
    assert_forked(&check_word(&mut stage, &["a"], DangerKind::LostClaims, &says));

    let mut stage = Stage::new();
    Sidecar { generation: 3, ..stage.sidecar() }.write(&stage.image("a")).unwrap();
    let says = ["the arbiter knows generation 1 but not generation 3"];
    let start = check_word(&mut stage, &["a"], DangerKind::LostClaims, &says);
    assert_eq!(start.provenance.lineage, Lineage::new([Ancestor { vm: VM, through: 3 }]));
}

/// There is nothing to bring back where a person is the arbiter.
#[test]
fn an_image_is_refused_by_a_person_who_remembers_nothing() {
    let stage = Stage::new();
    let mut sidecar = stage.sidecar();
    sidecar.provenance.arbiter = KnownArbiter::Id("manual".into());
    sidecar.provenance.vm = VmId([0x4d; 16]);
    sidecar.write(&stage.image("a")).unwrap();
    let mut manual = crate::arbiter::parse("manual").unwrap();
    let mut plan = |accept: &[DangerKind]| {
        let started = Start::plan(&[(0, &stage.image("a"))], &[], Some(manual.as_mut()), None, accept);
        started.map(drop).map_err(|error| error.to_string())
    };
    let error = plan(&[]).unwrap_err();
    assert!(error.contains("run `outlive standby ...") && error.contains("--accept-lost-claims"), "{error}");
    assert!(!error.contains("emptied") && !error.contains("bring the right arbiter back"), "{error}");
    plan(&[DangerKind::LostClaims]).unwrap();
}

#[test]
fn an_image_of_a_vm_with_an_arbiter_does_not_start_without_it() {
    for unsaid in [false, true] {
        let stage = Stage::new();
        let image = stage.image("a");
        let mut sidecar = stage.sidecar();
        if unsaid {
            sidecar.provenance.arbiter = KnownArbiter::Unsaid;
        }
        sidecar.write(&image).unwrap();
        let plan = |accept: &[DangerKind]| {
            Start::plan(&[(0, &image)], &[], None, Some("server"), accept).map_err(|error| error.to_string())
        };
        let error = plan(&[]).map(drop).unwrap_err();
        assert!(
            error.contains(
                "give the arbiter with \
        --arbiter"
            ) && error.contains("--accept-no-arbiter"),
            "{error}"
        );
        assert_eq!(unsaid, !error.contains(stage.arbiter.identity()), "{error}");
        let others: Vec<_> = DANGERS.into_iter().filter(|it| *it != DangerKind::NoArbiter).collect();
        assert!(plan(&others).is_err());
        let start = plan(&[DangerKind::NoArbiter]).unwrap();
        assert_forked(&start);
        start.carry_out(&stage.disks(&["a"]), None).unwrap();
        assert_eq!(stage.read("a").provenance.arbiter, KnownArbiter::None);
        plan(&[]).unwrap();
    }
}

/// The sidecar is there, and the image is not the one that it speaks of.
#[test]
fn an_image_that_is_another_file_or_was_cut_is_refused() {
    let data = |image: &Path| File::options().write(true).open(image).unwrap().set_len(1 << 19).unwrap();
    let anew = |image: &Path| {
        fs::remove_file(image).unwrap();
        fs::write(image, vec![7; 1 << 20]).unwrap();
    };
    for (change, says) in [
        (&data as &dyn Fn(&Path), ["is not the file that", "it has 524288 bytes and had 1048576"]),
        (&anew, ["is not the file that", "it was copied, restored or made anew since"]),
    ] {
        let mut stage = Stage::new();
        let image = stage.image("a");
        if !Stamp::of(&image).unwrap().is_certain() {
            return println!("skipped: a file system with steady numbers for the tests' directory");
        }
        stage.sidecar().write(&image).unwrap();
        change(&image);
        let start = check_word(&mut stage, &["a"], DangerKind::MovedImage, &says);
        // It is in the VM's line: an operator has said that it is the newest state.
        assert_eq!((start.provenance.vm, start.generation), (VM, 2));
    }
}

#[test]
fn disks_in_another_order_and_missing_ones_are_refused() {
    let mut stage = Stage::new();
    stage.image("b");
    stage.sidecar().write(&stage.image("a")).unwrap();
    stage.start(&["a", "b"], &[]).unwrap();
    let says = ["was disk 1 of its VM and is given as disk 0", "give the disks in their order"];
    assert!(stage.plan(&["b", "a"], &[]).map(drop).unwrap_err().contains(says[0]));
    let text = stage.plan(&["a"], &[]).map(drop).unwrap_err();
    assert!(text.contains("writes to 2 disks, and 1 are given"), "{text}");
    // A new disk behind the others needs no word.
    let more = stage.start(&["a", "b", "c"], &[]).unwrap();
    assert_eq!((more.provenance.vm, more.generation), (VM, 3));
    let fewer = check_word(&mut stage, &["a", "b"], DangerKind::OtherDisks, &["writes to 3 disks"]);
    assert_eq!((fewer.provenance.vm, fewer.generation), (VM, 4));
    let crossed = check_word(&mut stage, &["b", "a"], DangerKind::OtherDisks, &says);
    assert_eq!((crossed.provenance.vm, crossed.generation), (VM, 5));
}

#[test]
fn images_of_several_vms_are_refused() {
    let mut stage = Stage::new();
    stage.win(OTHER, 1);
    stage.sidecar().write(&stage.image("a")).unwrap();
    let mut other = stage.sidecar();
    other.provenance.vm = OTHER;
    other.write(&stage.image("b")).unwrap();
    let (vm, other) = (VM.to_string(), OTHER.to_string());
    let says = ["belong to different VMs", vm.as_str(), other.as_str()];
    let start = check_word(&mut stage, &["a", "b"], DangerKind::ForeignImage, &says);
    let line = [Ancestor { vm: VM, through: 1 }, Ancestor { vm: OTHER, through: 1 }];
    assert_eq!(start.provenance.lineage, Lineage::new(line));
    // Nobody goes on with either.
    assert_eq!(stage.arbiter.highest(&VM).unwrap(), Some(2));
    assert_eq!(stage.arbiter.highest(&OTHER).unwrap(), Some(2));
}

/// A sidecar of the release before does not say which arbiter the VM had. One that knows the VM is right.
#[test]
fn an_image_of_the_release_before_goes_on_where_its_vm_is_known() {
    let mut stage = Stage::new();
    let mut old = stage.sidecar();
    (old.provenance.arbiter, old.process) = (KnownArbiter::Unsaid, None);
    old.write(&stage.image("a")).unwrap();
    let start = stage.start(&["a"], &[]).unwrap();
    assert_eq!((start.provenance.vm, start.generation), (VM, 2));
    old.write(&stage.image("b")).unwrap();
    assert!(stage.plan(&["b"], &[]).map(drop).unwrap_err().contains("is out of date"));
    stage.arbiter = make_arbiter(stage.directory.path(), "another");
    assert!(stage.plan(&["b"], &[]).map(drop).unwrap_err().contains("does not know the VM"));
}

/// A process that won a generation may die before the sidecars of its images say so. Its image is the one
/// that goes on; without that both hosts' images would be out of date and nobody's the newest.
#[test]
fn a_generation_that_was_won_and_not_written_down_orphans_nobody() {
    let me = process_token().unwrap();
    for role in [Role::Primary, Role::Replica] {
        let mut stage = Stage::new();
        let mine = Sidecar { role, process: Some(me.into()), ..stage.sidecar() };
        mine.write(&stage.image("mine")).unwrap();
        stage.sidecar().write(&stage.image("other")).unwrap();
        stage.win(VM, 2);
        assert!(stage.plan(&["other"], &[]).map(drop).unwrap_err().contains("is out of date"));
        let start = stage.start(&["mine"], &[]).unwrap();
        assert_eq!((start.provenance.vm, start.generation), (VM, 3), "{role:?}");
    }
    // So does a claim that lands only after another process of this host has looked and written its own token.
    let mut stage = Stage::new();
    let dead = Sidecar { process: Some(me.into()), ..stage.sidecar() };
    dead.handed_to("07be").handed_to("9c3f").write(&stage.image("mine")).unwrap();
    stage.win(VM, 2);
    let start = stage.start(&["mine"], &[]).unwrap();
    assert_eq!((start.provenance.vm, start.generation), (VM, 3));
    assert_eq!(stage.read("mine").earlier, [""; 0], "what is won is in nobody else's hands");
    // One that was won before another was is no excuse.
    let mut stage = Stage::new();
    let claimed = stage.directory.path().join("arbiter").join(VM.to_string()).join("3");
    Sidecar { process: Some(me.into()), ..stage.sidecar() }.write(&stage.image("mine")).unwrap();
    stage.win(VM, 2);
    let text = format!("outlive claim, version 1\nvm {VM}\ngeneration 3\nowner host b\ntoken 77\nend\n");
    fs::write(claimed, text).unwrap();
    let error = stage.plan(&["mine"], &[]).map(drop).unwrap_err();
    assert!(
        error.contains("it has generation 2 and its VM continued in generation 3, won by host b"),
        "{error}"
    );
}

/// The file is a copy: what the process of its sidecar has won, or wins after the copy was accepted once, is the
/// original's.
#[test]
fn what_the_originals_process_wins_does_not_belong_to_a_copy() {
    for accepted_before in [false, true] {
        let mut stage = Stage::new();
        let image = stage.image("a");
        if !Stamp::of(&image).unwrap().is_certain() {
            return println!("skipped: a file system with steady numbers for the tests' directory");
        }
        Sidecar { process: Some("77".into()), ..stage.sidecar() }.write(&image).unwrap();
        fs::remove_file(&image).unwrap();
        fs::write(&image, vec![7; 1 << 20]).unwrap();
        let accept = [DangerKind::MovedImage];
        let start = stage.plan(&["a"], &accept).unwrap();
        let claimed = stage.directory.path().join("arbiter").join(VM.to_string()).join("2");
        let text = format!("outlive claim, version 1\nvm {VM}\ngeneration 2\nowner host a\ntoken 77\nend\n");
        fs::write(claimed, text).unwrap();
        if accepted_before {
            let disks = stage.disks(&["a"]);
            let lost = start.carry_out(&disks, Some(&mut stage.arbiter)).unwrap_err().to_string();
            assert!(lost.contains("host a has just taken over"), "{lost}");
            assert_eq!(stage.read("a").claimants().collect::<Vec<_>>(), [process_token().unwrap()]);
        }
        let error = stage.plan(&["a"], &accept).map(drop).unwrap_err();
        assert!(
            error.contains("it has generation 1 and its VM continued in generation 2, won by host a"),
            "{error}"
        );
    }
}

/// An arbiter whose claims are the last thing that a host does.
struct PowerCut {
    arbiter: FileArbiter,
    /// After so many claims no sidecar can be written any more.
    claims: usize,
    blocked: PathBuf,
}

impl Arbiter for PowerCut {
    fn claim(&mut self, vm: &VmId, generation: u64, owner: &str) -> Claim {
        let claim = self.arbiter.claim(vm, generation, owner);
        self.claims -= 1;
        if self.claims == 0 {
            fs::create_dir(&self.blocked).unwrap();
        }
        claim
    }
    fn highest(&mut self, vm: &VmId) -> Result<Option<u64>, ArbiterError> {
        self.arbiter.highest(vm)
    }
    fn history(&mut self, vm: &VmId) -> Result<Vec<Win>, ArbiterError> {
        self.arbiter.history(vm)
    }
    fn ending(&mut self, vm: &VmId) -> Result<Option<Ending>, ArbiterError> {
        self.arbiter.ending(vm)
    }
    fn note_end(&mut self, vm: &VmId, generation: u64, why: &str) -> Result<(), ArbiterError> {
        self.arbiter.note_end(vm, generation, why)
    }
    fn prober(&self) -> crate::arbiter::Prober {
        self.arbiter.prober()
    }
    fn vms(&mut self) -> Result<Vec<VmId>, ArbiterError> {
        self.arbiter.vms()
    }
    fn prune(&mut self, vm: &VmId, mode: Mode) -> Result<Vec<u64>, ArbiterError> {
        self.arbiter.prune(vm, mode)
    }
    fn forget(&mut self, vm: &VmId, age: Duration, mode: Mode) -> Result<bool, ArbiterError> {
        self.arbiter.forget(vm, age, mode)
    }
    fn identity(&self) -> &str {
        self.arbiter.identity()
    }
}

#[test]
fn a_power_cut_between_the_win_and_the_sidecar_leaves_an_image_that_goes_on() {
    let mut stage = Stage::new();
    stage.sidecar().write(&stage.image("a")).unwrap();
    stage.sidecar().write(&stage.image("b")).unwrap();
    let disks = stage.disks(&["a", "b"]);
    for (generation, second) in [(2, false), (3, true)] {
        let start = stage.plan(&["a", "b"], &[]).unwrap();
        assert_eq!((start.provenance.vm, start.generation), (VM, generation));
        // Before the first sidecar, and between the two.
        let blocked = beside(&stage.image(if second { "b" } else { "a" }), "outlive.new");
        let arbiter = FileArbiter::open(&stage.directory.path().join("arbiter")).unwrap();
        let mut cut = PowerCut { arbiter, claims: 1, blocked: blocked.clone() };
        let error = start.carry_out(&disks, Some(&mut cut)).unwrap_err().to_string();
        assert!(error.contains("cannot write"), "{error}");
        fs::remove_dir(blocked).unwrap();
        assert_eq!(stage.arbiter.highest(&VM).unwrap(), Some(generation));
    }
    let start = stage.start(&["a", "b"], &[]).unwrap();
    assert_eq!((start.provenance.vm, start.generation), (VM, 4));
}

#[test]
fn a_vm_keeps_its_name_unless_it_is_given_another() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("a.img");
    fs::write(&image, [7; 4096]).unwrap();
    let place = directory.path().join("arbiter");
    fs::create_dir(&place).unwrap();
    let (mut arbiter, _) = FileArbiter::init(&place).unwrap();
    let disks = [(0, image.clone())];
    let mut named = |name| {
        let start = Start::plan(&[(0, &image)], &[], Some(&mut arbiter), name, &[]).unwrap();
        start.carry_out(&disks, Some(&mut arbiter)).unwrap();
        start.provenance.name
    };
    assert_eq!(named(None), "vm");
    assert_eq!(named(Some("server")), "server");
    assert_eq!(named(None), "server");
}
