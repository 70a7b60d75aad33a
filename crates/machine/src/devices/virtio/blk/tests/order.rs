//! Requests that overlap are carried out in the order in which they came.

use proptest::prelude::*;

use super::super::engine::Operation;
use super::driver::{T_DISCARD, T_WRITE_ZEROES};
use super::*;

/// The first sectors of the waiting operations.
fn waiting(rig: &Rig) -> Vec<u64> {
    let offset = |operation| match operation {
        Operation::Read { offset, .. }
        | Operation::Write { offset, .. }
        | Operation::Zeroes { offset, .. }
        | Operation::PunchHole { offset, .. }
        | Operation::ZeroRange { offset, .. } => offset / 512,
        Operation::Sync => u64::MAX,
    };
    rig.engine().waiting().into_iter().map(offset).collect()
}

#[test]
fn writes_that_overlap_wait_for_each_other() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let rig = Rig::manual(&memory, &DiskOptions::new(&path));
    let driver = rig.boot();
    rig.device.go_live(false);
    driver.write(0, 0, 10, &[1; 1024]);
    driver.write(0, 1, 12, &[2; 1024]); // beside the first
    driver.write(0, 2, 11, &[3; 1024]); // over both
    driver.write(0, 3, 9, &[4; 1024]); // over the first
    driver.ranges(0, 4, T_DISCARD, &[(8, 2, 0), (7, 1, 0)]); // over the fourth
    driver.read(0, 5, 10, 512);
    driver.flush(0, 6);
    rig.turn();
    assert_eq!(waiting(&rig), [10, 12, 10, u64::MAX], "reads and flushes do not wait");
    assert_eq!(rig.device.stats().serialised, 3);
    assert_eq!(rig.device.in_flight(), 7);
    // The end of the second alone does not let the third start.
    rig.engine().complete(1, None);
    rig.turn();
    assert_eq!(waiting(&rig), [10, 10, u64::MAX]);
    rig.engine().complete(0, None);
    rig.turn();
    assert_eq!(waiting(&rig), [10, u64::MAX, 11, 9]);
    rig.engine().complete(3, None);
    rig.turn();
    assert_eq!(waiting(&rig), [10, u64::MAX, 11, 8]);
    rig.run();
    assert_eq!(driver.used(0), 7);
    let disk = content(&path);
    let sectors: Vec<_> = (8..14).map(|sector| disk[sector * 512]).collect();
    assert_eq!(sectors, [0, 0, 4, 3, 3, 2]);
}

#[test]
fn a_write_that_takes_several_operations_is_not_overtaken() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let rig = Rig::manual(&memory, &DiskOptions::new(&path));
    let driver = rig.boot();
    rig.device.go_live(false);
    driver.write(0, 0, 0, &[1; 4096]);
    driver.write(0, 1, 4, &[2; 512]);
    rig.turn();
    for done in [512, 1024, 2] {
        rig.engine().complete(0, Some(Ok(done)));
        rig.turn();
        assert_eq!(rig.engine().waiting().len(), 1, "the second waits");
        assert_eq!(driver.used(0), 0);
    }
    rig.engine().complete(0, Some(Err(libc::EINTR)));
    rig.turn();
    assert_eq!(rig.engine().waiting(), [Operation::Write { offset: 1538, from: 1538, len: 4096 - 1538 }]);
    rig.run();
    let disk = content(&path);
    assert_eq!((disk[2047], disk[2048], disk[2560], disk[4095]), (1, 2, 1, 1));
    assert_eq!((driver.status(0), driver.status(1)), (OK, OK));
}

#[test]
fn a_failed_write_lets_the_next_one_go() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let rig = Rig::manual(&memory, &DiskOptions::new(&path));
    let driver = rig.boot();
    rig.device.go_live(false);
    driver.write(0, 0, 0, &[1; 1024]);
    driver.write(0, 1, 1, &[2; 1024]);
    driver.read(0, 2, 5, 512);
    rig.turn();
    rig.engine().complete(0, Some(Err(libc::ENOSPC)));
    rig.engine().complete(0, Some(Err(libc::EIO)));
    rig.run();
    assert_eq!([0, 1, 2].map(|slot| driver.status(slot)), [IOERR, OK, IOERR]);
    assert_eq!(driver.used_entry(0, 1).1, 1, "no data with a failure");
    assert_eq!(content(&path)[511..513], [0, 2]);
    assert_eq!(rig.device.stats().errors, 2);
}

#[test]
fn a_failed_read_tells_nothing() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.numbered("disk", 64);
    let rig = Rig::manual(&memory, &DiskOptions::new(&path));
    let driver = rig.boot();
    rig.device.go_live(false);
    // The bounce buffer has been used before.
    driver.read(0, 0, 0, 4096);
    rig.run();
    driver.fill(1, &[0x55; 4096]);
    driver.read(0, 1, 8, 4096);
    rig.turn();
    rig.engine().complete(0, Some(Ok(512)));
    rig.turn();
    rig.engine().complete(0, Some(Err(libc::EIO)));
    rig.run();
    assert_eq!((driver.status(1), driver.used_entry(0, 1)), (IOERR, (1, 1)));
    assert_eq!(driver.data(1, 4096), [0x55; 4096]);
}

#[test]
fn a_disk_that_always_says_try_again_fails_in_the_end() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let rig = Rig::manual(&memory, &DiskOptions::new(&path));
    let driver = rig.boot();
    rig.device.go_live(false);
    driver.write(0, 0, 0, &[1; 1024]);
    rig.turn();
    let mut tries = 0;
    while !rig.engine().waiting().is_empty() {
        rig.engine().complete(0, Some(Err(libc::EAGAIN)));
        rig.turn();
        tries += 1;
        assert!(tries < 1000);
    }
    assert_eq!(driver.status(0), IOERR);
}

#[test]
fn what_the_file_system_cannot_do_is_done_otherwise() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.path("disk");
    std::fs::write(&path, vec![0xff; 1 << 20]).unwrap();
    let rig = Rig::manual(&memory, &DiskOptions::new(&path));
    let driver = rig.boot();
    rig.device.go_live(false);
    driver.ranges(0, 0, T_WRITE_ZEROES, &[(0, 200, 1), (300, 10, 0)]);
    driver.ranges(0, 1, T_DISCARD, &[(400, 10, 0), (500, 10, 0)]);
    rig.turn();
    assert_eq!(waiting(&rig), [0, 400]);
    rig.engine().complete(0, Some(Err(libc::EOPNOTSUPP)));
    // The first range is discarded, the second cannot be.
    rig.engine().complete(0, None);
    rig.turn();
    let zeroes = Operation::Zeroes { offset: 0, len: 65536 };
    assert_eq!(rig.engine().waiting(), [zeroes, Operation::PunchHole { offset: 500 * 512, len: 5120 }]);
    rig.engine().complete(1, Some(Err(libc::EOPNOTSUPP)));
    rig.engine().complete(0, None);
    rig.turn();
    assert_eq!(rig.engine().waiting(), [Operation::Zeroes { offset: 65536, len: 200 * 512 - 65536 }]);
    rig.engine().complete(0, None);
    rig.turn();
    // Each range is tried in the better way first.
    assert_eq!(rig.engine().waiting(), [Operation::ZeroRange { offset: 300 * 512, len: 5120 }]);
    rig.engine().complete(0, Some(Err(libc::EOPNOTSUPP)));
    rig.run();
    assert_eq!((driver.status(0), driver.status(1)), (OK, OK));
    let mut expected = vec![0xff; 1 << 20];
    for (first, count) in [(0, 200), (300, 10), (400, 10)] {
        expected[first * 512..(first + count) * 512].fill(0);
    }
    assert_eq!(content(&path), expected);
}

#[test]
fn without_a_cache_every_write_is_made_durable() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let rig = Rig::manual(&memory, &DiskOptions::new(&path));
    rig.device.go_live(false);
    let offered = rig.offered();
    let syncs = |driver: &Driver| {
        driver.write(0, 0, 0, &[1; 512]);
        driver.ranges(0, 1, T_WRITE_ZEROES, &[(8, 8, 1), (30, 0, 0)]);
        rig.turn();
        assert_eq!(waiting(&rig), [0, 8]);
        rig.engine().complete_all();
        rig.turn();
        let syncs = rig.engine().waiting();
        assert!(syncs.iter().all(|&operation| operation == Operation::Sync));
        assert_eq!(driver.used(0), 2 - syncs.len() as u16);
        rig.run();
        assert_eq!((driver.used(0), driver.status(0), driver.status(1)), (2, OK, OK));
        syncs.len()
    };
    assert_eq!(syncs(&rig.boot()), 0, "the driver flushes");
    assert_eq!(syncs(&rig.boot_with(offered & !F_CONFIG_WCE, 1)), 0);
    assert_eq!(syncs(&rig.boot_with(offered & !F_CONFIG_WCE & !F_FLUSH, 1)), 2, "it cannot");
    let driver = rig.boot();
    rig.registers.lock().unwrap().write(0x120, &[0]);
    assert_eq!(rig.read(0x120) & 0xff, 0);
    assert_eq!(syncs(&driver), 2, "it does not want to");
    let saved = rig.saved();
    rig.write(0x70, 0);
    assert_eq!(rig.read(0x120) & 0xff, 1, "a reset puts the cache back");
    rig.device.restore(&saved).unwrap();
    assert_eq!(rig.read(0x120) & 0xff, 0, "it is part of the state");
}

#[derive(Clone, Debug)]
enum Request {
    Write { sector: u64, count: u64, value: u8 },
    Discard { sector: u64, count: u32 },
    Zeroes { sector: u64, count: u32, unmap: bool },
    Read { sector: u64 },
    Flush,
}

fn request() -> impl Strategy<Value = Request> {
    let write =
        (0u64..24, 1u64..8, 1u8..).prop_map(|(sector, count, value)| Request::Write { sector, count, value });
    let discard = (0u64..24, 0u32..8).prop_map(|(sector, count)| Request::Discard { sector, count });
    let zeroes = (0u64..24, 0u32..8, any::<bool>()).prop_map(|(sector, count, unmap)| Request::Zeroes {
        sector,
        count,
        unmap,
    });
    let read = (0u64..32).prop_map(|sector| Request::Read { sector });
    prop_oneof![5 => write, 1 => discard, 1 => zeroes, 1 => read, 1 => Just(Request::Flush)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// In whatever order the disk finishes, the outcome is that of one request after another.
    #[test]
    fn any_requests_in_any_order(
        requests in prop::collection::vec((request(), 0u16..3), 1..48),
        choices in prop::collection::vec(any::<prop::sample::Index>(), 64),
        turns in prop::collection::vec(0usize..4, 64),
    ) {
        let (images, memory) = (Images::in_memory(), memory());
        let path = images.sparse("disk", 32 * 512);
        let rig = Rig::manual(&memory, &DiskOptions { queues: 3, ..DiskOptions::new(&path) });
        let driver = rig.boot_with(rig.offered(), 3);
        rig.device.go_live(false);
        let mut model = vec![0u8; 32 * 512];
        let mut choice = choices.iter().cycle();
        for (slot, (request, queue)) in requests.iter().enumerate() {
            let slot = slot as u16;
            let mut change = |sector: u64, count: u64, value| {
                model[sector as usize * 512..(sector + count) as usize * 512].fill(value);
            };
            match *request {
                Request::Write { sector, count, value } => {
                    driver.write(*queue, slot, sector, &vec![value; count as usize * 512]);
                    change(sector, count, value);
                }
                Request::Discard { sector, count } => {
                    driver.ranges(*queue, slot, T_DISCARD, &[(sector, count, 0)]);
                    change(sector, count.into(), 0);
                }
                Request::Zeroes { sector, count, unmap } => {
                    driver.ranges(*queue, slot, T_WRITE_ZEROES, &[(sector, count, unmap.into())]);
                    change(sector, count.into(), 0);
                }
                Request::Read { sector } => driver.read(*queue, slot, sector, 512),
                Request::Flush => driver.flush(*queue, slot),
            }
            rig.turn();
            for _ in 0..turns[usize::from(slot)] {
                let waiting = rig.engine().waiting().len();
                if waiting > 0 {
                    rig.engine().complete(choice.next().unwrap().index(waiting), None);
                    rig.turn();
                }
            }
        }
        loop {
            let waiting = rig.engine().waiting().len();
            if waiting == 0 {
                break;
            }
            rig.engine().complete(choice.next().unwrap().index(waiting), None);
            rig.turn();
        }
        let used: u16 = (0..3).map(|queue| driver.used(queue)).sum();
        prop_assert_eq!(usize::from(used), requests.len());
        prop_assert_eq!(rig.device.in_flight(), 0);
        prop_assert!(content(&path) == model);
    }
}
