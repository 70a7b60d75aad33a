//! Who has no right to a link gets nothing, and disturbs nobody: strangers, hosts of another CA, expired and revoked
//! ones, hosts without the right to a VM, older versions of TLS, and who says a word at a time.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use outlive::arbiter::{Arbiter, Claim, FileArbiter, VmId};
use outlive::events::Event;
use outlive::keys::{self, Grant, Order, Vms};
use outlive_epoch::{
    Ancestor, DeviceFlags, DeviceInfo, DeviceKind, Encoder, GfnRange, Hello, Layout, Limits, Lineage,
    Message, Peer, Preface, SectionReader, VersionRange,
};

use crate::support::{PATIENCE, Process, Side, Witnesses, World, tls, wait_until};

const DAY: Duration = Duration::from_secs(24 * 3600);
/// A standby complains about strangers once a second.
pub(crate) const COMPLAINT: Duration = Duration::from_millis(1100);
/// Connections at once, more than may be half open.
const CROWD: usize = 100;

/// A ClientHello of TLS 1.2, as OpenSSL sends it with `-tls1_2`: no extension names a newer version.
const TLS12: &[u8] = &[
    0x16, 0x03, 0x01, 0x00, 0x31, 0x01, 0x00, 0x00, 0x2d, 0x03, 0x03, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
    13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 0x00, 0x00, 0x02, 0xc0,
    0x2b, 0x01, 0x00, 0x00, 0x02, 0x00, 0x00,
];

fn knock(world: &World) -> TcpStream {
    knock_at(world, Side::B)
}

/// Connects to a host from the other one.
fn knock_at(world: &World, host: Side) -> TcpStream {
    let stream = world.on(host.other(), || TcpStream::connect_timeout(&host.addr(), PATIENCE)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Says something to the standby, and returns its whole answer.
pub(crate) fn say(world: &World, words: &[u8]) -> Vec<u8> {
    let mut stream = knock(world);
    drop(stream.write_all(words));
    stream.shutdown(Shutdown::Write).ok();
    let mut answer = Vec::new();
    drop(stream.read_to_end(&mut answer));
    answer
}

/// Comes over TLS with these keys or with none, and sends what a primary would. Returns why it was refused.
fn come(world: &World, keys: Option<&Path>) -> String {
    let mut stream = tls(knock(world), keys);
    let preface = Preface::CURRENT.encode();
    let sent = stream.write_all(&preface).and_then(|()| stream.flush());
    let mut answer = Vec::new();
    match sent.and_then(|()| stream.read_to_end(&mut answer)) {
        Ok(_) => panic!("it was let in, and got {} bytes", answer.len()),
        Err(error) => {
            assert!(answer.is_empty(), "it got something: {answer:?}");
            error.to_string()
        }
    }
}

fn order(host: &str) -> Order {
    Order { host: host.into(), grant: Grant::ALL, life: DAY }
}

fn disturbs(event: &Event) -> bool {
    matches!(event, Event::LinkLost { .. } | Event::Unprotected { .. } | Event::Arbitrating { .. })
}

pub(crate) fn unharmed<const COUNT: usize>(processes: [&mut Process; COUNT]) {
    for process in processes {
        assert!(!process.ended());
        assert!(!process.has(disturbs), "protection was disturbed");
    }
}

#[test]
fn who_has_no_right_gets_nothing_and_disturbs_nobody() {
    let Some(world) = World::new() else { return };
    let (mut primary, mut standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    let place = |name: &str| -> PathBuf { world.dir().join(name) };
    keys::init(&place("foreign"), &order("hosta")).unwrap();
    let ours = world.keys(Side::A);
    keys::issue(&ours, &Order { life: Duration::ZERO, ..order("late") }, &place("late")).unwrap();
    let thief = keys::issue(&ours, &order("thief"), &place("thief")).unwrap();
    keys::revoke(&world.keys(Side::B), &thief.serial).unwrap();

    for words in [&b"GET / HTTP/1.1\r\n\r\n"[..], &Preface::CURRENT.encode(), TLS12] {
        thread::sleep(COMPLAINT);
        // At most an alert.
        let answer = say(&world, words);
        assert!(answer.is_empty() || answer[0] == 0x15 && answer.len() == 7, "{answer:?}");
    }
    standby.wait_says("it does not speak TLS 1.3", 2);
    for (keys, complaint) in [
        (None, "it has shown no certificate"),
        (Some("foreign"), "its certificate is of another CA"),
        (Some("late"), "its certificate has expired"),
        (Some("thief"), "of thief is revoked"),
    ] {
        thread::sleep(COMPLAINT);
        let why = come(&world, keys.map(place).as_deref());
        let told = why.contains("AccessDenied") || why.contains("CertificateRequired");
        assert!(told, "{keys:?}: the other end learns that it may not, and not why: {why}");
        standby.wait_says(complaint, 1);
    }
    witnesses.hear_all();
    unharmed([&mut primary, &mut standby]);
    assert!(standby.has(|e| matches!(e, Event::ConnectionRefused { .. })));
    witnesses.finish(&world);
}

/// An introduction as a primary of this VM; with 0 slots, the question whether a VM runs there.
fn hello(vm: VmId, slots: u32) -> Hello {
    let pages = GfnRange { start: 0, pages: 256 };
    Hello {
        vm,
        generation: 1,
        vcpus: 1,
        memory_bytes: 1 << 20,
        layout: Layout::new(vec![pages]).unwrap(),
        firmware_bytes: 0,
        devices: Vec::new(),
        mac: None,
        limits: Limits { max_pages: 256, max_state_bytes: 1 << 16, slots, max_disk_bytes: 0 },
        interval_us: 1000,
        dead_after_us: 500_000,
        name: "other".into(),
        host: "elsewhere".into(),
        tracker: String::new(),
        vendor: String::new(),
        arbiter: String::new(),
        lineage: Lineage::default(),
        versions: VersionRange::CURRENT,
        microcode: 0,
        vcpu: None,
        since: None,
    }
}

fn introduction(hello: &Hello) -> Vec<u8> {
    let mut bytes = Preface::CURRENT.encode().to_vec();
    Encoder::new().hello(&mut bytes, hello).unwrap();
    bytes
}

/// Introduces itself to a host with these keys. Returns the words of the refusal.
fn introduce(world: &World, host: Side, keys: &Path, hello: &Hello) -> String {
    let mut stream = tls(knock_at(world, host), Some(keys));
    stream.write_all(&introduction(hello)).unwrap();
    let mut reader = SectionReader::new(Peer::Standby);
    reader.read_preface(&mut stream).unwrap();
    loop {
        match Message::parse(&reader.read_section(&mut stream).unwrap()).unwrap() {
            Message::Refuse(refuse) => return refuse.text,
            Message::Heartbeat { .. } | Message::Reach(_) | Message::ArbiterSight(_) => {}
            other => panic!("it was let in: {other:?}"),
        }
    }
}

/// A host that has taken a VM over still answers where it waited, as its new standby does. It says which VM it has to hosts
/// that have a right to it, and to no others.
#[test]
fn who_has_a_right_to_another_vm_learns_nothing_of_this_one() {
    let Some(world) = World::new() else { return };
    let (first, mut primary) = world.protected(Side::A);
    first.kill();
    primary.wait_takeover();
    let mut standby = world.standby(Side::A);
    primary.wait_protected();
    let before = primary.events().count();
    let witnesses = Witnesses::start(&world, 2);
    let (nobodys, others) = (VmId([0; 16]), VmId([7; 16]));
    let said = introduce(&world, Side::B, &world.keys(Side::A), &hello(nobodys, 0));
    let id =
        said.split_once("RUNS the VM vm (id ").and_then(|(_, rest)| rest.split_once(',')).expect(&said).0;
    let elsewhere = world.dir().join("elsewhere");
    let grant = Grant { send: Vms::Only(vec![others]), hold: Vms::Only(vec![others]), ..Grant::NONE };
    keys::issue(&world.keys(Side::A), &Order { grant, ..order("elsewhere") }, &elsewhere).unwrap();
    for (keys, asks, comes) in [
        (elsewhere, ["another primary is attached", "has taken a VM over"], None),
        (
            world.arbiter_keys(),
            ["may neither send nor hold a VM"; 2],
            Some("host third may not send VM 0707"),
        ),
    ] {
        for (host, asked) in Side::BOTH.into_iter().zip(asks) {
            for (hello, words) in [(hello(nobodys, 0), asked), (hello(others, 4), comes.unwrap_or(asked))] {
                let said = introduce(&world, host, &keys, &hello);
                assert!(said.contains(words), "{words}: {said}");
                for secret in [id, "RUNS", "generation"] {
                    assert!(!said.contains(secret), "{said}");
                }
            }
        }
    }
    witnesses.hear_all();
    assert!(!primary.ended() && !primary.events().skip(before).any(disturbs));
    unharmed([&mut standby]);
    witnesses.finish(&world);
}

/// Each byte comes soon after the one before, and all of them much later than an introduction may.
#[test]
fn who_introduces_itself_byte_by_byte_is_not_waited_for() {
    let Some(world) = World::new() else { return };
    let (mut primary, mut standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    let words = introduction(&hello(VmId([7; 16]), 4));
    let mut stream = tls(knock(&world), Some(&world.keys(Side::A)));
    let sent = words.iter().take_while(|byte| {
        thread::sleep(Duration::from_millis(50));
        stream.write_all(&[**byte]).and_then(|()| stream.flush()).is_ok()
    });
    let sent = sent.count();
    assert!(sent < words.len(), "all of it was heard");
    standby.wait_says("did not introduce itself in time", 1);
    witnesses.hear_all();
    unharmed([&mut primary, &mut standby]);
    witnesses.finish(&world);
}

/// Keys at one end only.
#[test]
fn a_host_with_keys_and_one_without_are_no_pair() {
    let Some(world) = World::new() else { return };
    let there = Side::B.addr().to_string();
    let options = |insecure: bool| if insecure { &["--insecure"][..] } else { &[] };
    for (without, standby_says, primary_says) in [
        (Side::B, "not a primary", "it has hung up before it had shown a certificate: has it no keys"),
        (Side::A, "it does not speak TLS 1.3", ""),
    ] {
        let standby = world.standby_with(Side::B, options(without == Side::B));
        let own = [&["--standby", &there], options(without == Side::A)].concat();
        let mut primary = world.run_with(Side::A, &own);
        standby.wait_says(standby_says, 1);
        primary.wait_says(primary_says, 1);
        assert!(!primary.has(|e| matches!(e, Event::Protected { .. })));
        primary.kill();
    }
}

#[test]
fn hosts_without_the_right_to_a_vm_are_refused_on_both_sides() {
    let Some(world) = World::new() else { return };
    let none = Grant::NONE;
    let other = Vms::Only(vec![VmId([7; 16])]);
    let make = |name: &str, grant: Grant| {
        let to = world.dir().join(name);
        keys::issue(&world.keys(Side::A), &Order { grant, ..order(name) }, &to).unwrap();
        to.display().to_string()
    };
    let holds = make("holds", Grant { hold: Vms::Any, ..none.clone() });
    let sends = make("sends", Grant { send: Vms::Any, ..none.clone() });
    let elsewhere = make("elsewhere", Grant { send: other.clone(), ..none.clone() });
    let holds_other = make("holds-other", Grant { hold: other, ..none });
    let there = Side::B.addr().to_string();
    let standby = world.standby_with(Side::B, &["--keys", &holds]);
    for (keys, host) in [(&holds, "holds"), (&elsewhere, "elsewhere")] {
        let mut primary = world.run_with(Side::A, &["--standby", &there, "--keys", keys]);
        let complaint = format!("host {host} may not send VM");
        wait_until("the primary is told", || primary.log().contains(&complaint));
        standby.wait_says(&complaint, 1);
        assert!(!primary.has(|e| matches!(e, Event::Protected { .. })));
        primary.kill();
    }
    let mut primary = world.run_with(Side::A, &["--standby", &there, "--keys", &sends]);
    primary.wait_protected();
    primary.kill();
    drop(standby);
    // And the other way round: a standby that may not hold it.
    let standby = world.standby_with(Side::B, &["--keys", &holds_other]);
    let mut primary = world.run(Side::A);
    wait_until("the primary complains", || primary.log().contains("host holds-other may not hold VM"));
    assert!(!primary.has(|e| matches!(e, Event::Protected { .. })));
    primary.kill();
    drop(standby);
    // One that could never be a standby is told so when it starts.
    let (arbiters, vm) = (world.arbiter_keys().display().to_string(), "3".repeat(32));
    for (options, host) in [
        (&["--keys", &sends][..], "sends"),
        (&["--keys", &arbiters], "third"),
        (&["--keys", &holds_other, "--vm", &vm], "holds-other"),
    ] {
        let mut refused = world.standby_with_failure(Side::B, options);
        assert_eq!(refused.wait_exit(), 2, "{}", refused.log());
        refused.wait_says("so this host can be no standby of", 1);
        refused.wait_says(&format!("`outlive keys issue --host {host}"), 1);
    }
}

#[test]
fn a_flood_of_silent_connections_drops_no_protection_and_fills_no_log() {
    let Some(world) = World::new() else { return };
    let (mut primary, mut standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    let before = standby.log().lines().count();
    for _ in 0..3 {
        let crowd: Vec<TcpStream> = (0..CROWD).map(|_| knock(&world)).collect();
        witnesses.hear_all();
        drop(crowd);
    }
    // Whoever has the right comes in while strangers still wait.
    let crowd: Vec<TcpStream> = (0..CROWD).map(|_| knock(&world)).collect();
    unharmed([&mut primary, &mut standby]);
    drop(standby);
    primary.wait_for("alone", |e| matches!(e, Event::Won { .. }));
    let mut again = world.standby(Side::B);
    let more: Vec<TcpStream> = (0..CROWD).map(|_| knock(&world)).collect();
    primary.wait_protected();
    drop((crowd, more));
    assert!(!again.ended());
    let lines = again.log().lines().count();
    assert!(before + lines < 60, "{lines} lines in the log");
    witnesses.finish(&world);
}

/// The bytes of a host's image, and of its sidecar.
fn of_image(world: &World, side: Side) -> [Vec<u8>; 2] {
    let image = world.image(side);
    [fs::read(&image).unwrap(), fs::read(format!("{}.outlive", image.display())).unwrap()]
}

/// A VM that says what it is not: host a has a right to send it, and it won its generation.
fn pretender(world: &World, vm: VmId) -> Hello {
    let mut arbiter = FileArbiter::open(&world.arbiter()).unwrap();
    assert_eq!(arbiter.claim(&vm, 1, "primary on host elsewhere"), Claim::Won);
    let size = fs::metadata(world.image(Side::B)).unwrap().len();
    let disk = DeviceInfo { size, ..DeviceInfo::new(DeviceKind::Disk, 1) };
    Hello { devices: vec![disk], arbiter: arbiter.identity().into(), ..hello(vm, 4) }
}

/// A host may call its VM as another one is called, and may say of it whatever would open that VM's standby and image.
#[test]
fn a_host_with_a_right_to_one_vm_gets_no_standby_and_no_image_of_another() {
    let Some(world) = World::new() else { return };
    fs::write(world.image(Side::B), vec![0x5a; 1 << 20]).unwrap();
    let disk = format!("path={}", world.image(Side::B).display());
    // The image becomes the VM's.
    let mut primary = world.run_with(Side::B, &["--name", "web", "--disk", &disk]);
    primary.wait_for("a VM", |e| matches!(e, Event::Started { vm: Some(_), .. }));
    primary.kill();
    let before = of_image(&world, Side::B);
    let sidecar = String::from_utf8_lossy(&before[1]);
    let id =
        sidecar.lines().find_map(|line| line.strip_prefix("vm = ")).unwrap().trim_matches('"').to_owned();
    let web: VmId = id.parse().unwrap();

    let vm = VmId([7; 16]);
    let elsewhere = world.dir().join("elsewhere");
    let grant = Grant { send: Vms::Only(vec![vm]), ..Grant::NONE };
    keys::issue(&world.keys(Side::A), &Order { grant, ..order("elsewhere") }, &elsewhere).unwrap();
    let comes = pretender(&world, vm);
    let with = |name: &str, flags: DeviceFlags, lineage: Lineage| {
        let devices = comes.devices.iter().map(|disk| DeviceInfo { flags, ..disk.clone() }).collect();
        Hello { name: name.into(), devices, lineage, ..comes.clone() }
    };
    let own = DeviceFlags::default();
    let (shared, read_only) = (DeviceFlags { shared: true, ..own }, DeviceFlags { read_only: true, ..own });
    let none = Lineage::default;
    let begun_from_it = Lineage::new([Ancestor { vm: web, through: u64::MAX }]);
    let is_anothers = "is the image of a VM that host elsewhere may not send";
    for (served, introductions, words) in [
        (
            &id,
            vec![with(&id, own, none()), with("web", shared, none())],
            "this standby is kept for another VM",
        ),
        (
            &"web".to_owned(),
            vec![
                with("web", own, none()),
                with("web", shared, none()),
                with("web", read_only, none()),
                with("web", own, begun_from_it),
            ],
            is_anothers,
        ),
    ] {
        let mut standby = world.standby_with(Side::B, &["--disk", &disk, "--vm", served]);
        for hello in &introductions {
            let said = introduce(&world, Side::B, &elsewhere, hello);
            assert!(said.contains(words) && said.lines().count() == 1, "{hello:?}: {said}");
        }
        standby.wait_says(words, 1);
        unharmed([&mut standby]);
        standby.kill();
        assert!(of_image(&world, Side::B) == before, "{served}: the image or its sidecar has changed");
    }
}
