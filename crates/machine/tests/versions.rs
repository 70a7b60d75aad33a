//! State that an older release has written, and state that an older release can read.

#![allow(dead_code, reason = "the guests of the other tests")]

mod support;

use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use outlive_dirty::BackendChoice;
use outlive_epoch::image::{StateKind, StateSection, StateVersions};
use outlive_machine::state::StateError;
use outlive_machine::{
    After, InPause, Machine, MachineEvent, Outgoing, PowerRequest, ResetWay, RestoreError, SpillError,
};
use support::{booted, host, machine};

/// Asks for a reset by the power port.
const RESET: &[u8] = &[0xb8, 2, 0, 0, 0, 0x66, 0xba, 0x08, 0x05, 0xef, 0xeb, 0xfe];

/// Fields of a [`StateKind::Vm`] section.
const PIC_MASTER: u16 = 3;
const IO_APIC: u16 = 5;
const ASKED_BY: u16 = 7;
/// The power button's bit at the first 8259.
const BUTTON: u8 = 1 << 3;

type Saved = (StateKind, u16, u16, Vec<u8>);

struct Nothing;

impl InPause for Nothing {
    fn counted(&mut self, _: usize) {}

    fn spill(&mut self, _: &mut Outgoing) -> Result<(), SpillError> {
        Ok(())
    }
}

/// The state of a machine whose guest has asked for a reset, as a checkpoint has it in these versions.
fn saved(machine: &mut Machine, versions: StateVersions) -> Vec<Saved> {
    machine.next_is_base(versions);
    let mut staging = Outgoing::new(2048, 0).unwrap();
    machine.checkpoint(&mut staging, After::Resume, &mut Nothing).unwrap();
    staging.state().sections().map(|s| (s.kind, s.version, s.index, s.bytes.to_vec())).collect()
}

fn restore(machine: &mut Machine, saved: &[Saved]) -> Result<(), RestoreError> {
    let constant = |saved: &&Saved| saved.0 == StateKind::VcpuConstant;
    let constants: Vec<Vec<u8>> = saved.iter().filter(constant).map(|it| it.3.clone()).collect();
    let sections: Vec<StateSection<'_>> = saved
        .iter()
        .filter(|it| !constant(it))
        .map(|(kind, version, index, bytes)| StateSection {
            kind: *kind,
            version: *version,
            index: *index,
            bytes,
        })
        .collect();
    machine.restore(&constants, &sections, Duration::ZERO)
}

fn vm(saved: &mut [Saved]) -> &mut Saved {
    saved.iter_mut().find(|it| it.0 == StateKind::Vm).unwrap()
}

/// The fields of a section: {number u16, length u32, bytes} in a row.
fn field(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    while !bytes.is_empty() {
        let (head, rest) = bytes.split_first_chunk::<6>().unwrap();
        let number = u16::from_le_bytes([head[0], head[1]]);
        let length = u32::from_le_bytes([head[2], head[3], head[4], head[5]]) as usize;
        let (field, rest) = rest.split_at(length);
        if number == wanted {
            return Some(field);
        }
        bytes = rest;
    }
    None
}

/// Numbers and lengths of the fields of a section.
fn layout(mut bytes: &[u8]) -> Vec<(u16, usize)> {
    let mut fields = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<6>() {
        let length = u32::from_le_bytes([head[2], head[3], head[4], head[5]]) as usize;
        fields.push((u16::from_le_bytes([head[0], head[1]]), length));
        bytes = &rest[length..];
    }
    fields
}

/// Interrupts that wait at the first 8259: its second byte, behind number and padding.
fn waiting(vm: &[u8]) -> u8 {
    field(vm, PIC_MASTER).unwrap()[8 + 1]
}

fn asked(events: &Receiver<MachineEvent>) -> MachineEvent {
    events.recv_timeout(Duration::from_secs(60)).unwrap()
}

/// A machine whose guest has asked for a reset, and that is tracked.
fn asking() -> Option<Machine> {
    let (mut machine, events) = booted(&host()?, 1, BackendChoice::Auto, RESET);
    machine.resume();
    assert_eq!(asked(&events), MachineEvent::Power(PowerRequest::Reset(ResetWay::PowerPort)));
    machine.enable_tracking().unwrap();
    Some(machine)
}

fn golden(name: &str, bytes: impl FnOnce() -> Vec<u8>) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    // A file that is there is never changed.
    if std::env::var_os("OUTLIVE_WRITE_GOLDEN").is_some() && !path.exists() {
        std::fs::write(&path, bytes()).unwrap();
    }
    std::fs::read(path).unwrap()
}

const NEWEST: StateVersions = StateVersions::NEWEST;
const V1: StateVersions = NEWEST.with(StateKind::Vm, 1);

/// What to do when state has another layout.
const REMEDY: &str = "a host of the release before could not read this. Give the state a new version, write its golden file \
                      with OUTLIVE_WRITE_GOLDEN=1, and keep the old one with its reader (docs/upgrade.md)";

/// The bytes are those of another machine, with the power button pressed, saved by the release that wrote this version
/// first.
#[test]
fn a_machine_is_restored_from_every_version_of_its_state() {
    for (name, versions, way) in [("vm-v1.bin", V1, None), ("vm-v2.bin", NEWEST, Some(ResetWay::PowerPort))] {
        let Some(mut machine) = asking() else { return };
        let mut state = saved(&mut machine, versions);
        let old = golden(name, || {
            machine.press_power_button().unwrap();
            vm(&mut saved(&mut machine, versions)).3.clone()
        });
        assert_eq!((field(&old, ASKED_BY).is_some(), waiting(&old)), (way.is_some(), BUTTON));
        let section = vm(&mut state);
        assert_eq!(section.1, versions.of(StateKind::Vm));
        assert_ne!(section.3, old);
        assert_eq!(layout(&section.3), layout(&old), "{name}: {REMEDY}");
        section.3.clone_from(&old);

        let (mut copy, events) = self::machine(&host().unwrap(), 1, BackendChoice::Auto);
        restore(&mut copy, &state).unwrap();
        copy.go_live(false);
        // Its way is not in version 1.
        let request = asked(&events);
        let asked_by = |way| request == MachineEvent::Power(PowerRequest::Reset(way));
        assert!(way.map_or(matches!(request, MachineEvent::Power(PowerRequest::Reset(_))), asked_by));
        copy.enable_tracking().unwrap();
        let mut again = saved(&mut copy, versions);
        let again = &vm(&mut again).3;
        for chip in [PIC_MASTER, IO_APIC] {
            assert_eq!(field(again, chip), field(&old, chip), "field {chip}");
        }
        assert_eq!(field(again, 6), field(&old, 6), "what the guest has asked for");
    }
}

/// The fields of the sections of a vCPU, whose bytes are this host's, with their lengths. Of a field with a length of
/// its own on each host it is that of one element.
const VCPU: &[(u16, usize)] =
    &[(1, 4), (2, 144), (3, 312), (10, 64), (4, 4), (5, 392), (6, 128), (7, 1024), (8, 16)];
const VCPU_CONSTANT: &[(u16, usize)] = &[(1, 40), (2, 4)];

#[test]
fn vcpus_are_saved_as_the_release_before_reads_them() {
    let Some(mut machine) = asking() else { return };
    let state = saved(&mut machine, NEWEST);
    let of = |kind| layout(&state.iter().find(|it| it.0 == kind).unwrap().3);
    let same = |found: &[(u16, usize)], kept: &[(u16, usize)]| {
        found.len() == kept.len()
            && found.iter().zip(kept).all(|(is, was)| is.0 == was.0 && is.1 != 0 && is.1 % was.1 == 0)
    };
    for (kind, kept) in [(StateKind::Vcpu, VCPU), (StateKind::VcpuConstant, VCPU_CONSTANT)] {
        assert!(same(&of(kind), kept), "{kind:?} has {:?}: {REMEDY}", of(kind));
    }
}

#[test]
fn state_is_written_in_the_versions_that_were_asked_for() {
    let Some(mut machine) = asking() else { return };
    for versions in [NEWEST, V1] {
        let state = saved(&mut machine, versions);
        for (kind, version, ..) in &state {
            assert_eq!(*version, versions.of(*kind), "{kind:?}");
        }
        let is_there = field(&state.iter().find(|it| it.0 == StateKind::Vm).unwrap().3, ASKED_BY).is_some();
        assert_eq!(is_there, versions == NEWEST);
        let (mut copy, events) = self::machine(&host().unwrap(), 1, BackendChoice::Auto);
        restore(&mut copy, &state).unwrap();
        copy.go_live(false);
        let way = if is_there { ResetWay::PowerPort } else { ResetWay::Acpi };
        assert_eq!(asked(&events), MachineEvent::Power(PowerRequest::Reset(way)));
    }
}

#[test]
fn a_newer_state_is_refused_with_its_version_and_the_remedy() {
    let Some(mut machine) = asking() else { return };
    let mut state = saved(&mut machine, NEWEST);
    vm(&mut state).1 = 3;
    let (mut copy, _events) = self::machine(&host().unwrap(), 1, BackendChoice::Auto);
    let error = restore(&mut copy, &state).unwrap_err();
    let expected = StateError::Version { kind: StateKind::Vm, version: 3, oldest: 1, newest: 2 };
    assert!(matches!(&error, RestoreError::State(state) if *state == expected), "{error}");
    let words = "state section Vm has version 3, this host reads 1 to 2: upgrade Outlive on the older host";
    assert_eq!(error.to_string(), words);

    // Version 2 has a field that version 1 has not.
    let mut state = saved(&mut machine, V1);
    vm(&mut state).1 = 2;
    let error = restore(&mut copy, &state).unwrap_err().to_string();
    assert!(error.contains("state field 7 is missing"), "{error}");
}

#[test]
fn a_press_of_the_power_button_is_in_the_next_checkpoint() {
    let Some(mut machine) = asking() else { return };
    let before = saved(&mut machine, NEWEST);
    machine.press_power_button().unwrap();
    let mut state = saved(&mut machine, NEWEST);
    let waits = |state: &[Saved]| waiting(&state.iter().find(|it| it.0 == StateKind::Vm).unwrap().3) & BUTTON;
    assert_eq!((waits(&before), waits(&state)), (0, BUTTON));

    let (mut copy, _events) = self::machine(&host().unwrap(), 1, BackendChoice::Auto);
    restore(&mut copy, &state).unwrap();
    copy.go_live(false);
    copy.enable_tracking().unwrap();
    state = saved(&mut copy, NEWEST);
    assert_eq!(waits(&state), BUTTON, "a standby that has taken over has it too");
}
