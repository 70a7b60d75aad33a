//! The host's disk fails: whoever decides about the VM hears of it before the guest does.

use std::sync::Mutex;

use outlive_epoch::image::RecordBuf;

use super::super::LogMode;
use super::*;
use crate::event::MachineEvent;

/// The faults that were reported.
type Told = Arc<Mutex<Vec<MachineEvent>>>;

fn told(rig: &Rig) -> Told {
    let told = Told::default();
    let to = told.clone();
    rig.device.report_faults_to(Arc::new(move |event| to.lock().unwrap().push(event)));
    told
}

/// A live disk in this memory, whose requests the test completes, with its driver.
fn live(images: &Images, memory: &Arc<Memory>) -> (Rig, Told, Driver) {
    let rig = Rig::manual(memory, &DiskOptions::new(images.sparse("disk", 1 << 20)));
    let (told, driver) = (told(&rig), rig.boot());
    rig.device.go_live(false);
    (rig, told, driver)
}

fn count(told: &Told) -> usize {
    told.lock().unwrap().len()
}

#[test]
fn an_error_of_the_hosts_disk_is_kept_from_the_guest_and_the_request_stays_in_flight() {
    let (images, first) = (Images::in_memory(), memory());
    let (rig, told, driver) = live(&images, &first);
    rig.log.swap(&mut RecordBuf::with_capacity(1 << 20));
    rig.log.set_mode(LogMode::Log);
    driver.write(0, 0, 3, &[1; 1024]);
    driver.write(0, 1, 3, &[2; 512]);
    driver.read(0, 2, 100, 512);
    rig.turn();
    rig.engine().complete(0, Some(Err(libc::ENOSPC)));
    rig.engine().complete(0, Some(Err(libc::EIO)));
    rig.turn();
    let event = told.lock().unwrap()[0].clone();
    assert!(
        matches!(&event, MachineEvent::DiskFault { disk: 0, why, again: false } if why.contains("No space")),
        "{event:?}"
    );
    // One report is enough until it is answered.
    assert_eq!((count(&told), driver.used(0)), (1, 0));
    // The write that overlaps it waits, too.
    assert!(rig.engine().waiting().is_empty());

    // The other host's disk works: everything is issued again there, in order.
    let (second, other) = (copy(&first), images.sparse("other", 1 << 20));
    let mut state = Vec::new();
    rig.device.save(&mut state);
    let mut records = RecordBuf::with_capacity(1 << 20);
    rig.log.swap(&mut records);
    assert!(records.is_empty(), "nothing of the failure is in the log");
    let there = Rig::manual(&second, &DiskOptions::new(&other));
    let resumed = Driver::resumed(&second);
    there.device.restore(&state).unwrap();
    there.device.go_live(false);
    there.run();
    assert_eq!((resumed.used(0), [0, 1, 2].map(|slot| resumed.status(slot))), (3, [OK; 3]));
    assert_eq!(content(&other)[3 * 512..5 * 512], [[2; 512], [1; 512]].concat());
}

#[test]
fn a_request_of_the_last_host_that_fails_here_too_is_told_apart() {
    let (images, first) = (Images::in_memory(), memory());
    let (rig, _, driver) = live(&images, &first);
    driver.write(0, 1, 3, &[1; 512]);
    rig.turn();
    let (second, other, mut state) = (copy(&first), images.sparse("other", 1 << 20), Vec::new());
    rig.device.save(&mut state);
    let there = Rig::manual(&second, &DiskOptions::new(&other));
    let told = told(&there);
    let resumed = Driver::resumed(&second);
    there.device.restore(&state).unwrap();
    there.device.go_live(false);
    // Another one fails first.
    resumed.write(0, 2, 100, &[2; 512]);
    there.turn();
    assert!(there.device.has_reissued());
    there.engine().complete(1, Some(Err(libc::EIO)));
    there.engine().complete(0, Some(Err(libc::EIO)));
    there.turn();
    let again: Vec<_> = told
        .lock()
        .unwrap()
        .iter()
        .map(|event| match event {
            MachineEvent::DiskFault { again, .. } => *again,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(again, [false, true]);
    assert!(there.device.has_failed() && !there.device.has_reissued());
    there.device.tell_errors();
    there.run();
    assert!(!there.device.has_failed());
}

#[test]
fn the_guest_hears_of_an_error_once_it_is_to_hear() {
    let (images, memory) = (Images::in_memory(), memory());
    let (rig, told, driver) = live(&images, &memory);
    driver.write(0, 0, 3, &[1; 512]);
    driver.write(0, 1, 3, &[2; 512]);
    rig.turn();
    rig.engine().complete(0, Some(Err(libc::EIO)));
    rig.turn();
    assert_eq!((count(&told), driver.used(0)), (1, 0));
    rig.device.tell_errors();
    rig.run();
    assert_eq!((driver.used(0), driver.status(0), driver.status(1)), (2, IOERR, OK));
    // The next one is reported anew.
    driver.read(0, 2, 3, 512);
    rig.kick(0);
    rig.turn();
    rig.engine().complete(0, Some(Err(libc::EIO)));
    rig.turn();
    assert_eq!((count(&told), driver.used(0)), (2, 2));
    rig.device.tell_errors();
    rig.turn();
    assert_eq!((driver.used(0), driver.status(2)), (3, IOERR));
}

/// What the guest does wrong is its own affair.
#[test]
fn errors_of_the_guest_are_not_the_hosts() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let rig = Rig::new(&memory, &DiskOptions { readonly: true, ..DiskOptions::new(&path) });
    let told = told(&rig);
    let driver = rig.boot();
    rig.device.go_live(false);
    driver.write(0, 0, 3, &[1; 512]);
    driver.read(0, 1, 2048, 512);
    rig.serve(&driver, 2);
    assert_eq!((driver.status(0), driver.status(1), count(&told)), (IOERR, IOERR, 0));
}

/// A driver that is gone wants to hear nothing.
#[test]
fn a_failed_request_of_a_driver_that_has_reset_the_disk_goes_with_it() {
    let (images, memory) = (Images::in_memory(), memory());
    let (rig, told, driver) = live(&images, &memory);
    for slot in 0..2 {
        driver.write(0, slot, 3 + 8 * u64::from(slot), &[1; 512]);
    }
    rig.turn();
    rig.engine().complete(0, Some(Err(libc::EIO)));
    rig.turn();
    rig.write(0x70, 0);
    // This one fails afterwards.
    rig.engine().complete(0, Some(Err(libc::EIO)));
    rig.turn();
    assert_eq!(count(&told), 1);
    rig.device.tell_errors();
    rig.turn();
    let driver = rig.boot();
    rig.device.go_live(false);
    driver.read(0, 0, 3, 512);
    rig.kick(0);
    rig.run();
    assert_eq!((driver.used(0), driver.status(0), rig.device.in_flight()), (1, OK, 0));
}

/// Whoever decides hears of it when the gate is open; until then nobody must take the disk for mended.
#[test]
fn a_failure_behind_a_closed_gate_is_an_answer_and_still_a_failure() {
    let (images, memory) = (Images::in_memory(), memory());
    let (rig, told, driver) = live(&images, &memory);
    driver.write(0, 0, 3, &[1; 512]);
    rig.turn();
    assert!(!rig.device.unanswered_for().is_zero());
    rig.gate.close();
    rig.engine().complete(0, Some(Err(libc::EIO)));
    assert_eq!((rig.device.unanswered_for(), count(&told)), (Duration::ZERO, 0));
    assert!(rig.device.has_failed());
    rig.gate.open();
    rig.turn();
    assert_eq!((count(&told), driver.used(0)), (1, 0));
    assert!(rig.device.has_failed());
    rig.device.tell_errors();
    rig.run();
    assert!(!rig.device.has_failed());
    assert_eq!((driver.used(0), driver.status(0)), (1, IOERR));
}

#[test]
fn a_disk_that_does_not_answer_is_seen() {
    let (images, memory) = (Images::in_memory(), memory());
    let (rig, told, driver) = live(&images, &memory);
    assert_eq!(rig.device.unanswered_for(), Duration::ZERO);
    driver.read(0, 0, 3, 512);
    rig.turn();
    let before = rig.device.unanswered_for();
    std::thread::sleep(Duration::from_millis(20));
    assert!(rig.device.unanswered_for() >= before + Duration::from_millis(20));
    // A failure is an answer.
    rig.engine().complete(0, Some(Err(libc::EIO)));
    rig.turn();
    assert_eq!((rig.device.unanswered_for(), count(&told)), (Duration::ZERO, 1));
    rig.device.tell_errors();
    rig.run();
    assert_eq!((rig.device.unanswered_for(), driver.status(0)), (Duration::ZERO, IOERR));
}
