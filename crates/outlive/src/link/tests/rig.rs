//! A sender with work to do, and its output.

use std::io::{self, IoSlice, Read};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outlive_dirty::Gfn;
use outlive_epoch::{Message, Peer, ProtocolVersion, ReadError, SectionReader};
use outlive_machine::Ram;

use super::super::{Connection, Job, LinkKind, Sender, SenderReport, Transport};
use crate::clock::Clock;
use crate::pulse::Pulse;

/// Time between two heartbeats that the sender owes.
pub(super) const HEARTBEAT: Duration = Duration::from_millis(10);

/// Bytes, and when they were written: the beginning of each write, and how many bytes there were after it.
#[derive(Default)]
pub(super) struct Written {
    pub(super) bytes: Vec<u8>,
    pub(super) writes: Vec<(Duration, usize)>,
}

impl Written {
    /// Bytes that had been written at a moment, or were being written.
    pub(super) fn until(&self, moment: Duration) -> usize {
        let after = self.writes.partition_point(|(began, _)| *began <= moment);
        after.checked_sub(1).map_or(0, |last| self.writes[last].1)
    }
}

/// A link that takes 16 KiB every two milliseconds.
pub(super) struct SlowLink {
    pub(super) clock: Clock,
    pub(super) written: Arc<Mutex<Written>>,
}

impl Transport for SlowLink {
    fn read(&self, _: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }

    fn write(&self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        let began = self.clock.now();
        std::thread::sleep(Duration::from_millis(2));
        let mut written = self.written.lock().unwrap();
        let before = written.bytes.len();
        for slice in from {
            let room = (16 << 10) - (written.bytes.len() - before);
            written.bytes.extend_from_slice(&slice[..room.min(slice.len())]);
        }
        let after = written.bytes.len();
        written.writes.push((began, after));
        Ok(after - before)
    }

    fn set_read_timeout(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }

    fn write_now(&self, from: &[u8]) -> io::Result<usize> {
        self.write(&[IoSlice::new(from)])
    }

    fn finish(&self) {}

    fn close(&self) {}

    fn peer(&self) -> String {
        "slow".into()
    }

    fn kind(&self) -> Option<LinkKind> {
        None
    }
}

/// A sender on a connection, and its reports.
pub(super) fn sender(connection: Connection, clock: Clock) -> (Sender, Receiver<SenderReport>) {
    let (to, reports) = channel();
    let report = move |report| drop(to.send(report));
    let Connection { writer, closer, .. } = connection;
    let pulse = Arc::new(Pulse::new(clock));
    let version = ProtocolVersion::CURRENT;
    (Sender::start(writer, closer, clock, pulse, HEARTBEAT, version, report).unwrap(), reports)
}

/// A round of the base synchronisation: this many pages, none of them empty.
pub(super) fn base_round(pages: u64) -> Job {
    let ram = Ram::new(64 << 20, 64).unwrap();
    let gfns: Vec<Gfn> = (1000..1000 + pages).map(Gfn).collect();
    for gfn in &gfns {
        assert!(ram.write_page(*gfn, &[gfn.0 as u8 | 1; 4096]));
    }
    Job::BaseRound { round: 1, gfns, ram: Arc::new(ram) }
}

/// A heartbeat in a stream: when it was written, and how many bytes there are before it.
pub(super) struct Beat {
    pub(super) stamp: Duration,
    pub(super) position: usize,
}

/// The heartbeats of a stream without its preface, and the number of its sections.
pub(super) fn heartbeats(bytes: &[u8]) -> (Vec<Beat>, usize) {
    let preface = outlive_epoch::Preface::CURRENT.encode();
    let mut stream = preface.chain(bytes);
    let mut reader = SectionReader::new(Peer::Primary);
    reader.read_preface(&mut stream).unwrap();
    let (mut beats, mut sections, mut position) = (Vec::new(), 0, 0);
    loop {
        let section = match reader.read_section(&mut stream) {
            Ok(section) => section,
            Err(ReadError::Closed) => return (beats, sections),
            Err(error) => panic!("{error}"),
        };
        if let Message::Heartbeat { stamp_us } = Message::parse(&section).unwrap() {
            beats.push(Beat { stamp: Duration::from_micros(stamp_us), position });
        }
        sections += 1;
        position += outlive_epoch::HEADER_LEN + section.payload().len();
    }
}
