//! A guest that is booted as Linux is, on real KVM: a few instructions in the place of a kernel, which end
//! the machine in every way that kernels know.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use outlive_dirty::BackendChoice;
use outlive_epoch::image::{StateKind, StateSection};
use outlive_machine::{
    After, Host, HostError, InPause, LinuxBoot, Machine, MachineEvent, NoSink, Options, Outgoing, OutputMode,
    PortEnd, PowerRequest, ResetWay, SpillError,
};
use vm_memory::{Bytes, GuestAddress};

/// Counts the starts, in memory that no boot writes.
const COUNTER: u64 = 0x5_0000;
/// Where a kernel that found its parameters says so.
const PARAMETERS_SEEN: u64 = 0x5_0008;

/// `out port, value` when this is the start number `start`.
fn out_at(start: u8, port: u32, value: u8) -> Vec<u8> {
    let [a, b, c, d] = port.to_le_bytes();
    // cmp ecx, start; jne past; mov edx, port; mov al, value; out dx, al
    vec![0x83, 0xf9, start, 0x75, 0x08, 0xba, a, b, c, d, 0xb0, value, 0xee]
}

/// The code: counts its start, looks whether the parameters are where rsi points, and ends by the way of this
/// start.
fn code() -> Vec<u8> {
    let mut code = vec![
        0x48, 0xc7, 0xc3, 0x00, 0x00, 0x05, 0x00, // mov rbx, COUNTER
        0xff, 0x03, // inc dword [rbx]
        0x8b, 0x0b, // mov ecx, [rbx]
        0x8b, 0x86, 0x02, 0x02, 0x00, 0x00, // mov eax, [rsi + 0x202]
        0x89, 0x43, 0x08, // mov [rbx + 8], eax
    ];
    code.extend(out_at(1, 0x602, 1)); // ACPI reset register
    code.extend(out_at(2, 0x64, 0xfe)); // keyboard controller
    code.extend(out_at(3, 0xcf9, 0x06)); // chip set
    // cmp ecx, 4; jne past; push 0; push 0; lidt [rsp]; mov eax, [512 GiB]: a page fault without a handler
    code.extend([0x83, 0xf9, 4, 0x75, 17, 0x6a, 0, 0x6a, 0, 0x0f, 0x01, 0x1c, 0x24]);
    code.extend([0xa1, 0, 0, 0, 0, 0x80, 0, 0, 0]);
    code.extend(out_at(5, 0x510, 1)); // pvpanic, and on
    code.extend(out_at(5, 0x600, 0x34)); // ACPI sleep control: S5
    code.extend([0xf4, 0xeb, 0xfd]); // hlt for ever
    code
}

/// The least that is a bzImage.
fn kernel() -> Vec<u8> {
    const SETUP: usize = 5 * 512;
    let mut image = vec![0; SETUP + 0x1000];
    let mut set = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    set(0x1f1, &[4]);
    set(0x1f4, &0x100u32.to_le_bytes());
    set(0x201, &[0x6a]);
    set(0x202, b"HdrS");
    set(0x206, &0x020fu16.to_le_bytes());
    set(0x211, &[1]);
    set(0x22c, &0x7fff_ffffu32.to_le_bytes());
    set(0x236, &[1]);
    set(0x238, &2047u32.to_le_bytes());
    set(0x258, &0x100_0000u64.to_le_bytes());
    set(0x260, &0x1000u32.to_le_bytes());
    set(SETUP + 0x200, &code());
    image
}

fn boot() -> LinuxBoot {
    LinuxBoot::new(kernel(), vec![7; 10_000], "console=ttyS0".into()).unwrap()
}

/// A machine with the guest at its first instruction; none without KVM.
fn booted(vcpus: u8, memory: u64, firmware_bytes: u64) -> Option<(Machine, Receiver<MachineEvent>)> {
    let host = match Host::open() {
        Ok(host) => Arc::new(host),
        Err(HostError::Missing) => {
            println!("skipped: no /dev/kvm");
            return None;
        }
        Err(other) => panic!("{other}"),
    };
    let (tx, rx) = channel();
    let options = Options {
        vcpus,
        memory,
        firmware_bytes,
        output: OutputMode::PassThrough,
        net: None,
        disks: Vec::new(),
        rng: true,
        console: Some(PortEnd::new(Arc::new(NoSink)).unwrap()),
        serial: Some(PortEnd::new(Arc::new(NoSink)).unwrap()),
        tracker: BackendChoice::Auto,
        trigger: 1024,
        max_dirty: 2048,
        events: Arc::new(move |event| drop(tx.send(event))),
    };
    Some((Machine::new(host, &options).unwrap(), rx))
}

fn event(events: &Receiver<MachineEvent>) -> MachineEvent {
    events.recv_timeout(Duration::from_secs(20)).expect("the guest ends itself")
}

fn word(machine: &Machine, address: u64) -> u32 {
    machine.ram().memory().read_obj(GuestAddress(address)).unwrap()
}

#[test]
fn a_guest_restarts_in_every_way_that_kernels_know_and_then_switches_off() {
    // The second size puts the boot image behind memory above 4 GiB.
    for (vcpus, memory) in [(1, 64 << 20), (3, 5 << 30)] {
        let Some((mut machine, events)) = booted(vcpus, memory, boot().firmware_bytes()) else { return };
        machine.boot_linux(&boot()).unwrap();
        machine.go_live(false);
        machine.resume();
        let ways = [ResetWay::Acpi, ResetWay::Keyboard, ResetWay::ResetControl, ResetWay::TripleFault];
        for (start, way) in (1..).zip(ways) {
            assert_eq!(event(&events), MachineEvent::Power(PowerRequest::Reset(way)), "start {start}");
            assert_eq!(word(&machine, COUNTER), start);
            assert_eq!(word(&machine, PARAMETERS_SEEN), u32::from_le_bytes(*b"HdrS"));
            // A reset does not rely on anything that the guest has left.
            machine.ram().memory().write_slice(&[0xcc; 4096], GuestAddress(0x7000)).unwrap();
            machine.ram().memory().write_slice(&[0xcc; 4096], GuestAddress(0x100_0000)).unwrap();
            machine.reset().unwrap();
        }
        assert_eq!(event(&events), MachineEvent::GuestPanicked);
        assert_eq!(event(&events), MachineEvent::Power(PowerRequest::Off));
        machine.press_power_button().unwrap();
    }
}

/// No checkpoint here is larger than its staging.
struct Nothing;

impl InPause for Nothing {
    fn counted(&mut self, _pages: usize) {}

    fn spill(&mut self, _staging: &mut Outgoing) -> Result<(), SpillError> {
        Err("a checkpoint in parts".into())
    }
}

/// The access to the port is over when the checkpoint is taken, and who was told dies before it has done
/// anything.
#[test]
fn what_a_guest_has_asked_for_is_asked_again_after_a_takeover() {
    let Some((mut machine, events)) = booted(1, 64 << 20, boot().firmware_bytes()) else { return };
    machine.boot_linux(&boot()).unwrap();
    machine.go_live(false);
    machine.resume();
    machine.enable_tracking().unwrap();
    assert_eq!(event(&events), MachineEvent::Power(PowerRequest::Reset(ResetWay::Acpi)));
    let mut staging = Outgoing::new(8192, 0).unwrap();
    machine.checkpoint(&mut staging, After::Stay, &mut Nothing).unwrap();

    let Some((mut copy, events)) = booted(1, 64 << 20, boot().firmware_bytes()) else { return };
    let mut page = vec![0; 4096];
    for frame in 0..(64 << 20) / 4096 {
        let address = GuestAddress(frame * 4096);
        machine.ram().memory().read_slice(&mut page, address).unwrap();
        copy.ram().memory().write_slice(&page, address).unwrap();
    }
    let constants: Vec<Vec<u8>> = staging
        .state()
        .sections()
        .filter(|it| it.kind == StateKind::VcpuConstant)
        .map(|it| it.bytes.to_vec())
        .collect();
    let sections: Vec<StateSection<'_>> =
        staging.state().sections().filter(|it| it.kind != StateKind::VcpuConstant).collect();
    copy.restore(&constants, &sections, Duration::ZERO).unwrap();
    copy.go_live(true);
    copy.resume();
    assert_eq!(event(&events), MachineEvent::Power(PowerRequest::Reset(ResetWay::Acpi)));
}

#[test]
fn a_machine_without_a_boot_image_refuses_linux_and_resets() {
    let Some((mut machine, _events)) = booted(1, 64 << 20, 0) else { return };
    assert!(!machine.can_reset());
    assert!(machine.boot_linux(&boot()).unwrap_err().to_string().contains("boot image"));
    assert!(machine.reset().is_err());
}

#[test]
fn a_guest_that_overwrites_its_boot_image_cannot_restart() {
    let Some((mut machine, events)) = booted(1, 64 << 20, boot().firmware_bytes()) else { return };
    machine.boot_linux(&boot()).unwrap();
    machine.resume();
    assert_eq!(event(&events), MachineEvent::Power(PowerRequest::Reset(ResetWay::Acpi)));
    machine.ram().memory().write_slice(&[0xff; 64], GuestAddress(64 << 20)).unwrap();
    let error = machine.reset().unwrap_err();
    assert!(error.to_string().contains("damaged"), "{error}");
}

#[test]
fn thirty_two_processors_are_made() {
    let Some((mut machine, events)) = booted(32, 64 << 20, boot().firmware_bytes()) else { return };
    machine.boot_linux(&boot()).unwrap();
    machine.resume();
    assert_eq!(event(&events), MachineEvent::Power(PowerRequest::Reset(ResetWay::Acpi)));
}
