//! Never two VMs on one shared disk: what a host must know before it starts one there, and who tells it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use outlive_epoch::VmId;

use super::provenance;
use super::start::{Stage, VM};
use crate::arbiter::{Arbiter, Claim, process_token};
use crate::disk::provenance::{DangerKind, KnownArbiter, Provenance};
use crate::disk::shared::Note;
use crate::disk::sidecar::{Role, Sidecar, beside};
use crate::disk::sidecars::{Saying, Sidecars};
use crate::disk::{Start, Target, refuse_shared_in_use};
use crate::process;

const SOON: Duration = Duration::from_secs(20);

fn plan(stage: &mut Stage, own: &[&str], accept: &[DangerKind]) -> Result<Start, String> {
    let images: Vec<PathBuf> = own.iter().map(|name| stage.image(name)).collect();
    let given: Vec<(u16, &Path)> = (0..).zip(images.iter().map(PathBuf::as_path)).collect();
    let shared = stage.image("shared");
    Start::plan(&given, &[&shared], Some(&mut stage.arbiter), Some("server"), accept)
        .map_err(|error| error.to_string())
}

fn start(stage: &mut Stage, own: &[&str], accept: &[DangerKind]) -> Result<Start, String> {
    let start = plan(stage, own, accept)?;
    let disks = stage.disks(own);
    start.carry_out(&disks, Some(&mut stage.arbiter)).map_err(|error| error.to_string())?;
    Ok(start)
}

fn read(stage: &Stage) -> Note {
    Note::read(&stage.image("shared")).unwrap().unwrap()
}

/// As another host of `VM` has written it.
fn of_another_host(stage: &Stage, generation: u64) -> Note {
    let arbiter = KnownArbiter::Id(stage.arbiter.identity().to_owned());
    let known = Provenance { arbiter, ..provenance(VM) };
    let processes = vec!["its process".to_owned()];
    Note { processes, machine: "another".into(), ..Note::at("hostb", &known, generation) }
}

fn keeper(stage: &Stage, start: &Start) -> Sidecars {
    Sidecars::with_shared(Vec::new(), vec![stage.image("shared")], start.provenance.clone()).unwrap()
}

#[test]
fn a_vm_whose_only_disk_is_shared_goes_on_where_it_ran() {
    let mut stage = Stage::new();
    let first = start(&mut stage, &[], &[]).unwrap();
    let vm = first.provenance.vm;
    let Note { generation, processes, machine, over, provenance, .. } = read(&stage);
    assert_eq!((first.generation, provenance.vm, generation, over), (1, vm, 1, false));
    assert_eq!(
        (processes, machine.as_str()),
        (vec![process_token().unwrap().to_owned()], process::machine())
    );
    // This host has lost its power.
    let second = start(&mut stage, &[], &[]).unwrap();
    assert_eq!((second.provenance.vm, second.generation, read(&stage).generation), (vm, 2, 2));
    assert!(!second.is_new() && second.accepted().is_empty());
    // It has gone on alone, and died before its note said so.
    assert_eq!(stage.arbiter.claim(&vm, 3, "primary"), Claim::Won);
    assert_eq!(start(&mut stage, &[], &[]).unwrap().generation, 4);
}

#[test]
fn no_second_vm_starts_on_a_shared_disk_that_another_host_has() {
    let mut stage = Stage::new();
    of_another_host(&stage, 1).write(&stage.image("shared")).unwrap();
    // Neither alone, nor beside an image that is new, nor as an image of its own.
    for own in [&[][..], &["new"], &["shared"]] {
        let why = plan(&mut stage, own, &[]).map(|_| ()).unwrap_err();
        assert!(why.contains("may run at another host: host hostb had it last, in generation 1"), "{why}");
        assert!(why.contains("--accept-shared-disk") && why.lines().count() == 1, "{why}");
    }
    assert_eq!(read(&stage), of_another_host(&stage, 1), "nothing was changed");
    // By an operator's word the VM goes on here; that host hears of it, and is fenced off if a command is given.
    let word = [DangerKind::SharedDisk];
    let begun = start(&mut stage, &[], &word).unwrap();
    assert_eq!((begun.provenance.vm, begun.generation, begun.unfenced()), (VM, 2, Some(1)));
    assert_eq!(begun.accepted().len(), 1);
    assert!(matches!(stage.arbiter.claim(&VM, 2, "standby"), Claim::Lost { .. }));
    assert_eq!((read(&stage).machine.as_str(), read(&stage).generation), (process::machine(), 2));
    // From now on this host needs no word.
    assert_eq!(start(&mut stage, &[], &[]).unwrap().unfenced(), None);
}

#[test]
fn a_takeover_is_known_to_the_host_that_was_lost() {
    let mut stage = Stage::new();
    let lost = start(&mut stage, &[], &[]).unwrap();
    let vm = lost.provenance.vm;
    // Before the new host has written it down.
    assert_eq!(stage.arbiter.claim(&vm, 2, "standby on host b"), Claim::Won);
    let forgotten = Note { processes: vec!["gone".into()], ..read(&stage) };
    forgotten.write(&stage.image("shared")).unwrap();
    let why = plan(&mut stage, &[], &[]).map(|_| ()).unwrap_err();
    assert!(why.contains("in generation 2") && why.contains("standby on host b"), "{why}");
    // And afterwards.
    let taken = Note { generation: 2, machine: "another".into(), ..forgotten.clone() };
    taken.write(&stage.image("shared")).unwrap();
    plan(&mut stage, &[], &[]).map(|_| ()).unwrap_err();
    // What the lost host still had to say comes late.
    forgotten.write(&stage.image("shared")).unwrap();
    assert_eq!(read(&stage), taken);
}

#[test]
fn after_an_end_in_order_any_host_may_start_the_vm() {
    let mut stage = Stage::new();
    let begun = start(&mut stage, &[], &[]).unwrap();
    let sidecars = keeper(&stage, &begun);
    sidecars.say(Saying::primary(1));
    sidecars.over(7, SOON);
    let note = read(&stage);
    assert_eq!((note.generation, note.over), (1, true), "what was said last counts");
    Note { machine: "another".into(), ..note }.write(&stage.image("shared")).unwrap();
    let next = start(&mut stage, &[], &[]).unwrap();
    assert_eq!((next.provenance.vm, next.generation, read(&stage).over), (begun.provenance.vm, 2, false));
    // A keeper that has said nothing yet.
    keeper(&stage, &next).over(2, SOON);
    assert!(read(&stage).over);
}

#[test]
fn a_standby_says_nothing_of_a_shared_disk_before_it_has_won() {
    let stage = Stage::new();
    let there = of_another_host(&stage, 1);
    there.write(&stage.image("shared")).unwrap();
    let sidecars =
        Sidecars::with_shared(Vec::new(), vec![stage.image("shared")], there.provenance.clone()).unwrap();
    sidecars.say(Saying { role: Role::Replica, ..Saying::primary(1) });
    sidecars.written_within(SOON).unwrap();
    assert_eq!(read(&stage), there);
    sidecars.say(Saying::primary(2));
    sidecars.written_within(SOON).unwrap();
    assert_eq!((read(&stage).generation, read(&stage).machine.as_str()), (2, process::machine()));
}

/// What the images say of the VM holds for its shared disks.
#[test]
fn images_that_are_the_vms_newest_answer_for_its_shared_disks() {
    let mut stage = Stage::new();
    let begun = start(&mut stage, &["own"], &[]).unwrap();
    let note = read(&stage);
    Note { machine: "another".into(), ..note }.write(&stage.image("shared")).unwrap();
    let next = start(&mut stage, &["own"], &[]).unwrap();
    assert_eq!((next.provenance.vm, next.generation), (begun.provenance.vm, 2));
    // A copy answers for nothing: the host with the image may run.
    Note { machine: "another".into(), ..read(&stage) }.write(&stage.image("shared")).unwrap();
    let copy = Sidecar { role: Role::Replica, ..Sidecar::read(&stage.image("own")).unwrap().unwrap() };
    Sidecar { process: None, ..copy }.write(&stage.image("own")).unwrap();
    let why = plan(&mut stage, &["own"], &[DangerKind::Replica]).map(|_| ()).unwrap_err();
    assert!(why.contains("--accept-shared-disk"), "{why}");
    start(&mut stage, &["own"], &[DangerKind::Replica, DangerKind::SharedDisk]).unwrap();
    // The release before reads the sidecar, and knows no such word.
    let accepted = Sidecar::read(&stage.image("own")).unwrap().unwrap().accepted;
    assert!(accepted.iter().all(|it| it.danger == DangerKind::Replica) && !accepted.is_empty());
}

#[test]
fn without_an_arbiter_a_shared_disk_is_known_too() {
    let stage = Stage::new();
    let image = stage.image("shared");
    let plan = || Start::plan(&[], &[&image], None, Some("server"), &[]);
    let first = plan().unwrap();
    // Another one begins at the same time.
    let second = plan().unwrap();
    first.carry_out(&[], None).unwrap();
    let why = second.carry_out(&[], None).unwrap_err().to_string();
    assert!(why.contains("has just begun a VM on the shared disk"), "{why}");
    let again = plan().unwrap();
    assert_eq!(again.provenance.vm, first.provenance.vm);
    Note { machine: "another".into(), ..read(&stage) }.write(&image).unwrap();
    let why = plan().map(|_| ()).unwrap_err().to_string();
    assert!(why.contains("may run at another host"), "{why}");
}

/// A standby that was given the storage on which the VM runs, which nobody has said to be shared.
#[test]
fn a_standby_does_not_take_a_disk_of_the_primary_for_its_own() {
    let mut stage = Stage::new();
    (2..=4).for_each(|generation| stage.win(VM, generation));
    let incoming = of_another_host(&stage, 4).provenance;
    let path = stage.image("a");
    let file = File::options().read(true).write(true).open(&path).unwrap();
    for overwrite in [false, true] {
        let target = Target { path: &path, file: &file, overwrite };
        target.check(&incoming, 4, &mut stage.arbiter).unwrap();
        Sidecar { generation: 4, ..stage.sidecar() }.write(&path).unwrap();
        let why = target.check(&incoming, 4, &mut stage.arbiter).unwrap_err().to_string();
        assert!(why.contains("both hosts use the same storage") && why.contains("`shared`"), "{why}");
        fs::remove_file(beside(&path, "outlive")).unwrap();
    }
    // A shared disk of this or another VM is nobody's image.
    of_another_host(&stage, 4).write(&path).unwrap();
    let target = Target { path: &path, file: &file, overwrite: false };
    let why = target.check(&incoming, 4, &mut stage.arbiter).unwrap_err().to_string();
    assert!(why.contains("shares between its hosts") && why.contains(",overwrite"), "{why}");
}

#[test]
fn a_shared_disk_that_a_process_has_is_refused() {
    let stage = Stage::new();
    let image = stage.image("shared");
    refuse_shared_in_use(&[&image]).unwrap();
    let other = File::open(&image).unwrap();
    other.try_lock_shared().unwrap();
    let why = refuse_shared_in_use(&[&image]).unwrap_err().to_string();
    assert!(why.contains("is in use") && why.contains("outlive standby"), "{why}");
}

#[test]
fn what_is_written_is_read_and_nonsense_is_refused() {
    let stage = Stage::new();
    let (image, note) = (stage.image("shared"), of_another_host(&stage, 3));
    assert_eq!(Note::read(&image).unwrap(), None);
    note.write(&image).unwrap();
    assert_eq!(Note::read(&image).unwrap(), Some(note.clone()));
    let path = beside(&image, "outlive-shared");
    let good = fs::read_to_string(&path).unwrap();
    for (from, to) in
        [("version = 1", "version = 2"), ("over = false", "over = 5"), ("vm = \"09", "vm = \"x9")]
    {
        assert!(good.contains(from), "{good}");
        fs::write(&path, good.replace(from, to)).unwrap();
        let why = Note::read(&image).unwrap_err().to_string();
        assert!(why.contains("remove it") && why.lines().count() == 1, "{why}");
    }
    // No litter, and nothing if it is gone already.
    Note::remove(&image).unwrap();
    Note::remove(&image).unwrap();
    let other = Note { provenance: provenance(VmId([3; 16])), ..note };
    other.write(&image).unwrap();
    let names = fs::read_dir(image.parent().unwrap()).unwrap().count();
    assert_eq!(names, 3, "the arbiter, the disk and its note");
}
