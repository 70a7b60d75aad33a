//! A driver with arbitrary memory, for fuzzers.

use std::sync::Arc;

use outlive_epoch::image::RecordBuf;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemory};
use vmm_sys_util::tempfile::TempFile;

use super::engine::manual::Manual;
use super::{BlockDevice, BlockState, DiskOptions, Image, LogMode, WriteLog};
use crate::devices::Device;
use crate::devices::valve::{Lease, OutputMode, Permit, Valve};
use crate::devices::virtio::rig::{Rig, Ring, memory};

/// Bytes of the guest's memory.
pub const MEMORY: usize = 64 << 10;
/// Bytes of the input that control the run; the rest is the guest's memory from address 0 on.
pub const CONTROL: usize = 8;
/// Size of the two queues.
pub const QUEUE: u16 = 16;
/// Addresses of each queue's descriptor table, available ring and used ring.
pub const RINGS: [[u64; 3]; 2] = [[0, 0x100, 0x140], [0x200, 0x300, 0x340]];

const SECTORS: u64 = 64;

/// Boots a driver with features and queues that depend on `control`, with `data` in its memory, and has a
/// disk work for it. Whatever the bytes: nothing panics, the work ends, the image keeps its length, and the
/// state can be saved and restored at any time.
///
/// # Panics
///
/// If the device does something forbidden.
pub fn fuzz(data: &[u8]) {
    let Some((control, contents)) = data.split_first_chunk::<CONTROL>() else { return };
    let memory = memory(MEMORY);
    let len = contents.len().min(MEMORY);
    memory.write_slice(&contents[..len], GuestAddress(0)).expect("it fits");

    let file = TempFile::new().expect("a temporary file");
    file.as_file().set_len(SECTORS * 512).expect("a small file");
    let shared = control[0] & 1 != 0;
    let options = DiskOptions { shared, queues: 2, ..DiskOptions::new(file.as_path()) };
    let open = || Arc::new(Image::open(&options.path, false, true, None).expect("an image"));
    let log = WriteLog::new(|| {});
    log.swap(&mut RecordBuf::with_capacity(usize::from(control[1]) << 8));
    log.set_mode(if control[0] & 2 != 0 { LogMode::Log } else { LogMode::Track });
    let image = open();
    let manual = Manual::new(image.clone()).expect("an event");
    let passing = || Arc::new(Permit::new(OutputMode::PassThrough, Lease::new()));
    let permit = passing();
    let valve = Valve::new(permit.clone(), Vec::new());
    let make = |image: &Arc<Image>, manual: &Manual, permit: &Arc<Permit>| {
        Rig::on(memory.clone(), |host| {
            let engine = (image.clone(), Box::new(manual.clone()) as _);
            BlockDevice::with_engine(&options, 0, log.clone(), permit.clone(), host, engine).expect("a disk")
        })
    };
    let rig = make(&image, &manual, &permit);
    let event_idx = if control[0] & 4 != 0 { 0 } else { 1 << 29 };
    rig.negotiate(rig.offered() & !event_idx);
    for (queue, at) in RINGS.into_iter().enumerate() {
        rig.add_queue(queue as u32, &Ring::new(&memory, at, QUEUE));
    }
    rig.start();
    let device = rig.device;
    device.go_live(false);
    if control[0] & 8 != 0 {
        valve.hold(1).expect("nothing is held");
    }
    work(&device, &manual, &control[2..6]);

    // Halfway another disk continues from the saved state, and both finish.
    let mut saved = Vec::with_capacity(BlockState::BYTES);
    device.save(&mut saved);
    assert!(saved.len() <= BlockState::BYTES, "a state of {} bytes", saved.len());
    let restored = Manual::new(image.clone()).expect("an event");
    let other = make(&image, &restored, &passing()).device;
    if let Err(error) = other.restore(&saved) {
        // The guest may have overwritten what the positions in the rings are checked against: nothing else.
        panic!("what was saved cannot be restored: {error}");
    }
    let mut again = Vec::new();
    other.save(&mut again);
    assert_eq!(again, saved, "a restored device saves what it was given");
    other.go_live(false);
    work(&other, &restored, &control[6..]);
    valve.open();
    finish(&device, &manual, &log);
    finish(&other, &restored, &log);
    assert_eq!(file.as_file().metadata().expect("a file").len(), SECTORS * 512, "the image keeps its length");
    assert!(memory.check_range(GuestAddress(0), MEMORY, vm_memory::Permissions::ReadWrite));
}

/// A few turns of the device and of the disk.
fn work<M: GuestMemory + Send + Sync>(device: &BlockDevice<M>, manual: &Manual, choices: &[u8]) {
    for &choice in choices {
        device.turn();
        let waiting = manual.waiting().len();
        if waiting > 0 {
            let outcome = match choice % 8 {
                0 => Some(Err(libc::EIO)),
                1 => Some(Err(libc::EOPNOTSUPP)),
                2 => Some(Ok(1)),
                _ => None,
            };
            manual.complete(usize::from(choice / 8) % waiting, outcome);
            if choice >= 128 {
                // Answers are noted before the next turn takes them.
                device.unanswered_for();
            }
        }
    }
}

/// Completes everything that is left. The device must come to rest.
fn finish<M: GuestMemory + Send + Sync>(device: &BlockDevice<M>, manual: &Manual, log: &WriteLog) {
    log.set_mode(LogMode::Off);
    device.let_out();
    // The rings of both queues hold fewer requests than this, unless the device overwrites them with new ones
    // forever. A driver may bring that about: it keeps only itself busy.
    for _ in 0..500 {
        let more = device.turn();
        if manual.complete_all() == 0 && !more {
            return;
        }
    }
}

/// Bytes of a descriptor, to compose an input.
pub fn descriptor(at: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let descriptor = Descriptor::new(at, len, flags, next);
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&descriptor.addr().0.to_le_bytes());
    bytes[8..12].copy_from_slice(&descriptor.len().to_le_bytes());
    bytes[12..14].copy_from_slice(&descriptor.flags().to_le_bytes());
    bytes[14..].copy_from_slice(&descriptor.next().to_le_bytes());
    bytes
}
