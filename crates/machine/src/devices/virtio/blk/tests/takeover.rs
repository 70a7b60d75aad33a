//! The whole: a machine that is checkpointed under load, and machines that continue from its checkpoints.

use std::collections::VecDeque;

use outlive_epoch::image::{DiskOp, DiskRecord, RecordBuf};

use super::super::LogMode;
use super::driver::{T_DISCARD, T_WRITE_ZEROES};
use super::*;

const SECTORS: u64 = 64;
const SLOTS: u16 = 48;

/// Numbers that look random and are the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % end
    }
}

/// The guest: its driver and the disk contents that it expects.
struct Guest {
    driver: Driver,
    free: VecDeque<u16>,
    /// How many requests it has offered, and how many it has seen used, as the rings count.
    offered: u16,
    seen: u16,
    /// The disk, once every offered request is done.
    disk: Vec<u8>,
}

impl Guest {
    /// Offers a random request, if a slot is free.
    fn ask(&mut self, random: &mut Random) {
        while self.seen != self.driver.used(0) {
            let (slot, _) = self.driver.used_entry(0, self.seen);
            assert_eq!(self.driver.status(slot), OK);
            self.free.push_back(slot);
            self.seen = self.seen.wrapping_add(1);
        }
        let Some(slot) = self.free.pop_front() else { return };
        let mut below = |end| random.below(end);
        let sector = below(SECTORS - 8);
        let count = below(8) + 1;
        let range = sector as usize * 512..(sector + count) as usize * 512;
        match below(10) {
            0 => self.driver.flush(0, slot),
            1 => self.driver.read(0, slot, sector, 512),
            2 | 3 => {
                let kind = [T_DISCARD, T_WRITE_ZEROES][below(2) as usize];
                self.driver.ranges(0, slot, kind, &[(sector, count as u32, 0)]);
                self.disk[range].fill(0);
            }
            _ => {
                let data = vec![below(255) as u8 + 1; count as usize * 512];
                self.driver.write(0, slot, sector, &data);
                self.disk[range].copy_from_slice(&data);
            }
        }
        self.offered = self.offered.wrapping_add(1);
    }
}

/// Applies the writes to the standby's copy of the disk.
fn apply(replica: &mut [u8], buffer: &RecordBuf) {
    for DiskRecord { offset, op, .. } in buffer.iter() {
        let at = offset as usize;
        match op {
            DiskOp::Data(data) => replica[at..at + data.len()].copy_from_slice(data),
            DiskOp::Zero(len) => replica[at..at + len as usize].fill(0),
            DiskOp::Flush => {}
        }
    }
}

fn protect(rig: &Rig) {
    rig.gate.close();
    rig.log.swap(&mut RecordBuf::with_capacity(200 << 10));
    rig.log.set_mode(LogMode::Log);
    rig.gate.open();
}

#[test]
fn a_machine_goes_on_from_any_checkpoint_with_the_disk_of_that_checkpoint() {
    for (engine, seed) in ENGINES.into_iter().zip(1..) {
        let mut random = Random(seed);
        let images = Images::in_memory();
        let mut memory_here = memory();
        let path = images.sparse("disk-0", SECTORS * 512);
        let mut rig = Rig::new(&memory_here, &DiskOptions { engine, ..DiskOptions::new(&path) });
        let driver = rig.boot();
        rig.device.go_live(false);
        let disk = vec![0; SECTORS as usize * 512];
        let mut replica = disk.clone();
        let mut guest = Guest { driver, free: (0..SLOTS).collect(), offered: 0, seen: 0, disk };
        protect(&rig);
        let mut buffer = RecordBuf::with_capacity(200 << 10);
        let (mut listed, mut reissued) = (0, 0);
        for takeover in 1..=12 {
            for _ in 0..20 {
                for _ in 0..random.below(40) {
                    guest.ask(&mut random);
                    if random.below(4) == 0 {
                        rig.kick(0);
                    }
                }
                rig.kick(0);
                std::thread::sleep(Duration::from_micros(random.below(300)));
                rig.gate.close();
                rig.log.swap(&mut buffer);
                let in_flight = rig.device.in_flight();
                listed += in_flight;
                apply(&mut replica, &buffer);
                buffer.clear();
                // With something in flight, mostly: on a fast host that is seldom.
                if random.below(20) == 0 || in_flight > 0 && random.below(3) == 0 {
                    break;
                }
                rig.gate.open();
            }
            rig.gate.close();
            rig.log.swap(&mut buffer);
            apply(&mut replica, &buffer);
            buffer.clear();
            let saved = rig.saved();
            memory_here = copy(&memory_here);
            rig.gate.open();
            drop(rig);

            let path = images.sparse(&format!("disk-{takeover}"), SECTORS * 512);
            std::fs::write(&path, &replica).unwrap();
            rig = Rig::new(&memory_here, &DiskOptions { engine, ..DiskOptions::new(&path) });
            rig.gate.close();
            rig.device.restore(&saved).unwrap();
            rig.device.go_live(true);
            rig.gate.open();
            guest.driver = Driver::resumed(&memory_here);
            // Unprotected for a moment: nothing is logged until everything is done.
            wait_for("what was offered", || guest.driver.used(0) == guest.offered);
            reissued += rig.device.stats().reissued;
            let now = content(&path);
            let wrong = (0..SECTORS as usize).find(|&s| now[s * 512] != guest.disk[s * 512]);
            assert_eq!(wrong, None, "takeover {takeover} with {engine:?}: a sector is not what it should be");
            assert!(now == guest.disk);
            replica.copy_from_slice(&now);
            protect(&rig);
        }
        assert!(listed > 0 && reissued > 0, "{listed} {reissued}: the test does not test much");
    }
}
