//! Console and entropy device with any driver, and their registers in any order, for fuzzers.

use std::io;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::COMMON_FEATURES;
use super::console::ConsoleDevice;
use super::rig::{Memory, Rig, Ring, memory};
use super::rng::{EntropySource, RngDevice};
use crate::devices::Device;
use crate::devices::port::{NoSink, PortEnd};

/// Bytes of the guest's memory, which begins with what the input has after its registers.
const MEMORY: usize = 64 << 10;
const QUEUE: u16 = 16;
/// Where the three parts of each queue are: close together, so that short inputs reach all of them.
const RINGS: [[u64; 3]; 2] = [[0, 0x100, 0x140], [0x200, 0x300, 0x340]];
/// Most accesses to registers.
const ACCESSES: usize = 24;
/// A register access of the input: which register, the value.
const ACCESS: usize = 5;

/// A source of the same bytes.
struct Sevens;

impl EntropySource for Sevens {
    fn fill(&self, to: &mut [u8]) -> io::Result<()> {
        to.fill(7);
        Ok(())
    }
}

/// The console: output, and input that waits.
///
/// # Panics
/// If the device does something it must not do.
pub fn console(data: &[u8]) {
    let end = || PortEnd::new(Arc::new(NoSink)).expect("an event");
    let first = end();
    first.input.push(&[b'k'; 1000]);
    let make = |memory: &Arc<Memory>, end: PortEnd| {
        Rig::on(memory.clone(), |host| ConsoleDevice::new(end, host).expect("a console"))
    };
    drive(data, 2, |memory| make(memory, first.clone()), |memory| make(memory, end()));
}

/// The entropy device.
///
/// # Panics
/// If the device does something it must not do.
pub fn rng(data: &[u8]) {
    let make = |memory: &Arc<Memory>| {
        Rig::on(memory.clone(), |host| RngDevice::with_source(Sevens, host).expect("an entropy device"))
    };
    drive(data, 1, make, make);
}

/// Lays the input into memory, boots the device or lets the input do it, accesses registers, and has another
/// device go on with what was saved.
fn drive<D: Device>(
    data: &[u8],
    queues: u32,
    make: impl FnOnce(&Arc<Memory>) -> Rig<D>,
    other: impl FnOnce(&Arc<Memory>) -> Rig<D>,
) {
    let Some((&control, rest)) = data.split_first() else { return };
    let accesses = usize::from(control >> 2).min(ACCESSES).min(rest.len() / ACCESS);
    let (accesses, contents) = rest.split_at(accesses * ACCESS);
    let memory = memory(MEMORY);
    memory.write_slice(&contents[..contents.len().min(MEMORY)], GuestAddress(0)).expect("it fits");
    let rig = make(&memory);
    rig.device.go_live(false);
    if control & 1 != 0 {
        rig.negotiate(COMMON_FEATURES);
        for index in 0..queues {
            rig.add_queue(index, &Ring::new(&memory, RINGS[index as usize], QUEUE));
        }
        // With these contents a device may break as soon as it starts, and then asks for a reset.
        rig.ready();
        (0..queues).for_each(|index| rig.kick(index));
    }
    for access in accesses.chunks_exact(ACCESS) {
        let (register, value) = (u64::from(access[0]) * 4, [access[1], access[2], access[3], access[4]]);
        if control & 2 != 0 && access[0] & 1 != 0 {
            rig.read(register);
        } else {
            rig.write(register, u32::from_le_bytes(value));
        }
    }
    rig.gate.close();
    let state = rig.saved();
    let new = other(&memory);
    // A driver may have broken its queues so that nobody can go on with them; then the new device is reset.
    if new.device.restore(&state).is_ok() {
        assert_eq!(new.saved(), state, "a state survives the way unchanged");
        new.device.go_live(false);
    }
    drop(new);
    rig.gate.open();
    rig.device.reset();
}
