//! The test on the kernel that runs it, and with mistakes planted.

use std::fs::File;
use std::os::fd::AsFd;

use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::guest::PROGRAM;
use super::*;

const WAYS: [Way; 2] = [Way::Ring, Way::ClearLog];

/// None without /dev/kvm or without this log.
fn test(way: Way, program: &[u8], twist: Twist) -> Option<SelfTest> {
    if !std::path::Path::new("/dev/kvm").exists() {
        println!("skipped: no /dev/kvm");
        return None;
    }
    let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
    match SelfTest::with(kvm.as_fd(), way, program, twist) {
        Ok(test) => {
            println!("{way:?}: {test}; at most {} epochs between writes", test.max_gap());
            Some(test)
        }
        Err(error @ SelfTestError::Missing(_)) => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error:?}"),
    }
}

/// The reason for which a mistake was noticed.
fn noticed(way: Way, program: &[u8], twist: Twist) -> Option<String> {
    let test = test(way, program, twist)?;
    assert_eq!(test.max_gap(), 0);
    Some(test.selective.expect_err("the mistake goes unnoticed"))
}

#[test]
fn passes_on_this_kernel() {
    for way in WAYS {
        if let Some(test) = test(way, PROGRAM, |_, target| target) {
            assert_eq!(test.selective, Ok(()));
            assert!(test.fault_ns > 0 && test.copy_ns > 0);
        }
    }
}

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

#[test]
fn signals_do_not_disturb() {
    register_signal_handler(SIGRTMIN(), on_signal).unwrap();
    for way in WAYS {
        let test = std::thread::spawn(move || test(way, PROGRAM, |_, target| target));
        while !test.is_finished() {
            test.kill(SIGRTMIN()).unwrap();
            std::thread::sleep(Duration::from_micros(50));
        }
        if let Some(test) = test.join().unwrap() {
            assert_eq!(test.selective, Ok(()));
        }
    }
}

#[test]
fn notices_a_kernel_that_arms_everything() {
    for way in WAYS {
        let reason = noticed(way, PROGRAM, |page, _| Some(page));
        assert!(reason.is_none_or(|reason| reason.contains("an eighth armed: ")));
    }
}

#[test]
fn notices_a_kernel_that_arms_too_little() {
    for way in WAYS {
        noticed(way, PROGRAM, |_, _| None);
        noticed(way, PROGRAM, |page, target| target.filter(|_| page != 15));
        noticed(way, PROGRAM, |page, target| target.map(|_| page));
    }
}

#[test]
fn notices_a_guest_that_does_not_do_its_work() {
    let mut mute = PROGRAM.to_vec();
    mute[..3].fill(0x90);
    for way in WAYS {
        let reason = noticed(way, &mute, |_, target| target);
        assert!(reason.is_none_or(|reason| reason.starts_with("the guest wrote 0 pages")));
        // ud2, and no handler for it.
        let reason = noticed(way, &[0x0f, 0x0b], |_, target| target);
        assert!(reason.is_none_or(|reason| reason.starts_with("the guest stopped with Shutdown")));
    }
}

#[test]
fn something_else_than_kvm_is_an_error() {
    let null = File::open("/dev/null").unwrap();
    assert!(matches!(SelfTest::run(null.as_fd(), Way::Ring), Err(SelfTestError::Step { .. })));
}

#[test]
fn rates() {
    let of = |fault_ns, copy_ns, selective| SelfTest {
        selective,
        fault_ns,
        copy_ns,
        took: Duration::from_millis(3),
    };
    assert_eq!(of(6500, 350, Ok(())).max_gap(), 9);
    assert_eq!(of(6500, 350, Err("no".into())).max_gap(), 0);
    assert_eq!(of(600, 350, Ok(())).max_gap(), 0);
    assert_eq!(of(600, 0, Ok(())).max_gap(), 300);
    assert_eq!(
        of(6500, 350, Ok(())).to_string(),
        "pages can be left out of the re-arm; a write fault costs 6500 ns, a copy 350 ns; took 3.0 ms"
    );
}
