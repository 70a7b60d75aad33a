//! What a host does to a guest, on real KVM: its faults are not the guest's, and a thread that does not come
//! is told in time.

#![allow(missing_docs)]
// UNSAFETY: takes a page of the guest's memory away.
#![allow(unsafe_code)]
#![allow(dead_code, reason = "the guests of the other tests")]

mod support;

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use outlive_dirty::BackendChoice;
use outlive_machine::{
    After, CaptureError, InPause, Machine, MachineEvent, Outgoing, PAGE_SIZE, PayloadOptions, SpillError,
    Stuck, VcpuError,
};
use support::{A, POWER_OFF, TWO_COUNTERS, booted, elf, host, options};

struct Nothing;

impl InPause for Nothing {
    fn counted(&mut self, _pages: usize) {}

    fn spill(&mut self, _outgoing: &mut Outgoing) -> Result<(), SpillError> {
        Err("a checkpoint in parts".into())
    }
}

fn checkpoint(machine: &mut Machine, outgoing: &mut Outgoing) -> Result<(), CaptureError> {
    machine.checkpoint(outgoing, After::Resume, &mut Nothing).map(drop)
}

fn event(events: &Receiver<MachineEvent>) -> MachineEvent {
    events.recv_timeout(Duration::from_secs(20)).expect("the machine says what happened")
}

/// Gives the page at `address` these rights.
fn protect(machine: &Machine, address: u64, rights: libc::c_int) {
    let slot = machine.ram().slots()[0];
    let page = slot.host_addr + address;
    // SAFETY: a page of the guest's memory, which nobody reads here before it has its rights again.
    assert_eq!(unsafe { libc::mprotect(page as *mut _, PAGE_SIZE, rights) }, 0);
}

#[test]
fn memory_that_the_host_cannot_give_is_a_fault_of_the_host() {
    let Some(host) = host() else { return };
    for tracker in [BackendChoice::Ring, BackendChoice::Bitmap] {
        let (mut machine, events) = booted(&host, 2, tracker, TWO_COUNTERS);
        machine.enable_tracking().unwrap();
        machine.resume();
        let mut outgoing = Outgoing::new(2048, 0).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        checkpoint(&mut machine, &mut outgoing).unwrap();
        protect(&machine, A, libc::PROT_NONE);
        let MachineEvent::HostFault { vcpu: 0, why } = event(&events) else { panic!("no fault of the host") };
        assert!(why.contains("Bad address"), "{why}");
        // What KVM says of its registers may be old, so no checkpoint is taken of it.
        let error = checkpoint(&mut machine, &mut outgoing).unwrap_err();
        assert!(matches!(error, CaptureError::Vcpu(VcpuError::HostFault { vcpu: 0, .. })), "{error}");
        assert!(error.is_fatal() && !error.is_overrun());
        protect(&machine, A, libc::PROT_READ | libc::PROT_WRITE);
        assert!(checkpoint(&mut machine, &mut outgoing).is_err(), "it does not heal");
        machine.blame_guest();
        checkpoint(&mut machine, &mut outgoing).unwrap();
        assert!(events.try_recv().is_err(), "it is told once");
    }
}

/// Jumps to where no memory is: no processor can run that, and KVM says so by an internal error.
const NOWHERE: &[u8] = &[0xb8, 0, 0x10, 0, 0xd0, 0xff, 0xe0]; // mov eax, 0xd0001000; jmp rax

#[test]
fn an_internal_error_of_kvm_is_a_fault_of_the_host() {
    let Some(host) = host() else { return };
    let (mut machine, events) = booted(&host, 1, BackendChoice::Auto, NOWHERE);
    machine.resume();
    let MachineEvent::HostFault { vcpu: 0, why } = event(&events) else { panic!("no fault of the host") };
    assert!(why.contains("KVM_EXIT_INTERNAL_ERROR, suberror"), "{why}");
}

#[test]
fn a_vcpu_that_does_not_stop_is_told_in_time() {
    let Some(host) = host() else { return };
    let (came, has_come) = channel();
    let hold = Arc::new(Mutex::new(()));
    let held = hold.lock().unwrap();
    let waits = hold.clone();
    let mut options = options(1, BackendChoice::Auto);
    // Called on the vCPU's thread, which so stays where it is.
    options.events = Arc::new(move |_| {
        came.send(()).unwrap();
        drop(waits.lock());
    });
    let mut machine = Machine::new(host, &options).unwrap();
    let start = PayloadOptions { ipv4: [10, 0, 0, 2], prefix: 24, gateway: [0; 4], random_seed: [0; 32] };
    machine.boot_payload(&elf(POWER_OFF), &start).unwrap();
    machine.enable_tracking().unwrap();
    machine.resume();
    has_come.recv_timeout(Duration::from_secs(20)).unwrap();
    let (budget, stops) = (Duration::from_millis(200), machine.progress().count());
    machine.set_stop_budget(Some(budget));
    let mut outgoing = Outgoing::new(2048, 0).unwrap();
    let began = Instant::now();
    let error = checkpoint(&mut machine, &mut outgoing).unwrap_err();
    assert!((budget..Duration::from_secs(10)).contains(&began.elapsed()), "{:?}", began.elapsed());
    assert!(matches!(error, CaptureError::Stuck(Stuck::Vcpus { missing: 1, vcpus: 1 })), "{error}");
    assert!(error.is_fatal());
    assert_eq!(machine.progress().count(), stops, "nothing has got on");
    // The machine waits for its thread when it is dropped.
    drop(held);
}

#[test]
fn a_device_that_does_not_rest_is_told_in_time_and_one_that_does_is_waited_for() {
    let gate = Arc::new(outlive_machine::devices::gate::DeviceGate::new());
    let pass = gate.enter();
    let begun = Instant::now();
    let budget = Duration::from_millis(100);
    assert!(!gate.close_until(begun + budget) && begun.elapsed() >= budget);
    assert!(gate.try_enter().is_none(), "it is closed all the same");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            drop(pass);
        });
        assert!(gate.close_until(Instant::now() + Duration::from_secs(20)));
    });
}

#[test]
fn stops_are_progress() {
    let Some(host) = host() else { return };
    let (mut machine, _events) = booted(&host, 1, BackendChoice::Auto, TWO_COUNTERS);
    let progress = machine.progress().clone();
    machine.enable_tracking().unwrap();
    machine.resume();
    let mut outgoing = Outgoing::new(2048, 0).unwrap();
    let before = progress.count();
    for _ in 0..5 {
        checkpoint(&mut machine, &mut outgoing).unwrap();
    }
    assert_eq!(progress.count(), before + 5);
    progress.bump();
    assert_eq!(progress.count(), before + 6);
}
