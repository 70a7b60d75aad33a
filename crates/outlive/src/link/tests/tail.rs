//! Copies of the guest's frames: before the checkpoint that they are needed for, and each once.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outlive_epoch::{CheckpointFlags, Message, Peer, Preface, ProtocolVersion, ReadError, SectionReader};
use outlive_machine::devices::virtio::net::{FrameSink, Output};
use outlive_machine::{InputTail, Lease, Outgoing, OutputLimits, OutputMode, Permit, Valve};
use outlive_pair::{Link, Ticket};

use super::super::{CheckpointPart, Connection, FrameTail, Job, Sender, SenderReport};
use super::rig::{self, SlowLink, Written};
use crate::clock::Clock;

/// A wire that takes everything.
struct Wire;

impl FrameSink for Wire {
    fn send(&self, _: usize, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

/// A sender, with a guest's frames behind it.
struct Rig {
    tail: FrameTail,
    valve: Valve,
    sender: Sender,
    written: Arc<Mutex<Written>>,
    reports: std::sync::mpsc::Receiver<SenderReport>,
}

impl Rig {
    /// Both sides have agreed on this version.
    fn speaking(version: ProtocolVersion) -> Rig {
        let permit = Arc::new(Permit::new(OutputMode::PassThrough, Lease::new()));
        let output = Arc::new(Output::new(Arc::new(Wire), OutputLimits::default(), permit.clone()).unwrap());
        let valve = Valve::new(permit, vec![output.clone()]);
        let tail = FrameTail { input: Arc::new(InputTail::default()), output };
        let (clock, written) = (Clock::start(), Arc::new(Mutex::new(Written::default())));
        let connection = Connection::over(SlowLink { clock, written: written.clone() }, None);
        let (sender, reports) = rig::sender(connection, clock);
        sender.send(Job::Speak(version, Some(tail.clone()), Arc::default(), None));
        // The thread has done so when it has written this.
        sender.send(Job::Heartbeat);
        while written.lock().unwrap().bytes.is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        Rig { tail, valve, sender, written, reports }
    }

    fn given(&self, epoch: u64, number: u8) {
        self.tail.input.push(epoch, 1, &[number; 80]);
        self.tail.input.tell();
    }

    fn sends(&self, number: u8) {
        let _ = self.tail.output.push(2, &[number; 90]);
    }

    fn checkpoint(&self, number: u64, pages: bool) {
        let ticket = Ticket { link: Link(1), generation: 1, number, flags: CheckpointFlags::default() };
        let staging = Outgoing::new(1, 0).unwrap();
        let part = CheckpointPart { ticket, totals: pages.then_some((0, 0)), last: true, staging };
        self.sender.send(Job::Checkpoint(Box::new(part)));
    }

    /// What was written, in words, without heartbeats.
    fn written(self) -> Vec<String> {
        self.sender.finish(Duration::from_secs(60));
        assert!(!self.reports.try_iter().any(|it| matches!(it, SenderReport::Failed(_))));
        let bytes = [&Preface::CURRENT.encode()[..], &self.written.lock().unwrap().bytes].concat();
        let (mut stream, mut reader) = (&bytes[..], SectionReader::new(Peer::Primary));
        reader.read_preface(&mut stream).unwrap();
        let mut words = Vec::new();
        loop {
            let section = match reader.read_section(&mut stream) {
                Ok(section) => section,
                Err(ReadError::Closed) => return words,
                Err(error) => panic!("{error}"),
            };
            match Message::parse(&section).unwrap() {
                Message::Input(frames) => {
                    let frame = |it: outlive_epoch::TailFrame<'_>| {
                        assert_eq!((it.pair, it.packet), (1, &[it.packet[0]; 80][..]));
                        format!("in {} of {}", it.packet[0], it.epoch)
                    };
                    words.extend(frames.iter().map(frame));
                }
                Message::Output(frames) => {
                    let frame = |it: outlive_epoch::TailFrame<'_>| {
                        assert_eq!((it.pair, it.packet), (2, &[it.packet[0]; 90][..]));
                        format!("out {} of {}", it.packet[0], it.epoch)
                    };
                    words.extend(frames.iter().map(frame));
                }
                Message::Released { through } => words.push(format!("left through {through}")),
                Message::CheckpointBegin(begin) => words.push(format!("begin {}", begin.number)),
                Message::CheckpointEnd(end) => words.push(format!("end {}", end.number)),
                _ => {}
            }
        }
    }
}

#[test]
fn input_goes_at_once_and_output_before_the_end_of_its_checkpoint() {
    let rig = Rig::speaking(ProtocolVersion::CURRENT);
    rig.valve.hold(5).unwrap();
    rig.given(5, 1);
    rig.given(5, 2);
    rig.sends(3);
    rig.sends(4);
    rig.valve.begin(6).unwrap();
    rig.given(6, 5);
    rig.sends(6);
    rig.checkpoint(5, true);
    rig.sender.send(Job::Heartbeat);
    // Its copies are made: now it may leave.
    while !matches!(rig.reports.recv().unwrap(), SenderReport::Shipped(_)) {}
    rig.valve.commit(5);
    rig.valve.drain();
    rig.valve.begin(7).unwrap();
    rig.checkpoint(6, true);
    let written = rig.written();
    let place = |what: &str| {
        let places: Vec<_> = written.iter().enumerate().filter(|it| it.1 == what).map(|it| it.0).collect();
        assert_eq!(places.len(), 1, "{what} in {written:?}");
        places[0]
    };
    // When the thread gets to it does not matter for input, but for its order.
    assert!(place("in 1 of 5") < place("in 2 of 5") && place("in 2 of 5") < place("in 5 of 6"));
    let rest: Vec<_> = written.iter().filter(|it| !it.starts_with("in ")).map(String::as_str).collect();
    let expected = [
        "left through 4",
        "begin 5",
        "out 3 of 5",
        "out 4 of 5",
        "end 5",
        "left through 5",
        "begin 6",
        "out 6 of 6",
        "end 6",
    ];
    assert_eq!(rest, expected, "{written:?}");
}

#[test]
fn an_older_standby_gets_no_copies() {
    let rig = Rig::speaking(ProtocolVersion::V5);
    rig.valve.hold(5).unwrap();
    rig.given(5, 1);
    rig.sends(2);
    rig.valve.begin(6).unwrap();
    rig.checkpoint(5, true);
    assert_eq!(rig.written(), ["begin 5", "end 5"]);
}

/// The longest frames have their place, and what is too much is left out from the end.
#[test]
fn the_copies_of_an_epoch_are_bounded() {
    let rig = Rig::speaking(ProtocolVersion::CURRENT);
    rig.valve.hold(1).unwrap();
    for number in 0..200 {
        rig.given(1, number);
        rig.sends(number);
    }
    rig.valve.begin(2).unwrap();
    rig.checkpoint(1, true);
    let written = rig.written();
    let count = |way: &str| written.iter().filter(|it| it.starts_with(way)).count();
    assert_eq!((count("in "), count("out ")), (128, 128));
    let out: Vec<_> = written.iter().filter(|it| it.starts_with("out ")).cloned().collect();
    assert_eq!(out, (0..128).map(|number| format!("out {number} of 1")).collect::<Vec<_>>());
}
