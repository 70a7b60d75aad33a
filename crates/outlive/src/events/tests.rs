use std::fs::OpenOptions;
use std::path::Path;
use std::time::Duration;

use super::*;
use crate::link::LinkKind;

fn every_event() -> Vec<Event> {
    vec![
        Event::Started {
            role: Role::Primary,
            vm: Some("demo".into()),
            vcpus: Some(2),
            memory: Some(1 << 28),
            tracker: Some("ring".into()),
        },
        Event::Started { role: Role::Standby, vm: None, vcpus: None, memory: None, tracker: None },
        Event::Confined { sandbox: true },
        Event::Listening { addr: "127.0.0.1:7000".into() },
        Event::StandbyAttached { addr: "127.0.0.1:7000".into(), link: Some(LinkKind::Tls13) },
        Event::PrimaryAttached { addr: "10.0.0.1:555".into(), link: Some(LinkKind::Plain) },
        Event::PrimaryAttached { addr: "10.0.0.1:555".into(), link: None },
        Event::Ready { generation: 1, checkpoint: 3 },
        Event::StreamRefused { why: "damage".into() },
        Event::Dismissed,
        Event::StillUnprotected { why: "no standby".into(), for_s: 60 },
        Event::RunsTwice {
            vm: "demo".into(),
            id: "00ff".into(),
            generation: 2,
            at: "hostb:7000".into(),
            same_vm: false,
        },
        Event::BaseProgress { round: 1, sent_pages: 10, total_pages: 65536, planned_pages: 65600 },
        Event::GuestPanicked,
        Event::GuestRestarted { how: "a triple fault".into() },
        Event::BootsFromDisk {
            disk: 0,
            entry: "Debian GNU/Linux".into(),
            kernel: "/boot/vmlinuz-6.1.0-13-amd64".into(),
            command_line: "root=/dev/vda1 ro console=ttyS0".into(),
        },
        Event::BootsLastKernel { why: "no kernel was found on it".into() },
        Event::DiskSync {
            disk: 1,
            done_bytes: 1 << 20,
            total_bytes: 1 << 30,
            sent_bytes: 65536,
            read_bytes: 0,
        },
        Event::SelfCheck { checkpoint: 100, difference: None },
        Event::AuditDiffers { checkpoint: 7, place: Place::Memory { first_page: 64, mask: u64::MAX } },
        Event::AuditDiffers { checkpoint: 7, place: Place::Disk { disk: 1, offset: 1 << 40, bytes: 65_536 } },
        Event::Protected {
            generation: 1,
            checkpoint: 3,
            base_ms: 120,
            rounds: 2,
            held_ms: 9,
            longest_stop_us: 700,
        },
        Event::BaseStalled { pages: 9, link_bytes_per_s: 8, stop_ms: 7, max_pause_ms: 6, again_ms: 5 },
        Event::Stats(Stats { rate_hz: 812.5, ..Stats::default() }),
        Event::Measured(Measured {
            span_us: 1,
            phases: [("copy".to_owned(), vec![(100, 3), (200, 1)])].into(),
            threads: [("vcpu0".to_owned(), ThreadTime { run_us: 1, wait_us: 2, switches: 3 })].into(),
            ..Measured::default()
        }),
        Event::LinkLost { reason: "nothing heard for 500 ms".into() },
        Event::Arbitrating { generation: 2 },
        Event::ArbiterUnreachable { why: "no such directory".into() },
        Event::ArbiterLost { why: "read-only file system".into() },
        Event::ArbiterBack { lost_ms: 60_000 },
        Event::StandbyMemoryShort { missing: 2 << 30, available: 1 << 30 },
        Event::StandbyMemoryEnough,
        Event::StandbyArbiterLost { for_s: 12 },
        Event::StandbyArbiterBack { lost_ms: 60_000 },
        Event::Won { generation: 2 },
        Event::Lost { generation: 2, owner: "b".into() },
        Event::Unprotected { why: "no standby".into() },
        Event::HostFault { part: Part::Disk, why: "no space".into(), kept: Some("alone".into()) },
        Event::FenceFailed { attempt: 1, why: "exit status: 1".into() },
        Event::PeerFenced { attempt: 2, took_ms: 700 },
        Event::HostMended { part: Part::Network },
        Event::HandOver { kept: None },
        Event::StandsStill { checkpoint: 9 },
        Event::HandOver { kept: Some("why".into()) },
        Event::StandbySlow { behind_ms: 1_100, in_flight: 4 },
        Event::StandbyCaughtUp { slow_ms: 3_000 },
        Event::SettleSlow { part: SettlePart::Disk, for_ms: 4_000, hangs_ms: 3_500 },
        Event::CopyLingers { for_ms: 10_000 },
        Event::Rewound {
            from: "0a".repeat(16),
            run: 3,
            generation: 2,
            checkpoint: 99,
            at: "2026-01-31T12:00:00.000001Z".into(),
        },
        Event::RecordBegan { run: 3 },
        Event::RecordWhole { run: 3, from: 17 },
        Event::RecordGap { run: 3, why: "no space".into() },
        Event::Takeover {
            generation: 2,
            checkpoint: 99,
            detect_us: 500_000,
            settle_us: 1_000,
            arbitrate_us: 200,
            restore_us: 3_000,
            first_packet_us: None,
            total_us: 504_200,
            input_given: 3,
            output_repeated: 2,
        },
        Event::FirstPacket { after_us: 4_000 },
        Event::EventsLost { count: 12 },
        Event::Ended { reason: "guest powered off".into(), code: 0 },
    ]
}

#[test]
fn every_event_survives_the_way_through_a_file() {
    let path = std::env::temp_dir().join(format!("outlive-events-{}", std::process::id()));
    let writer = EventWriter::open(&path).unwrap();
    let before = now_us();
    for event in every_event() {
        writer.emit(event);
    }
    assert!(writer.finish());
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let records: Vec<Record> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(records.iter().map(|r| r.event.clone()).collect::<Vec<_>>(), every_event());
    assert!(records.iter().all(|r| r.t_us >= before && r.pid == std::process::id()));
}

#[test]
fn a_reader_that_stops_costs_events_and_is_told_how_many() {
    use std::io::Read;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stopped");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    // For both directions, so that nobody waits for the other end.
    let mut reader = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    let writer = EventWriter::open(&path).unwrap();
    let emitted = 20_000;
    let began = std::time::Instant::now();
    for generation in 0..emitted {
        writer.emit(Event::Won { generation });
    }
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(!writer.finish(), "a reader that does not read is not waited for");
    // The reader reads again.
    let copy = writer.clone();
    let flushed = std::thread::spawn(move || while !copy.finish() {});
    let (mut text, mut part) = (Vec::new(), vec![0; 4096]);
    let (mut next, mut lost) = (0, 0);
    while next < emitted {
        let count = reader.read(&mut part).unwrap();
        text.extend_from_slice(&part[..count]);
        while let Some(end) = text.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = text.drain(..=end).collect();
            match serde_json::from_slice::<Record>(&line).unwrap().event {
                Event::Won { generation } => {
                    assert_eq!(generation, next, "in order, and no gap that nobody told of");
                    next += 1;
                }
                Event::EventsLost { count } => (next, lost) = (next + count, lost + count),
                other => panic!("{other:?}"),
            }
        }
    }
    flushed.join().unwrap();
    assert_eq!(next, emitted);
    assert!(lost > emitted / 2, "{lost} were lost");
}

#[test]
fn the_line_looks_as_documented() {
    let record = Record::of(Event::Won { generation: 2 }, 5, 7);
    assert_eq!(serde_json::to_string(&record).unwrap(), r#"{"event":"won","generation":2,"t_us":5,"pid":7}"#);
}

fn lines(path: &Path) -> Vec<Record> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn every_line_has_the_time_of_the_wall_and_the_vm_once_it_is_known() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("events");
    let writer = EventWriter::open(&path).unwrap();
    let before = std::time::SystemTime::now();
    writer.emit(Event::Listening { addr: "a:1".into() });
    assert!(writer.finish());
    writer.of_vm("shop", "0123");
    writer.emit(Event::Won { generation: 2 });
    assert!(writer.finish());
    let records = lines(&path);
    assert_eq!((&records[0].vm_name, &records[0].vm_id), (&None, &None));
    assert_eq!(records[1].vm_name.as_deref().zip(records[1].vm_id.as_deref()), Some(("shop", "0123")));
    for record in records {
        let time = humantime::parse_rfc3339(&record.time).unwrap();
        assert!(time + Duration::from_millis(1) >= before, "{}", record.time);
        assert!(record.time.ends_with('Z') && time <= std::time::SystemTime::now(), "{}", record.time);
    }
}

#[test]
fn a_full_file_makes_room_for_the_next_and_the_oldest_goes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("events");
    let to = EventsTo { path: Some(path.clone()), max: Some(4096), keep: 3 };
    let writer = open(&to).unwrap();
    let count = 200;
    for generation in 0..count {
        writer.emit(Event::Won { generation });
        while !writer.finish() {}
    }
    let name = |number: u32| directory.path().join(format!("events.{number}"));
    let files = [name(3), name(2), name(1), path.clone()];
    let mut found = Vec::new();
    for file in &files {
        assert!(std::fs::metadata(file).unwrap().len() <= 4096);
        found.extend(lines(file).into_iter().map(|record| record.event));
    }
    assert!(!name(4).exists());
    // The last ones are there, without a gap.
    let first = count - found.len() as u64;
    let expected: Vec<Event> = (first..count).map(|generation| Event::Won { generation }).collect();
    assert_eq!(found, expected);
    assert!(first > 0);
    // The next process goes on in the same file.
    let writer = open(&to).unwrap();
    writer.emit(Event::Won { generation: count });
    assert!(writer.finish());
    assert!(lines(&path).len() > 1 || lines(&name(1)).len() > 1);
}

#[test]
fn newer_fields_and_events_are_skipped() {
    let line = r#"{"t_us":5,"event":"won","pid":7,"generation":2,"colour":"red"}"#;
    assert_eq!(serde_json::from_str::<Record>(line).unwrap().event, Event::Won { generation: 2 });
    let line = r#"{"event":"moon_landing","where":[1,2],"t_us":5,"pid":7}"#;
    assert_eq!(serde_json::from_str::<Record>(line).unwrap().event, Event::Unknown);
}

#[test]
fn histograms_survive_as_pairs_and_add_up() {
    let (mut one, mut two, mut all) = (histogram(), histogram(), histogram());
    for value in 0..2_000 {
        if value % 3 == 0 { &mut one } else { &mut two }.saturating_record(value);
        all.saturating_record(value);
    }
    two.saturating_record(u64::MAX);
    all.saturating_record(u64::MAX);
    let mut merged = histogram();
    add_pairs(&mut merged, &pairs(&one));
    add_pairs(&mut merged, &pairs(&two));
    assert_eq!(merged.len(), 2_001);
    for quantile in [0.0, 0.5, 0.99, 1.0] {
        assert_eq!(merged.value_at_quantile(quantile), all.value_at_quantile(quantile));
    }
}

#[test]
fn processes_never_mix_their_lines() {
    let path = std::env::temp_dir().join(format!("outlive-events-mixed-{}", std::process::id()));
    // Each opens the file itself, as a process would.
    let writers: Vec<EventWriter> = (0..4).map(|_| EventWriter::open(&path).unwrap()).collect();
    for generation in 0..200 {
        writers.iter().for_each(|writer| writer.emit(Event::Won { generation }));
    }
    assert!(writers.iter().all(EventWriter::finish));
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(text.lines().filter(|l| serde_json::from_str::<Record>(l).is_ok()).count(), 800);
}
