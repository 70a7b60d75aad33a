//! A heartbeat never waits behind more than one batch that was written after it was due, and behind little in
//! the kernel.

use std::io::Read;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use outlive_epoch::{CheckpointFlags, DiskOp, DiskRecord, RecordBuf};
use outlive_machine::Outgoing;
use outlive_pair::{Link, Ticket};
use socket2::SockRef;

use super::super::{CheckpointPart, Connection, Job, Security, SenderReport, dial};
use super::rig::{self, Beat, HEARTBEAT, SlowLink, Written};
use crate::clock::Clock;
use crate::disk::DiskSection;

/// How many bytes written after a heartbeat was due may be in front of it.
const BATCH: usize = 256 << 10;
/// Headers of the sections in a batch, and the fields before their data.
const HEADS: usize = 8 << 10;

/// Sends the jobs over a slow link. Returns, for each heartbeat, how many bytes that were written after it
/// was due went before it.
fn late_bytes(jobs: Vec<Job>) -> Vec<usize> {
    let clock = Clock::start();
    let written = Arc::new(Mutex::new(Written::default()));
    let connection = Connection::over(SlowLink { clock, written: written.clone() }, None);
    let (sender, reports) = rig::sender(connection, clock);
    let began = clock.now();
    jobs.into_iter().for_each(|job| sender.send(job));
    sender.finish(Duration::from_secs(60));
    assert!(!reports.try_iter().any(|it| matches!(it, SenderReport::Failed(_))));
    let written = written.lock().unwrap();
    let (beats, _) = rig::heartbeats(&written.bytes);
    let before = std::iter::once(began).chain(beats.iter().map(|beat| beat.stamp));
    let late =
        |(before, beat): (Duration, &Beat)| beat.position.saturating_sub(written.until(before + HEARTBEAT));
    let late: Vec<usize> = before.zip(&beats).map(late).collect();
    // On a link of 8 MB a second two heartbeats are due per batch, so one goes before each.
    assert!(beats.len() >= written.bytes.len() / (BATCH + HEADS) - 1, "{} heartbeats", beats.len());
    late
}

#[test]
fn one_goes_between_two_batches_of_base_pages() {
    let late = late_bytes(vec![rig::base_round(1024)]);
    assert!(late.iter().all(|bytes| *bytes <= BATCH + HEADS), "{late:?}");
}

#[test]
fn one_goes_between_two_batches_of_disk_blocks() {
    let data = vec![7; 64 << 10];
    let records = || {
        let mut records = RecordBuf::with_capacity(1 << 20);
        for chunk in 0..3 {
            assert!(records.push(DiskRecord { disk: 0, offset: chunk << 16, op: DiskOp::Data(&data) }));
        }
        records
    };
    let blocks = (0..16).map(|_| Job::Disk(DiskSection::Blocks { round: 1, records: records() }));
    let late = late_bytes(blocks.collect());
    assert!(late.iter().all(|bytes| *bytes <= BATCH + HEADS), "{late:?}");
}

#[test]
fn one_goes_between_two_batches_of_a_checkpoint() {
    let mut staging = Outgoing::new(1, 8 << 20).unwrap();
    // The guest may write more at once than a batch has room for.
    let data: Vec<u8> = (0..1 << 20).map(|i| (i / 512) as u8).collect();
    for offset in 0..4u64 {
        let write = DiskRecord { disk: 0, offset: offset << 20, op: DiskOp::Data(&data) };
        assert!(staging.disk_writes_mut().push(write));
    }
    let ticket = Ticket { link: Link(1), generation: 1, number: 1, flags: CheckpointFlags::default() };
    let part = CheckpointPart { ticket, totals: Some((0, 0)), last: true, staging };
    let late = late_bytes(vec![Job::Checkpoint(Box::new(part))]);
    assert!(late.iter().all(|bytes| *bytes <= BATCH + HEADS), "{late:?}");
}

/// If the reader takes 16 MiB a second, a heartbeat waits behind little more than that reader's buffer: the
/// kernel does not take megabytes of pages in front of it.
#[test]
fn the_kernel_holds_little_in_front_of_one() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // Accepted sockets inherit the size; the kernel doubles it for its own needs.
    let received = 64 << 10;
    SockRef::from(&listener).set_recv_buffer_size(received).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let clock = Clock::start();
    let (sender, _reports) = rig::sender(dial(&address, &Security::Open, None).unwrap(), clock);
    sender.send(rig::base_round(8192));
    sender.send(Job::Close);
    let (mut stream, _) = listener.accept().unwrap();
    let (mut bytes, mut part) = (Written::default(), vec![0; 32 << 10]);
    let began = Instant::now();
    loop {
        let count = stream.read(&mut part).unwrap();
        if count == 0 {
            break;
        }
        bytes.bytes.extend_from_slice(&part[..count]);
        bytes.writes.push((clock.now(), bytes.bytes.len()));
        let due = Duration::from_secs_f64(bytes.bytes.len() as f64 / f64::from(16 << 20));
        std::thread::sleep(due.saturating_sub(began.elapsed()));
    }
    let (beats, _) = rig::heartbeats(&bytes.bytes);
    let behind = beats.iter().map(|beat| beat.position.saturating_sub(bytes.until(beat.stamp)));
    let (most, count) = (behind.max().unwrap(), beats.len());
    assert!(count > 50, "{count} heartbeats in two seconds");
    assert!(most <= 2 * received + (512 << 10), "{most} bytes in front of a heartbeat");
}
