//! Guests of a few instructions, and the machines that run them.

mod elf;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use outlive_dirty::BackendChoice;
use outlive_machine::{Host, HostError, Machine, MachineEvent, Options, OutputMode, PayloadOptions, PortEnd};

pub(crate) use elf::elf;

/// First counter of a guest.
pub(crate) const A: u64 = 0x40_0000;
/// Second counter of a guest.
pub(crate) const B: u64 = 0x50_0000;
/// Guest memory in bytes.
pub(crate) const MEMORY: u64 = 32 << 20;

/// Adds 1 to rcx, writes it to A + 4096 * vCPU, then to B + 4096 * vCPU, forever.
pub(crate) const TWO_COUNTERS: &[u8] = &[
    0x48, 0xc1, 0xe6, 0x0c, // shl rsi, 12
    0x48, 0xc7, 0xc0, 0, 0, 0x40, 0, // mov rax, A
    0x48, 0xc7, 0xc3, 0, 0, 0x50, 0, // mov rbx, B
    0x48, 0x01, 0xf0, 0x48, 0x01, 0xf3, // add rax, rsi; add rbx, rsi
    0x48, 0xff, 0xc1, // inc rcx
    0x48, 0x89, 0x08, 0x48, 0x89, 0x0b, // mov [rax], rcx; mov [rbx], rcx
    0xeb, 0xf5, // jmp -11
];

/// Reads port 0x80, which no device answers, and panics unless it reads 0xff; counts in A.
pub(crate) const PORT_READER: &[u8] = &[
    0x48, 0xc7, 0xc3, 0, 0, 0x40, 0, // mov rbx, A
    0x31, 0xc0, 0xe4, 0x80, 0x3c, 0xff, // xor eax, eax; in al, 0x80; cmp al, 0xff
    0x75, 0x05, 0x48, 0xff, 0x03, 0xeb, 0xf3, // jne panic; inc [rbx]; jmp -13
    0xb8, 3, 0, 0, 0, 0x66, 0xba, 0x08, 0x05, 0xef, 0xeb, 0xfe, // panic: out 0x508, 3; jmp $
];

/// Counts in A, then idles until woken, forever.
pub(crate) const IDLER: &[u8] = &[
    0x48, 0xc7, 0xc3, 0, 0, 0x40, 0, // mov rbx, A
    0x48, 0xff, 0x03, // inc [rbx]
    0xb8, 0xff, 0xff, 0xff, 0xff, 0x66, 0xba, 0x00, 0x05, 0xef, // out 0x500, u32::MAX
    0xeb, 0xf1, // jmp -15
];

/// Powers the machine off.
pub(crate) const POWER_OFF: &[u8] = &[0xb8, 1, 0, 0, 0, 0x66, 0xba, 0x08, 0x05, 0xef, 0xeb, 0xfe];

/// An undefined instruction without an interrupt table: a triple fault.
pub(crate) const CRASH: &[u8] = &[0x0f, 0x0b];

/// Reads four bytes of COM1 by one string instruction, as soon as there are some, to A; then powers off.
pub(crate) const STRING_READER: &[u8] = &[
    0x66, 0xba, 0xfd, 0x03, 0xec, // mov dx, 0x3fd; in al, dx
    0xa8, 0x01, 0x74, 0xfb, // test al, 1; jz -5
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0x48, 0xc7, 0xc7, 0, 0, 0x40, 0, // mov rdi, A
    0xb9, 4, 0, 0, 0, 0xf3, 0x6c, // mov ecx, 4; rep insb
    0xb8, 1, 0, 0, 0, 0x66, 0xba, 0x08, 0x05, 0xef, 0xeb, 0xfe, // out 0x508, 1; jmp $
];

/// The host's KVM, or a skip that is counted.
pub(crate) fn host() -> Option<Arc<Host>> {
    match Host::open() {
        Ok(host) => Some(Arc::new(host)),
        Err(HostError::Missing) => {
            println!("skipped: no /dev/kvm");
            None
        }
        Err(other) => panic!("{other}"),
    }
}

/// What a machine of the tests is made of.
pub(crate) fn options(vcpus: u8, tracker: BackendChoice) -> Options {
    Options {
        vcpus,
        memory: MEMORY,
        firmware_bytes: 0,
        output: OutputMode::PassThrough,
        net: None,
        disks: Vec::new(),
        rng: false,
        console: None,
        serial: None,
        tracker,
        trigger: 1024,
        max_dirty: 2048,
        events: Arc::new(|_| ()),
    }
}

/// A machine without a guest.
pub(crate) fn machine(
    host: &Arc<Host>,
    vcpus: u8,
    tracker: BackendChoice,
) -> (Machine, Receiver<MachineEvent>) {
    machine_with(host, vcpus, tracker, None)
}

/// A machine without a guest, with a serial port or none.
pub(crate) fn machine_with(
    host: &Arc<Host>,
    vcpus: u8,
    tracker: BackendChoice,
    serial: Option<PortEnd>,
) -> (Machine, Receiver<MachineEvent>) {
    let (tx, rx) = channel();
    let events = Arc::new(move |event| drop(tx.send(event)));
    let options = Options { serial, events, ..options(vcpus, tracker) };
    (Machine::new(host.clone(), &options).unwrap(), rx)
}

/// A machine whose vCPUs stand at the first instruction of `code`.
pub(crate) fn booted(
    host: &Arc<Host>,
    vcpus: u8,
    tracker: BackendChoice,
    code: &[u8],
) -> (Machine, Receiver<MachineEvent>) {
    let (mut machine, events) = machine(host, vcpus, tracker);
    boot(&mut machine, code);
    (machine, events)
}

/// Puts all vCPUs at the first instruction of `code`.
pub(crate) fn boot(machine: &mut Machine, code: &[u8]) {
    let options = PayloadOptions { ipv4: [10, 0, 0, 2], prefix: 24, gateway: [0; 4], random_seed: [0; 32] };
    machine.boot_payload(&elf(code), &options).unwrap();
}
