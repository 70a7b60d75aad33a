//! Input that must be refused without harm: strangers, second primaries, and damaged streams.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use outlive::arbiter::VmId;
use outlive::events::Event;
use outlive_epoch::{
    CheckpointBegin, CheckpointFlags, Encoder, Hello, LeaveReason, MAX_GENERATION, Message, PAGE_SIZE,
    PageEntry, Peer, Preface, RefuseCode, SectionReader,
};

use crate::support::{
    Client, Dice, PATIENCE, Process, Proxy, Side, Value, Way, Witnesses, World, wait_until,
};

/// Strangers at once, more than a standby accepts.
const CROWD: usize = 100;

/// The protection of the VM is unharmed.
fn assert_undisturbed(primary: &mut Process, standby: &mut Process) {
    for process in [primary, standby] {
        assert!(!process.ended());
        let disturbed = process.has(|e| {
            matches!(e, Event::LinkLost { .. } | Event::Unprotected { .. } | Event::Arbitrating { .. })
        });
        assert!(!disturbed, "protection was disturbed");
    }
}

/// Connects to the standby of host b from host a.
fn knock(world: &World) -> TcpStream {
    let stream = world.on(Side::A, || TcpStream::connect_timeout(&Side::B.addr(), PATIENCE)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Everything that the other side says until it closes.
fn until_closed(mut stream: TcpStream) -> Vec<u8> {
    let mut said = Vec::new();
    // A reset is a way of closing, too.
    drop(stream.read_to_end(&mut said));
    said
}

/// The introduction of the real VM, received in place of its standby.
fn overhear(world: &World) -> (Process, Hello) {
    overhear_with(world, &["--standby", &Side::B.addr().to_string()])
}

/// The same, of a primary with these options.
fn overhear_with(world: &World, options: &[&str]) -> (Process, Hello) {
    let listener = world.on(Side::B, || TcpListener::bind(Side::B.addr())).unwrap();
    let primary = world.run_with(Side::A, options);
    loop {
        let (mut stream, _) = listener.accept().unwrap();
        let mut reader = SectionReader::new(Peer::Primary);
        reader.read_preface(&mut stream).unwrap();
        let section = reader.read_section(&mut stream).unwrap();
        let Message::Hello(hello) = Message::parse(&section).unwrap() else { panic!("no Hello") };
        // Without slots it is only the question whether a VM of this name runs here.
        if hello.limits.slots > 0 {
            return (primary, *hello);
        }
    }
}

/// A primary that consists only of its protocol.
struct FakePrimary {
    stream: TcpStream,
    encoder: Encoder,
    reader: SectionReader,
    greeted: bool,
}

impl FakePrimary {
    fn introduce(world: &World, hello: &Hello) -> FakePrimary {
        let reader = SectionReader::new(Peer::Standby);
        let mut fake = FakePrimary { stream: knock(world), encoder: Encoder::new(), reader, greeted: false };
        let mut bytes = Preface::CURRENT.encode().to_vec();
        fake.encoder.hello(&mut bytes, hello).unwrap();
        fake.stream.write_all(&bytes).unwrap();
        fake
    }

    /// Introduces itself until the standby accepts it: the standby may still be busy with the previous
    /// primary.
    fn accepted(world: &World, hello: &Hello) -> FakePrimary {
        let mut accepted = None;
        wait_until("the standby accepts a primary", || {
            let mut fake = FakePrimary::introduce(world, hello);
            let good = fake.answer().starts_with("Accept");
            accepted = good.then_some(fake);
            good
        });
        accepted.unwrap()
    }

    /// The next message that is not a heartbeat, in words.
    fn answer(&mut self) -> String {
        if !std::mem::replace(&mut self.greeted, true)
            && let Err(error) = self.reader.read_preface(&mut self.stream)
        {
            return error.to_string();
        }
        loop {
            match self.reader.read_section(&mut self.stream) {
                Err(error) => return error.to_string(),
                Ok(section) => match Message::parse(&section).unwrap() {
                    // A standby of a stream of version 5 says whether it reaches the clients, and one of version 7
                    // whether it sees the arbiter.
                    Message::Heartbeat { .. } | Message::Reach(_) | Message::ArbiterSight(_) => {}
                    other => return format!("{other:?}"),
                },
            }
        }
    }

    fn assert_refused(mut self, code: RefuseCode) {
        let answer = self.answer();
        assert!(answer.starts_with("Refuse") && answer.contains(&format!("{code:?}")), "{code:?}: {answer}");
        assert!(until_closed(self.stream).is_empty(), "something came after a refusal");
    }

    /// Sends a base that a standby would acknowledge if it contained a machine's state, damaged by `damage`.
    fn send_base(&mut self, hello: &Hello, damage: impl FnOnce(&mut Vec<u8>)) {
        let data = vec![0x5a; PAGE_SIZE];
        let entries = [PageEntry::raw(0x200)];
        let mut bytes = Vec::new();
        self.encoder.base_pages_head(&mut bytes, 1, entries.iter().copied(), &data).unwrap();
        bytes.extend_from_slice(&data);
        let flags = CheckpointFlags { base_final: true, end: None, hand_over: false };
        let begin = CheckpointBegin {
            generation: hello.generation,
            number: 1,
            pages: 1,
            state_bytes: 0,
            disk_bytes: 0,
            flags,
        };
        self.encoder.checkpoint_begin(&mut bytes, &begin).unwrap();
        self.encoder.pages_head(&mut bytes, entries.iter().copied(), &data).unwrap();
        bytes.extend_from_slice(&data);
        self.encoder.checkpoint_end(&mut bytes, 1).unwrap();
        damage(&mut bytes);
        // The standby may hang up before it has read everything.
        drop(self.stream.write_all(&bytes));
    }
}

#[test]
fn strangers_at_the_standbys_port_disturb_nobody() {
    let Some(world) = World::plain() else { return };
    let mut dice = Dice::new();
    let (mut primary, mut standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    let noise: Vec<u8> = (0..100_000).map(|_| dice.below(256) as u8).collect();
    let mut newer = Preface::CURRENT.encode();
    newer[8] = 99;
    let half = &Preface::CURRENT.encode()[..9];
    for words in [&noise[..], b"GET / HTTP/1.1\r\nHost: standby\r\n\r\n", b"\0", half, &newer] {
        let mut stream = knock(&world);
        drop(stream.write_all(words));
        stream.shutdown(Shutdown::Write).ok();
        until_closed(stream);
    }
    // A correct preface and then noise; the length in it must not be believed.
    let mut stream = knock(&world);
    drop(stream.write_all(&[&Preface::CURRENT.encode()[..], &noise].concat()));
    until_closed(stream);
    // More connections than the standby accepts at once, all of them silent.
    let silent: Vec<TcpStream> = (0..CROWD).map(|_| knock(&world)).collect();
    witnesses.hear_all();
    silent.into_iter().for_each(|stream| assert!(until_closed(stream).is_empty()));
    // The standby may drop some of many equal complaints.
    for complaint in [
        "not a primary",
        "does not speak the Outlive protocol",
        "ended inside",
        "preface checksum",
        "section marker",
    ] {
        standby.wait_says(complaint, 1);
    }
    assert_undisturbed(&mut primary, &mut standby);
    witnesses.finish(&world);
}

#[test]
fn a_primary_gets_through_a_crowd_of_strangers() {
    let Some(world) = World::new() else { return };
    let _standby = world.standby(Side::B);
    let crowd: Vec<TcpStream> = (0..CROWD).map(|_| knock(&world)).collect();
    let mut primary = world.run(Side::A);
    primary.wait_protected();
    drop(crowd);
}

#[test]
fn a_second_primary_is_refused() {
    let Some(world) = World::new() else { return };
    let (mut primary, mut standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    let there = Side::B.addr().to_string();
    // Another VM, on the same host.
    let mut second = world.run_with(
        Side::A,
        &["--standby", &there, "--net", "tap=vm1,bridge=br0", "--ip", "10.77.0.3/24", "--name", "second"],
    );
    wait_until("the second primary is told", || second.log().contains("another primary is attached"));
    standby.wait_says("refused a primary", 1);
    // It runs all the same, and says that it is unprotected.
    let server = "10.77.0.3:6379".parse().unwrap();
    let mut client = world.lan(|| Client::open(server)).unwrap();
    assert_eq!(client.ask("INCR n"), Ok(Value::Integer(1)));
    assert!(!second.has(|e| matches!(e, Event::Protected { .. })));
    witnesses.hear_all();
    assert_undisturbed(&mut primary, &mut standby);
    witnesses.finish(&world);
}

/// With an operator as arbiter a standby knows of a VM's generation by its primaries only, and asks about the next one. Who
/// is refused has no say in that.
#[test]
fn what_a_refused_primary_says_of_its_generation_is_not_believed() {
    let Some(world) = World::plain() else { return };
    let other = Side::A.addr().to_string();
    let by_hand = ["--standby", &other, "--arbiter", "manual"];
    let (primary, hello) =
        overhear_with(&world, &["--standby", &Side::B.addr().to_string(), "--arbiter", "manual"]);
    primary.kill();
    let standby = world.standby_with(Side::B, &by_hand);
    let far = Hello { generation: 40, ..hello.clone() };
    FakePrimary::introduce(&world, &Hello { vcpus: 33, ..far.clone() }).assert_refused(RefuseCode::Resources);
    FakePrimary::introduce(&world, &Hello { generation: 0, ..hello.clone() })
        .assert_refused(RefuseCode::Resources);
    drop(FakePrimary::accepted(&world, &hello));
    // One that was accepted has.
    drop(FakePrimary::accepted(&world, &far));
    wait_until("the older one is out of date", || {
        let answer = FakePrimary::introduce(&world, &hello).answer();
        answer.contains("StaleGeneration")
    });
    drop(standby);
}

#[test]
fn primaries_that_do_not_belong_here_are_refused() {
    let Some(world) = World::plain() else { return };
    let (mut primary, hello) = overhear(&world);
    let mut standby = world.standby(Side::B);
    primary.wait_protected();
    let witnesses = Witnesses::start(&world, 2);
    // The very same VM in the very same generation, and in others.
    for generation in [1, 0, 2, MAX_GENERATION] {
        let same = Hello { generation, ..hello.clone() };
        FakePrimary::introduce(&world, &same).assert_refused(RefuseCode::Busy);
    }
    let other = Hello { vm: VmId([7; 16]), ..hello.clone() };
    FakePrimary::introduce(&world, &other).assert_refused(RefuseCode::Busy);
    witnesses.hear_all();
    assert_undisturbed(&mut primary, &mut standby);

    // A standby without a primary refuses for other reasons.
    standby.kill();
    primary.wait_for("alone", |e| matches!(e, Event::Won { generation: 2 }));
    primary.kill();
    let standby = world.standby(Side::B);
    FakePrimary::introduce(&world, &hello).assert_refused(RefuseCode::StaleGeneration);
    // The arbiter does not know it: the two hosts have different ones.
    FakePrimary::introduce(&world, &other).assert_refused(RefuseCode::Resources);
    for wrong in [
        Hello { generation: 2, vendor: "Other kvm".into(), ..hello.clone() },
        Hello { generation: 2, vcpus: 33, ..hello.clone() },
        Hello { generation: 2, memory_bytes: 1 << 50, ..hello.clone() },
        Hello { generation: 2, memory_bytes: hello.memory_bytes * 2, ..hello.clone() },
    ] {
        FakePrimary::introduce(&world, &wrong).assert_refused(RefuseCode::Resources);
    }
    // A guest that was told of features that this host lacks: all of leaf 7. An entry begins with leaf, subleaf
    // and flags, and has EAX and EBX behind them.
    let mut other_processor = Hello { generation: 2, ..hello.clone() };
    let bytes = &mut other_processor.vcpu.as_mut().expect("there is room for it").bytes;
    let begin = [7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
    let leaf = bytes.windows(12).position(|it| it == begin).expect("leaf 7");
    bytes[leaf + 16..leaf + 20].fill(0xff);
    let answer = FakePrimary::introduce(&world, &other_processor).answer();
    let lacks = "this host cannot resume the VM: vCPU 0: the VM's vCPUs have features that this host lacks";
    assert!(answer.contains("Resources") && answer.contains(lacks), "{answer}");
    // A list of devices from which no machine can be built: the standby guesses nothing.
    let mut twice = Hello { generation: 2, ..hello.clone() };
    twice.devices.extend(twice.devices.clone());
    FakePrimary::introduce(&world, &twice).assert_refused(RefuseCode::Devices);
    let without = Hello { generation: 2, devices: Vec::new(), ..hello.clone() };
    FakePrimary::introduce(&world, &without).assert_refused(RefuseCode::Devices);
    standby.wait_says("refused a primary", 8);
}

#[test]
fn damaged_bases_are_refused_and_the_standby_stays_good() {
    let Some(world) = World::plain() else { return };
    let mut dice = Dice::new();
    let (primary, hello) = overhear(&world);
    primary.kill();
    let mut standby = world.standby(Side::B);
    let bad_stream = format!("Leave({:?})", LeaveReason::BadStream);
    for round in 0..30 {
        let mut fake = FakePrimary::accepted(&world, &hello);
        let place = dice.below(1 << 40);
        fake.send_base(&hello, |bytes| match round {
            // Correct as it is, but without a machine's state nobody could run it.
            0 => {}
            _ if round % 2 == 0 => {
                let at = (place % bytes.len() as u64) as usize;
                bytes[at] ^= 1 << (place >> 37);
            }
            _ => {
                let at = (place % (bytes.len() as u64 - 40)) as usize;
                bytes.drain(at..at + 1 + (place >> 20 & 31) as usize);
            }
        });
        fake.stream.shutdown(Shutdown::Write).ok();
        let answer = fake.answer();
        // A stream that is cut at the end looks like a primary that died; without a base there is nothing to
        // take over.
        let ends = ["the connection was closed", "closed"].iter().any(|end| answer.contains(end));
        assert!(answer == bad_stream || round % 2 == 1 && ends, "round {round}: {answer}");
    }
    standby.wait_says("refused what the primary sent", 1);
    assert!(!standby.has(|e| matches!(e, Event::Arbitrating { .. })), "it tried to take a VM over");
    let mut primary = world.run(Side::A);
    primary.wait_protected();
    let witnesses = Witnesses::start(&world, 1);
    primary.kill();
    standby.wait_takeover();
    witnesses.hear_all();
    witnesses.finish(&world);
}

#[test]
fn a_checkpoint_that_arrives_damaged_costs_only_the_protection() {
    let Some(world) = World::plain() else { return };
    let ([_primary, mut standby], witnesses) = damage_checkpoints(&world, false);
    assert!(!standby.has(|e| matches!(e, Event::Arbitrating { .. })), "the standby tried to take over");
    standby.wait_says("refused what the primary sent", 8);
    witnesses.finish(&world);
}

/// The link ends with the record that was changed. The primary asks the arbiter first, and the standby loses.
#[test]
fn a_record_that_arrives_damaged_costs_only_the_protection() {
    let Some(world) = World::new() else { return };
    let ([_primary, mut standby], witnesses) = damage_checkpoints(&world, true);
    assert!(!standby.has(|e| matches!(e, Event::Takeover { .. })), "the standby took over");
    witnesses.finish(&world);
}

/// The standby would let the primary ahead for 160 seconds, longer than these tests wait. But the primary comes back, and then
/// the standby waits for the end of its lease only.
#[test]
fn a_primary_that_comes_back_after_a_damaged_record_is_protected_again() {
    let Some(world) = World::new() else { return };
    let proxy = Proxy::start(&world, Side::A);
    let _standby = world.staying_standby_with(Side::B, &["--dead-after", "40s"]);
    let mut primary = world.run_with(Side::A, &["--standby", &proxy.addr()]);
    primary.wait_protected();
    proxy.flip(Way::ToStandby, Dice::new().below(1 << 60));
    proxy.wait_done();
    primary.wait_for("alone", |e| matches!(e, Event::Won { .. }));
    primary.wait_protected();
}

/// Damages checkpoints, one after the other, with the VM protected again before the next. The primary keeps the VM.
fn damage_checkpoints(world: &World, arbitrates: bool) -> ([Process; 2], Witnesses) {
    let mut dice = Dice::new();
    let proxy = Proxy::start(world, Side::A);
    let standby = world.staying_standby_with(Side::B, &[]);
    // Even the first word is damaged: the primary introduces itself again.
    proxy.flip(Way::ToStandby, dice.below(1 << 40));
    let mut primary = world.run_with(Side::A, &["--standby", &proxy.addr()]);
    primary.wait_protected();
    let witnesses = Witnesses::start(world, 2);
    for round in 0..8 {
        let place = dice.below(1 << 60);
        if round % 2 == 0 {
            proxy.flip(Way::ToStandby, place);
        } else {
            proxy.shorten(Way::ToStandby, place);
        }
        proxy.wait_done();
        primary.wait_for("unprotected", |e| matches!(e, Event::Unprotected { .. }));
        if arbitrates {
            primary.wait_for("alone", |e| matches!(e, Event::Won { .. }));
        }
        witnesses.hear_all();
        if round % 4 >= 2 {
            // Base pages are damaged too, before anything is committed.
            primary.wait_for("attached", |e| matches!(e, Event::StandbyAttached { .. }));
            proxy.flip(Way::ToStandby, place >> 1);
            proxy.wait_done();
        }
        primary.wait_protected();
    }
    ([primary, standby], witnesses)
}

/// If the whole rest is missing, a host sees no damage, only silence: the arbiter decides.
#[test]
fn a_checkpoint_that_stops_half_way_leaves_one_side_running() {
    let Some(world) = World::new() else { return };
    let proxy = Proxy::start(&world, Side::A);
    let mut standby = world.standby(Side::B);
    let mut primary = world.run_with(Side::A, &["--standby", &proxy.addr()]);
    primary.wait_protected();
    let witnesses = Witnesses::start(&world, 2);
    proxy.break_off(Way::ToStandby);
    proxy.wait_done();
    wait_until("one side has given up", || primary.ended() || standby.ended());
    let loser = if primary.ended() { &mut primary } else { &mut standby };
    assert_eq!(loser.wait_exit(), 3);
    witnesses.hear_all();
    witnesses.finish(&world);
}

#[test]
fn a_damaged_acknowledgement_is_refused_by_the_primary() {
    let Some(world) = World::new() else { return };
    let mut dice = Dice::new();
    let proxy = Proxy::start(&world, Side::A);
    let mut standby = world.standby(Side::B);
    let mut primary = world.run_with(Side::A, &["--standby", &proxy.addr()]);
    primary.wait_protected();
    let witnesses = Witnesses::start(&world, 2);
    proxy.flip(Way::ToPrimary, dice.below(1 << 40));
    primary.wait_for("unprotected", |e| matches!(e, Event::Unprotected { .. }));
    // Both now ask the arbiter. Whichever wins, the clients must not notice.
    wait_until("one side has given up", || primary.ended() || standby.ended());
    let loser = if primary.ended() { &mut primary } else { &mut standby };
    assert_eq!(loser.wait_exit(), 3);
    witnesses.hear_all();
    witnesses.finish(&world);
}

/// The opposite direction: no program at the standby's address may harm the VM.
#[test]
fn a_standby_that_talks_nonsense_does_not_disturb_the_vm() {
    let Some(world) = World::plain() else { return };
    let mut dice = Dice::new();
    let listener = world.on(Side::A, || TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
    let nonsense = listener.local_addr().unwrap().to_string();
    let noise: Vec<u8> = (0..20_000).map(|_| dice.below(256) as u8).collect();
    let mut primary = world.run_with(Side::A, &["--standby", &nonsense]);
    let witnesses = Witnesses::start(&world, 2);
    let preface = Preface::CURRENT.encode();
    let http = b"HTTP/1.1 400 Bad Request\r\n\r\n";
    for words in [&noise[..], http, b"", &preface, &[&preface[..], &noise].concat()] {
        let (mut stream, _) = listener.accept().unwrap();
        drop(stream.write_all(words));
        stream.shutdown(Shutdown::Write).ok();
        until_closed(stream);
    }
    // A standby that says nothing at all is given up after a while.
    let (stream, _) = listener.accept().unwrap();
    until_closed(stream);
    assert!(!primary.ended());
    assert!(!primary.has(|e| matches!(e, Event::StandbyAttached { .. } | Event::Arbitrating { .. })));
    primary.wait_says("standby not reachable", 1);
    std::thread::sleep(Duration::from_millis(100));
    witnesses.hear_all();
    witnesses.finish(&world);
}
