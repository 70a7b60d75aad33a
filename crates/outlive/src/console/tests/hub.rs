//! What is kept of a port's output.

use outlive_machine::devices::port::PortSink;
use proptest::prelude::*;

use super::super::client::ClientOutput;
use super::super::hub::{HISTORY, Hub, Read};

#[test]
fn a_new_reader_sees_what_was_printed_before() {
    let hub = Hub::new().unwrap();
    hub.write(b"boot\n");
    let mut position = hub.oldest();
    let mut got = [0; 16];
    assert_eq!(hub.read(&mut position, &mut got), Read { lost: 0, count: 5 });
    assert_eq!(&got[..5], b"boot\n");
    assert_eq!(hub.read(&mut position, &mut got), Read { lost: 0, count: 0 });
}

#[test]
fn a_slow_reader_loses_the_oldest_and_is_told() {
    let hub = Hub::new().unwrap();
    let mut out = ClientOutput::new(&hub);
    hub.write(&[b'a'; 100]);
    hub.write(&[b'b'; HISTORY]);
    let mut shown = Vec::new();
    out.pump(&hub, &mut shown, 1000).unwrap();
    let note = b"\r\n[outlive: 100 bytes lost]\r\n";
    assert_eq!(&shown[..note.len()], note);
    assert_eq!(shown[note.len()..], [b'b'; HISTORY]);
    assert!(out.is_done(hub.sleep()));
}

#[test]
fn printing_wakes_only_a_server_that_sleeps() {
    let hub = Hub::new().unwrap();
    let is_told = || nix::sys::eventfd::EventFd::read_of(&hub);
    hub.write(b"1");
    assert!(!is_told());
    assert_eq!(hub.sleep(), 1);
    hub.write(b"2");
    hub.write(b"3");
    assert!(is_told());
    hub.clear_news();
    hub.write(b"4");
    assert!(!is_told());
}

trait IsTold {
    fn read_of(hub: &Hub) -> bool;
}

impl IsTold for nix::sys::eventfd::EventFd {
    fn read_of(hub: &Hub) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        poll(&mut [PollFd::new(hub.news(), PollFlags::POLLIN)], PollTimeout::ZERO).unwrap() == 1
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn readers_see_everything_or_are_told(
        steps in prop::collection::vec((0usize..3 * HISTORY / 2, 0usize..HISTORY), 1..12)
    ) {
        let hub = Hub::new().unwrap();
        let (mut position, mut printed, mut seen) = (0, 0u64, 0u64);
        for (write, read) in steps {
            let bytes: Vec<u8> = (0..write as u64).map(|n| ((printed + n) % 251) as u8).collect();
            hub.write(&bytes);
            printed += write as u64;
            let mut got = vec![0; read];
            let Read { lost, count } = hub.read(&mut position, &mut got);
            seen += lost;
            for &byte in &got[..count] {
                prop_assert_eq!(u64::from(byte), seen % 251);
                seen += 1;
            }
            prop_assert_eq!(position, seen);
            prop_assert!(count == read || seen == printed);
        }
    }
}
