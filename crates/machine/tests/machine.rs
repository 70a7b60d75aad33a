//! A machine on real KVM: stopping, capturing and restoring guests that would notice a mistake.

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use outlive_dirty::{BackendChoice, Gfn};
use outlive_epoch::image::{StateKind, StateSection};
use outlive_machine::state::StateError;
use outlive_machine::{
    After, CaptureReport, CheckError, Hashes, InPause, Machine, MachineEvent, NoSink, Outgoing, PAGE_SIZE,
    PortEnd, PowerRequest, RestoreError, SpillError,
};
use support::{
    A, B, CRASH, IDLER, MEMORY, PORT_READER, POWER_OFF, STRING_READER, TWO_COUNTERS, boot, booted, host,
    machine, machine_with,
};
use vm_memory::{Bytes, GuestAddress};

fn word(machine: &Machine, address: u64) -> u64 {
    machine.ram().memory().read_obj(GuestAddress(address)).unwrap()
}

#[derive(Default)]
struct Parts {
    counted: usize,
    spilled: Vec<(Gfn, Vec<u8>)>,
    state: Saved,
}

impl InPause for Parts {
    fn counted(&mut self, pages: usize) {
        self.counted = pages;
    }

    fn spill(&mut self, staging: &mut Outgoing) -> Result<(), SpillError> {
        self.spilled.extend(pages(staging));
        self.state.extend(sections(staging));
        Ok(())
    }
}

fn pages(staging: &Outgoing) -> Vec<(Gfn, Vec<u8>)> {
    let bytes = staging.page_bytes().chunks_exact(PAGE_SIZE).map(<[u8]>::to_vec);
    staging.gfns().iter().copied().zip(bytes).collect()
}

fn sections(staging: &Outgoing) -> Saved {
    staging.state().sections().map(|s| (s.kind, s.version, s.index, s.bytes.to_vec())).collect()
}

type Saved = Vec<(StateKind, u16, u16, Vec<u8>)>;

/// A standby's memory and state, made of checkpoints alone.
#[derive(Default)]
struct Shadow {
    pages: std::collections::BTreeMap<u64, Vec<u8>>,
    constants: Vec<Vec<u8>>,
    state: Saved,
}

impl Shadow {
    fn checkpoint(&mut self, machine: &mut Machine, staging: &mut Outgoing) -> CaptureReport {
        let mut parts = Parts::default();
        let report = machine.checkpoint(staging, After::Resume, &mut parts).unwrap();
        let all: Vec<_> = parts.spilled.into_iter().chain(pages(staging)).collect();
        assert_eq!((parts.counted, report.pages), (all.len(), all.len()));
        self.pages.extend(all.into_iter().map(|(gfn, bytes)| (gfn.0, bytes)));
        self.state.clear();
        for s in parts.state.into_iter().chain(sections(staging)) {
            if s.0 == StateKind::VcpuConstant {
                self.constants.push(s.3);
            } else {
                self.state.push(s);
            }
        }
        report
    }

    fn sections(&self) -> Vec<StateSection<'_>> {
        self.state
            .iter()
            .map(|(kind, version, index, bytes)| StateSection {
                kind: *kind,
                version: *version,
                index: *index,
                bytes,
            })
            .collect()
    }

    fn restore(&self, machine: &mut Machine) -> Result<(), RestoreError> {
        for (gfn, bytes) in &self.pages {
            assert!(machine.ram().write_page(Gfn(*gfn), bytes.as_slice().try_into().unwrap()));
        }
        machine.restore(&self.constants, &self.sections(), std::time::Duration::ZERO)
    }

    fn word(&self, address: u64) -> u64 {
        let page = &self.pages[&(address / 4096)];
        let at = (address % 4096) as usize;
        u64::from_le_bytes(page[at..at + 8].try_into().unwrap())
    }
}

/// Sends all memory, as base synchronisation does.
fn protect(machine: &mut Machine) -> Shadow {
    machine.enable_tracking().unwrap();
    let mut shadow = Shadow::default();
    let mut page = [0u8; PAGE_SIZE];
    for gfn in machine.ram().gfns() {
        machine.ram().read_page(gfn, &mut page);
        if page.iter().any(|&b| b != 0) {
            shadow.pages.insert(gfn.0, page.to_vec());
        }
    }
    shadow
}

fn trackers() -> [BackendChoice; 2] {
    [BackendChoice::Ring, BackendChoice::Bitmap]
}

#[test]
fn a_paused_guest_stands_still_and_goes_on() {
    let Some(host) = host() else { return };
    let (mut machine, _events) = booted(&host, 2, BackendChoice::Auto, TWO_COUNTERS);
    machine.resume();
    for _ in 0..200 {
        std::thread::sleep(Duration::from_micros(300));
        machine.pause();
        let before = (word(&machine, A), word(&machine, A + 4096));
        std::thread::sleep(Duration::from_micros(300));
        assert_eq!((word(&machine, A), word(&machine, A + 4096)), before);
        machine.resume();
    }
    machine.pause();
    assert!(word(&machine, A) > 0 && word(&machine, A + 4096) > 0, "both vCPUs ran");
}

/// The heart: after every checkpoint a second machine, made of checkpoints alone, goes on where the
/// first one was. Registers and memory that do not belong together would show at once.
#[test]
fn a_machine_goes_on_from_any_checkpoint() {
    let Some(host) = host() else { return };
    for tracker in trackers() {
        let (mut first, _events) = booted(&host, 2, tracker, TWO_COUNTERS);
        first.resume();
        let mut staging = Outgoing::new(2048, 0).unwrap();
        let mut shadow = protect(&mut first);
        for round in 0..60 {
            for _ in 0..1 + round % 4 {
                std::thread::sleep(Duration::from_micros(200 + 37 * round));
                shadow.checkpoint(&mut first, &mut staging);
            }
            let at = [0, 4096].map(|vcpu| (shadow.word(A + vcpu), shadow.word(B + vcpu)));
            for (a, b) in at {
                assert!(a == b || a == b + 1, "A {a} and B {b} are of different moments");
            }
            if round % 6 != 0 {
                continue;
            }
            let (mut second, _events) = machine(&host, 2, tracker);
            shadow.restore(&mut second).unwrap();
            assert_eq!(word(&second, A), at[0].0);
            second.resume();
            let deadline = Instant::now() + Duration::from_secs(10);
            while [0, 4096].iter().any(|v| word(&second, A + v) <= at[(*v / 4096) as usize].0) {
                assert!(Instant::now() < deadline, "the restored guest does not run");
            }
            second.pause();
            for (vcpu, (before, _)) in [0, 4096].into_iter().zip(at) {
                let (a, b) = (word(&second, A + vcpu), word(&second, B + vcpu));
                // Ran natively for milliseconds: far fewer than 2^32 steps, so a wild register shows.
                assert!(a >= before && a - before < 1 << 32, "{before} -> {a}");
                assert!(a == b || a == b + 1, "{a} {b}");
            }
        }
    }
}

/// The self-check finds a copy of which one byte is wrong, and nothing else.
#[test]
fn a_copy_that_is_not_the_vm_is_found() {
    let Some(host) = host() else { return };
    let (mut first, _events) = booted(&host, 1, BackendChoice::Auto, TWO_COUNTERS);
    first.resume();
    let mut staging = Outgoing::new(2048, 0).unwrap();
    let mut shadow = protect(&mut first);
    let (copy, _events) = machine(&host, 1, BackendChoice::Auto);
    let compare = |shadow: &Shadow| {
        for (gfn, bytes) in &shadow.pages {
            copy.ram().write_page(Gfn(*gfn), bytes.as_slice().try_into().unwrap());
        }
        let check = shadow.state.iter().find(|(kind, ..)| *kind == StateKind::Check).unwrap();
        Hashes::decode(&check.3).unwrap().compare_memory(copy.ram())
    };
    for round in 0..10 {
        std::thread::sleep(Duration::from_millis(2));
        first.check_next(Vec::new());
        shadow.checkpoint(&mut first, &mut staging);
        assert_eq!(compare(&shadow), Ok(()), "{round}");
    }
    let page = shadow.pages.get_mut(&(B / 4096)).unwrap();
    page[4095] ^= 0x10;
    assert!(matches!(compare(&shadow), Err(CheckError::Memory { .. })));
    shadow.checkpoint(&mut first, &mut staging);
    assert!(shadow.state.iter().all(|(kind, ..)| *kind != StateKind::Check), "only where it was asked for");
}

/// Rule 3 of vcpu/mod.rs: an `in` that is under way when the vCPU is stopped is completed before the
/// state is saved. Without it the restored guest reads 0 from the port and panics.
#[test]
fn a_port_read_is_never_cut_in_two() {
    let Some(host) = host() else { return };
    let (mut first, events) = booted(&host, 1, BackendChoice::Ring, PORT_READER);
    first.resume();
    let mut staging = Outgoing::new(256, 0).unwrap();
    let mut shadow = protect(&mut first);
    for round in 0..120 {
        std::thread::sleep(Duration::from_micros(50 + round));
        shadow.checkpoint(&mut first, &mut staging);
        let (mut second, second_events) = machine(&host, 1, BackendChoice::Ring);
        shadow.restore(&mut second).unwrap();
        second.resume();
        let deadline = Instant::now() + Duration::from_secs(10);
        while word(&second, A) <= shadow.word(A) && second_events.try_recv().is_err() {
            assert!(Instant::now() < deadline, "the restored guest does not run");
        }
        assert!(second_events.try_recv().is_err(), "the restored guest read a wrong value");
    }
    assert!(events.try_recv().is_err());
}

#[test]
fn a_string_instruction_reads_one_register_again_and_again() {
    let Some(host) = host() else { return };
    let end = PortEnd::new(Arc::new(NoSink)).unwrap();
    let (mut machine, events) = machine_with(&host, 1, BackendChoice::Auto, Some(end.clone()));
    boot(&mut machine, STRING_READER);
    machine.go_live(false);
    machine.resume();
    assert_eq!(end.input.push(b"1234"), 4);
    let event = events.recv_timeout(Duration::from_secs(20)).unwrap();
    assert_eq!(event, MachineEvent::Power(PowerRequest::Off));
    machine.pause();
    assert_eq!(word(&machine, A), u64::from_le_bytes(*b"1234\0\0\0\0"));
}

#[test]
fn an_idle_guest_stays_idle_through_checkpoints() {
    let Some(host) = host() else { return };
    let (mut machine, _events) = booted(&host, 1, BackendChoice::Ring, IDLER);
    machine.resume();
    std::thread::sleep(Duration::from_millis(20));
    let mut staging = Outgoing::new(256, 0).unwrap();
    let mut shadow = protect(&mut machine);
    // The first checkpoint may still find the pages of the boot.
    shadow.checkpoint(&mut machine, &mut staging);
    for _ in 0..200 {
        let report = shadow.checkpoint(&mut machine, &mut staging);
        assert_eq!(report.pages, 0, "an idle guest dirties nothing");
    }
    assert_eq!(word(&machine, A), 1, "no checkpoint woke the guest");
}

/// More dirty pages than staging has room for: the checkpoint comes in parts and loses none.
#[test]
fn a_checkpoint_larger_than_staging_comes_in_parts() {
    let Some(host) = host() else { return };
    for tracker in trackers() {
        let (mut first, _events) = booted(&host, 1, tracker, TWO_COUNTERS);
        first.resume();
        let mut shadow = protect(&mut first);
        first.tracker().all_dirty();
        let mut staging = Outgoing::new(100, 0).unwrap();
        let report = shadow.checkpoint(&mut first, &mut staging);
        assert_eq!(report.pages as u64, MEMORY / 4096);
        assert_eq!(shadow.pages.len() as u64, MEMORY / 4096);
        first.pause();
        let (mut second, _events) = machine(&host, 1, tracker);
        shadow.restore(&mut second).unwrap();
        second.resume();
    }
}

/// Pages that are written in every epoch are left writable. They stay part of every checkpoint until whoever
/// has the last copies says that they do not change any more, however late; a page of which that is said wrongly
/// is trapped again.
#[test]
fn a_page_that_is_written_all_the_time_is_hot_until_it_is_found_unchanged() {
    let Some(host) = host() else { return };
    let (mut machine, _events) = booted(&host, 1, BackendChoice::Auto, TWO_COUNTERS);
    let Some(rule) = machine.tracker().hot_rule() else {
        println!("skipped: no page pays to be hot on this machine");
        return;
    };
    machine.resume();
    let mut shadow = protect(&mut machine);
    let mut staging = Outgoing::new(2048, 0).unwrap();
    let run_on = |machine: &Machine| {
        let (before, deadline) = (word(machine, B), Instant::now() + Duration::from_secs(30));
        while word(machine, B) < before + 2 {
            assert!(Instant::now() < deadline, "the guest stands still");
            std::thread::sleep(Duration::from_micros(200));
        }
    };
    for _ in 0..20 {
        run_on(&machine);
        shadow.checkpoint(&mut machine, &mut staging);
    }
    let hot = machine.tracker().stats().hot;
    assert!(hot >= 2, "{hot} hot pages of a guest that writes two pages all the time");
    machine.pause();
    let mut epochs = 0;
    while machine.tracker().stats().hot > 0 {
        shadow.checkpoint(&mut machine, &mut staging);
        (0..staging.gfns().len()).for_each(|place| staging.unchanged(place));
        epochs += 1;
        assert!(epochs < 20 + 10 * rule.max_gap, "{:?}", machine.tracker().stats());
    }
    // Wrongly said, again and again.
    machine.resume();
    for _ in 0..60 {
        run_on(&machine);
        shadow.checkpoint(&mut machine, &mut staging);
        (0..staging.gfns().len()).for_each(|place| staging.unchanged(place));
        let (a, b) = (shadow.word(A), shadow.word(B));
        assert!(a == b || a == b + 1, "A {a} and B {b} are of different moments");
    }
    machine.pause();
    shadow.checkpoint(&mut machine, &mut staging);
    assert_eq!((shadow.word(A), shadow.word(B)), (word(&machine, A), word(&machine, B)));
}

/// Invariant 4: what the VMM itself writes is in the next checkpoint.
/// Times that are written by one thread and read by another: none is of another pause, none is missing.
#[test]
fn the_phases_of_a_pause_are_told_and_how_the_guest_went_on() {
    let Some(host) = host() else { return };
    for vcpus in [1, 2] {
        let (mut machine, _events) = booted(&host, vcpus, BackendChoice::Ring, TWO_COUNTERS);
        machine.resume();
        machine.enable_tracking().unwrap();
        let mut staging = Outgoing::new(256, 0).unwrap();
        let mut checkpoint = |machine: &mut Machine, after| {
            // Until every vCPU has been in the guest: on a busy host that may take a while.
            for counter in &[A, B][..usize::from(vcpus)] {
                let (before, deadline) = (word(machine, *counter), Instant::now() + Duration::from_secs(30));
                while word(machine, *counter) == before {
                    assert!(Instant::now() < deadline, "the guest stands still");
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
            let started = Instant::now();
            let report = machine.checkpoint(&mut staging, after, &mut Parts::default()).unwrap();
            assert!(report.pause <= started.elapsed());
            report
        };
        let mut before: Option<CaptureReport> = None;
        for round in 0..30 {
            let report = checkpoint(&mut machine, After::Resume);
            let CaptureReport { pause, stop, state, harvest, handover, rearm, decide, copy, .. } = report;
            let out = state + harvest + handover + rearm + decide + copy;
            if vcpus == 1 {
                assert!(stop + out <= pause, "{report:?}");
            }
            assert!(!stop.is_zero() && !state.is_zero() && !copy.is_zero(), "{report:?}");
            assert_eq!(report.returned.is_some(), round > 0, "known at the next one");
            if let (Some(before), Some(returned)) = (before, report.returned) {
                // It left the guest before the last one did, and went back after the copy.
                let least = before.state.max(before.copy) + returned.resume;
                assert!(returned.vcpu_pause >= least, "{returned:?} after {before:?}");
                assert!(
                    returned.vcpu_pause < Duration::from_secs(2),
                    "{returned:?}: that is the guest's time"
                );
            }
            before = Some(report);
        }
        // A stop of another kind in between is no pause of a checkpoint.
        let gfns = &mut Vec::new();
        machine.take_dirty(gfns).unwrap();
        assert!(checkpoint(&mut machine, After::Resume).returned.is_none());
        assert!(checkpoint(&mut machine, After::Stay).returned.is_some());
    }
}

#[test]
fn writes_of_the_vmm_are_in_the_checkpoint() {
    let Some(host) = host() else { return };
    for tracker in trackers() {
        let (mut machine, _events) = booted(&host, 1, tracker, IDLER);
        machine.resume();
        std::thread::sleep(Duration::from_millis(20));
        let mut staging = Outgoing::new(256, 0).unwrap();
        let mut shadow = protect(&mut machine);
        shadow.checkpoint(&mut machine, &mut staging);
        for round in 1..50u64 {
            let address = 0x80_0000 + 8192 * round - 3;
            machine.ram().memory().write_slice(&[round as u8; 6], GuestAddress(address)).unwrap();
            shadow.checkpoint(&mut machine, &mut staging);
            let mut found: Vec<_> = staging.gfns().iter().map(|g| g.0).collect();
            found.sort_unstable();
            assert_eq!(found, [(address / 4096), (address / 4096) + 1]);
        }
    }
}

#[test]
fn the_end_of_a_guest_is_told_once() {
    let Some(host) = host() else { return };
    for (code, check) in [(POWER_OFF, true), (CRASH, false)] {
        let (mut machine, events) = booted(&host, 1, BackendChoice::Auto, code);
        machine.enable_tracking().unwrap();
        machine.resume();
        let event = events.recv_timeout(Duration::from_secs(20)).unwrap();
        if check {
            assert_eq!(event, MachineEvent::Power(PowerRequest::Off));
        } else {
            assert!(matches!(event, MachineEvent::Crashed { vcpu: 0, .. }), "{event:?}");
        }
        // The last checkpoint of an ended guest can still be taken.
        let mut staging = Outgoing::new(256, 0).unwrap();
        machine.checkpoint(&mut staging, After::Stay, &mut Parts::default()).unwrap();
        assert!(events.try_recv().is_err());
    }
}

#[test]
fn state_that_does_not_fit_is_refused() {
    let Some(host) = host() else { return };
    let (mut first, _events) = booted(&host, 2, BackendChoice::Auto, TWO_COUNTERS);
    first.resume();
    let mut staging = Outgoing::new(2048, 0).unwrap();
    let mut shadow = protect(&mut first);
    shadow.checkpoint(&mut first, &mut staging);

    let (mut other, _events) = machine(&host, 1, BackendChoice::Auto);
    assert!(matches!(shadow.restore(&mut other), Err(RestoreError::State(StateError::Section { .. }))));

    let (mut second, _events) = machine(&host, 2, BackendChoice::Auto);
    let good = shadow.state.clone();
    for at in 0..good.len() {
        shadow.state = good.clone();
        shadow.state[at].1 = 9;
        assert!(matches!(shadow.restore(&mut second), Err(RestoreError::State(StateError::Version { .. }))));
        shadow.state = good.clone();
        shadow.state[at].3.truncate(good[at].3.len() - 1);
        assert!(shadow.restore(&mut second).is_err(), "a cut section {at}");
        shadow.state = good.clone();
        shadow.state.remove(at);
        assert!(shadow.restore(&mut second).is_err(), "a missing section {at}");
    }
    shadow.state = good;
    shadow.restore(&mut second).unwrap();
}
