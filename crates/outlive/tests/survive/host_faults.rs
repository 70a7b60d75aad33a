//! A host that is broken, not dead: KVM can no longer run the guest, or a thread never comes back. The VM
//! continues on the other host.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use nix::sys::signal::Signal;

use outlive::events::{Event, Part};

use crate::support::{Dice, Held, MEMORY, Process, Side, Witnesses, World, take_program_memory};

/// How long the guest may have run before its host breaks.
const SPAN: Duration = Duration::from_millis(200);

/// Breaks the host of a protected VM: it ends, and the standby takes over. Returns the host's exit code and log.
fn survives(break_host: impl Fn(&Process) -> Option<Held>) -> Option<(i32, String)> {
    let world = World::new()?;
    let mut dice = Dice::new();
    let (mut active, mut standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 4);
    dice.sleep_below(SPAN);
    let held = break_host(&active);
    standby.wait_takeover();
    drop(held);
    let code = active.wait_exit();
    let _new = world.standby(Side::A);
    standby.wait_protected();
    witnesses.hear_all();
    witnesses.finish(&world);
    Some((code, active.log()))
}

#[test]
fn a_host_whose_kvm_fails_leaves_the_vm_to_its_standby() {
    let ended = survives(|active| {
        take_program_memory(active, MEMORY);
        None
    });
    let Some((code, log)) = ended else { return };
    let words = ["a fault of this host", "leaving it to its standby"];
    assert!(code == 1 && words.iter().all(|word| log.contains(word)), "{code}\n{log}");
}

/// The vCPU may have stopped in the midst of something that the coordinator waits for, and on a busy machine the
/// standby may be faster than whoever notices it first.
#[test]
fn a_host_with_a_vcpu_that_does_not_stop_leaves_the_vm_to_its_standby() {
    let ended = survives(|active| Some(Held::thread(active, "vcpu0")));
    let Some((code, log)) = ended else { return };
    let noticed = ["1 of 1 vCPUs did not stop in time", "the thread that takes its checkpoints stands still"];
    let good = match code {
        1 => noticed.iter().any(|word| log.contains(word)),
        code => code == 3,
    };
    assert!(good, "{code}\n{log}");
}

/// The same fault on the second host, soon after the takeover: the guest itself breaks its hosts.
#[test]
fn a_guest_that_every_host_fails_on_has_crashed() {
    let Some(world) = World::new() else { return };
    let (active, mut standby) = world.protected(Side::A);
    take_program_memory(&active, MEMORY);
    standby.wait_takeover();
    take_program_memory(&standby, MEMORY);
    assert_eq!(standby.wait_exit(), 1);
    assert!(standby.log().contains("soon after the takeover"), "{}", standby.log());
    assert!(standby.has(|e| matches!(e, Event::Ended { reason, .. } if reason.contains("crash"))));
}

/// The first host fell silent, as one without power does. So the fault of the second one is another.
#[test]
fn a_fault_soon_after_a_silent_host_was_lost_is_no_crash_of_the_guest() {
    let Some(world) = World::new() else { return };
    let (active, mut standby) = world.protected(Side::A);
    active.signal(Signal::SIGSTOP);
    standby.wait_takeover();
    take_program_memory(&standby, MEMORY);
    assert_eq!(standby.wait_exit(), 1);
    let log = standby.log();
    assert!(log.contains("a fault of this host") && !log.contains("soon after the takeover"), "{log}");
    assert!(standby.has(|e| matches!(e, Event::HostFault { part: Part::Vcpu, kept: None, .. })));
    assert!(!standby.has(|e| matches!(e, Event::Ended { reason, .. } if reason.contains("crash"))));
}

/// A page of this host's memory is broken, and the thread that touches it gets SIGBUS: a vCPU's, the one
/// that sends pages, or a device's. The kernel repeats the signal with each touch;
/// the first one only takes the standard library's handler away.
#[test]
fn a_memory_error_in_any_thread_leaves_the_vm_to_its_standby() {
    let Some(world) = World::new() else { return };
    let (mut active, mut standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    for (side, thread) in [(Side::A, "vcpu0"), (Side::B, "sender"), (Side::A, "outlive-net")] {
        witnesses.hear_all();
        while !active.ended() {
            if let Some(held) = Held::find(&active, thread) {
                held.strike(Signal::SIGBUS);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let status = active.status().expect("it has ended");
        assert_eq!(status.signal(), Some(Signal::SIGBUS as i32), "{thread}: {status}\n{}", active.log());
        standby.wait_takeover();
        active = standby;
        standby = world.standby(side);
        active.wait_protected();
    }
    witnesses.hear_all();
    witnesses.finish(&world);
}

/// Without a standby a host fault is the end of the VM, and no crash of the guest.
#[test]
fn an_unprotected_vm_ends_with_the_reason() {
    let Some(world) = World::new() else { return };
    let mut active = world.run(Side::A);
    active.wait_for("running", |e| matches!(e, Event::Started { .. }));
    take_program_memory(&active, MEMORY);
    assert_eq!(active.wait_exit(), 1);
    let log = active.log();
    assert!(log.contains("a fault of this host") && log.contains("no standby has it"), "{log}");
}
