//! Who may ask the arbiter that Outlive serves, and who may be it.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use outlive::arbiter::{self, Arbiter, Claim, FileArbiter, Mode};
use outlive::keys::{self as made, Grant, Order, Vms};
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

use super::keys::{self, Keys, order};
use super::proxy::Proxy;
use super::server::Server;
use crate::conformance::answer;
use crate::support::{OTHER_VM, VM, directory, why};

#[path = "../../common/tls.rs"]
mod tls;

/// A server complains about strangers once a second.
const COMPLAINT: Duration = Duration::from_millis(1100);

/// An arbiter that is served with keys.
struct Stage {
    keys: Keys,
    server: Server,
    directory: TempDir,
}

impl Stage {
    fn set() -> Self {
        let (keys, directory) = (Keys::make(), directory());
        FileArbiter::init(directory.path()).unwrap();
        let server = Server::start(directory.path(), "127.0.0.1:0", Some(&keys.arbiter()));
        Self { keys, server, directory }
    }

    /// Opens it with these keys.
    fn open(&self, keys: &Path) -> Result<Box<dyn Arbiter>, String> {
        arbiter::parse(&keys::place(self.server.address, keys)).map_err(|error| error.to_string())
    }

    fn refusal(&self, keys: &Path) -> String {
        self.open(keys).map(drop).unwrap_err()
    }

    /// Of another host of the same CA.
    fn issue(&self, order: &Order) -> PathBuf {
        self.keys.issue(order);
        self.keys.of(&order.host)
    }
}

#[test]
fn who_has_no_key_that_counts_gets_nothing() {
    let stage = Stage::set();
    let mut host = stage.open(&stage.keys.host()).unwrap();
    assert_eq!(host.claim(&VM, 1, "primary"), Claim::Won);
    let foreign = stage.keys.of("foreign");
    made::init(&foreign, &order("hosta", Grant { arbiter: true, ..Grant::ALL })).unwrap();
    let late = stage.issue(&Order { life: Duration::ZERO, ..order("late", Grant::ALL) });
    let thief = stage.issue(&order("thief", Grant::ALL));
    made::revoke(&stage.keys.arbiter(), "thief").unwrap();
    // Each side judges: a host of another CA does not believe the arbiter either.
    assert!(stage.refusal(&foreign).contains("its certificate is of another CA"));
    for (keys, logged) in [(&late, "its certificate has expired"), (&thief, "of thief is revoked")] {
        sleep(COMPLAINT);
        let told = stage.refusal(keys);
        assert!(told.contains("does not accept this host's certificate"), "{told}");
        stage.server.wait_says(logged);
    }
    // Without TLS.
    let plain = format!("outlive:{}?insecure", stage.server.address);
    let told = arbiter::parse(&plain).map(drop).unwrap_err().to_string();
    assert!(told.contains("leave out ?insecure"), "{told}");
    // An arbiter that was opened in time is refused, too, once the keys count no longer.
    assert_eq!(host.claim(&VM, 2, "primary"), Claim::Won);
    made::revoke(&stage.keys.arbiter(), "hosta").unwrap();
    let told = why(host.claim(&VM, 3, "primary"));
    assert!(told.contains("does not accept this host's certificate"), "{told}");
    assert!(host.prober()().is_err());
    // With a new certificate it goes on, and has not been started again.
    stage.issue(&order("hosta", Grant::ALL));
    assert_eq!(answer(host.as_mut(), 3, "primary"), Claim::Won);
}

#[test]
fn a_host_with_keys_and_an_arbiter_without_do_not_speak() {
    let (keys, directory) = (Keys::make(), directory());
    FileArbiter::init(directory.path()).unwrap();
    let server = Server::start(directory.path(), "127.0.0.1:0", None);
    let told = arbiter::parse(&keys::place(server.address, &keys.host())).map(drop).unwrap_err().to_string();
    assert!(told.contains("it does not speak TLS 1.3"), "{told}");
    arbiter::parse(&format!("outlive:{}?insecure", server.address)).unwrap();
}

/// A certificate for another VM is one of the same CA, and no more.
#[test]
fn a_host_asks_about_the_vms_of_its_certificate_and_about_no_others() {
    let stage = Stage::set();
    let mut host = stage.open(&stage.keys.host()).unwrap();
    for vm in [&VM, &OTHER_VM] {
        assert_eq!(host.claim(vm, 1, "primary"), Claim::Won);
    }
    for (name, grant) in [
        ("sender", Grant { send: Vms::Only(vec![VM]), ..Grant::NONE }),
        ("holder", Grant { hold: Vms::Only(vec![VM]), ..Grant::NONE }),
    ] {
        let mut its = stage.open(&stage.issue(&order(name, grant))).unwrap();
        let next = its.highest(&VM).unwrap().unwrap() + 1;
        assert_eq!(its.claim(&VM, next, name), Claim::Won);
        let told = why(its.claim(&OTHER_VM, 2, name));
        assert!(told.contains(&format!("host {name} may neither send nor hold VM {OTHER_VM}")), "{told}");
        assert!(
            told.contains(&format!("`outlive keys issue --host {name} --vm {OTHER_VM} --vm {VM} --")),
            "{told}"
        );
        let refused: [Result<(), _>; 6] = [
            its.highest(&OTHER_VM).map(drop),
            its.history(&OTHER_VM).map(drop),
            its.ending(&OTHER_VM).map(drop),
            its.note_end(&OTHER_VM, 1, "x"),
            its.prune(&OTHER_VM, Mode::Remove).map(drop),
            its.forget(&OTHER_VM, Duration::ZERO, Mode::Remove).map(drop),
        ];
        assert!(
            refused.iter().all(|it| it.as_ref().is_err_and(|why| why.to_string().contains("may neither")))
        );
        assert_eq!(its.vms().unwrap(), [VM], "it does not even learn of the other one");
    }
    assert_eq!(host.vms().unwrap(), [VM, OTHER_VM]);
    assert_eq!(host.highest(&OTHER_VM).unwrap(), Some(1));
    // The arbiter's own certificate has no VM to run: it looks after all, and wins nothing.
    let mut steward = stage.open(&stage.keys.arbiter()).unwrap();
    assert_eq!(steward.vms().unwrap(), [VM, OTHER_VM]);
    assert!(why(steward.claim(&VM, 4, "third")).contains("may neither send nor hold"));
    assert!(steward.note_end(&VM, 3, "third").unwrap_err().to_string().contains("may neither"));
}

/// A ClientHello of TLS 1.2, as OpenSSL sends it with `-tls1_2`: no extension names a newer version.
const TLS12: &[u8] = &[
    0x16, 0x03, 0x01, 0x00, 0x31, 0x01, 0x00, 0x00, 0x2d, 0x03, 0x03, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
    13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 0x00, 0x00, 0x02, 0xc0,
    0x2b, 0x01, 0x00, 0x00, 0x02, 0x00, 0x00,
];

/// What the server answers to these words.
fn say(stage: &Stage, words: &[u8]) -> Vec<u8> {
    let mut stranger = TcpStream::connect(stage.server.address).unwrap();
    stranger.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    drop(stranger.write_all(words));
    drop(stranger.shutdown(std::net::Shutdown::Write));
    let mut answer = Vec::new();
    drop(stranger.read_to_end(&mut answer));
    answer
}

/// A claim that somebody has recorded is not made once more, and nobody speaks an older TLS.
#[test]
fn a_recorded_question_and_an_older_tls_get_nothing() {
    let stage = Stage::set();
    let proxy = Proxy::before_tls(stage.server.address);
    let mut host = arbiter::parse(&keys::place(proxy.address, &stage.keys.host())).unwrap();
    proxy.forget();
    assert_eq!(host.claim(&VM, 1, "primary"), Claim::Won);
    let claim = proxy.heard();
    assert!(claim.len() > 1000, "a claim was recorded");
    // The files say whether it was carried out: without the claim, it could be won again.
    let files = stage.directory.path().join(VM.to_string());
    fs::remove_dir_all(&files).unwrap();
    sleep(COMPLAINT);
    let answer = say(&stage, &claim);
    let (mut rest, mut records) = (&answer[..], 0);
    while let [0x14..=0x17, 3, _, high, low, more @ ..] = rest {
        rest = &more[usize::from(*high) << 8 | usize::from(*low)..];
        records += 1;
    }
    assert!(rest.is_empty() && records > 0 && answer.len() < 8192, "a handshake at most: {answer:?}");
    stage.server.wait_says("refused a connection of 127.0.0.1: TLS: ");
    assert!(!files.exists(), "nobody has won anything");
    sleep(COMPLAINT);
    let answer = say(&stage, TLS12);
    assert!(answer.len() == 7 && answer[0] == 0x15, "an alert: {answer:?}");
    stage.server.wait_says("it does not speak TLS 1.3");
}

/// Any host of VMs has a certificate of the same CA. It must not be able to let another host win what it wants.
#[test]
fn a_host_of_vms_cannot_pose_as_the_arbiter() {
    let stage = Stage::set();
    let mut host = stage.open(&stage.keys.host()).unwrap();
    assert_eq!(host.claim(&VM, 1, "primary"), Claim::Won);
    let impostor = stage.issue(&order("hostb", Grant::ALL));
    fs::copy(impostor.join("host.pem"), stage.keys.arbiter().join("host.pem")).unwrap();
    let told = why(host.claim(&VM, 2, "primary"));
    assert!(told.contains("host hostb may not be the arbiter"), "{told}");
    assert!(told.contains("`outlive keys issue --host NAME --arbiter`"), "{told}");
    assert!(stage.refusal(&stage.keys.host()).contains("may not be the arbiter"));
}

/// A claim is repeated five times a second. A refusal lasts.
#[test]
fn a_host_that_is_refused_asks_more_and_more_seldom() {
    let stage = Stage::set();
    let proxy = Proxy::before(stage.server.address);
    let keys = stage.issue(&order("other", Grant { send: Vms::Only(vec![OTHER_VM]), ..Grant::NONE }));
    let mut its = arbiter::parse(&keys::place(proxy.address, &keys)).unwrap();
    let (before, start) = (proxy.connections(), Instant::now());
    let mut said = 0;
    while start.elapsed() < Duration::from_secs(4) {
        assert!(why(its.claim(&VM, 1, "x")).contains("may neither send nor hold"));
        said += 1;
        sleep(Duration::from_millis(100));
    }
    let asked = proxy.connections() - before;
    assert!(said > 20 && (2..=6).contains(&asked), "{asked} questions for {said} claims");
    // Each VM is another matter only for whoever asks about both; this one is asked with a new right soon.
    stage.issue(&order("other", Grant::ALL));
    assert_eq!(answer(its.as_mut(), 1, "x"), Claim::Won);
}

#[test]
fn keys_and_cas_are_renewed_while_claims_are_made() {
    let stage = Stage::set();
    let (ends, keys) = (AtomicBool::new(false), &stage.keys);
    let won = scope(|threads| {
        let claims = threads.spawn(|| {
            let mut host = stage.open(&keys.host()).unwrap();
            let mut generation = 0;
            while !ends.load(Ordering::Relaxed) {
                generation += 1;
                assert_eq!(host.claim(&VM, generation, "primary"), Claim::Won, "without a retry");
            }
            generation
        });
        let pause = || sleep(Duration::from_millis(300));
        pause();
        made::rotate(&keys.arbiter(), Duration::from_secs(3600), true).unwrap();
        keys.issue(&order("hosta", Grant::ALL));
        pause();
        made::rotate_ca(&keys.arbiter()).unwrap();
        keys.copy("ca.crt");
        pause();
        made::rotate(&keys.arbiter(), Duration::from_secs(3600), true).unwrap();
        pause();
        keys.issue(&order("hosta", Grant::ALL));
        pause();
        made::forget_old_cas(&keys.arbiter(), false).unwrap();
        keys.copy("ca.crt");
        pause();
        ends.store(true, Ordering::Relaxed);
        claims.join().unwrap()
    });
    println!("{won} generations");
    assert!(won > 20, "{won}");
    assert_eq!(made::load(&keys.host()).unwrap().cas.len(), 1);
    assert!(made::load(&keys.arbiter()).unwrap().host.grant.arbiter, "the right stays");
}

/// Connections that never show a certificate come from this very address, and faster than they are ended.
#[test]
fn a_flood_of_half_open_connections_holds_nobody_up_and_fills_no_log() {
    let stage = Stage::set();
    let mut host = stage.open(&stage.keys.host()).unwrap();
    let ends = AtomicBool::new(false);
    let (flood, longest) = scope(|threads| {
        let flood = threads.spawn(|| {
            let (mut open, mut count) = (std::collections::VecDeque::new(), 0);
            while !ends.load(Ordering::Relaxed) {
                // Half of a record, and then nothing.
                if let Ok(mut stranger) = TcpStream::connect(stage.server.address) {
                    let _ = std::io::Write::write_all(&mut stranger, &[0x16, 3, 1, 2]);
                    open.push_back(stranger);
                    count += 1;
                }
                if open.len() > 200 {
                    open.pop_front();
                }
                sleep(Duration::from_millis(5));
            }
            count
        });
        sleep(Duration::from_millis(300));
        let mut longest = Duration::ZERO;
        for generation in 1..=30 {
            let start = Instant::now();
            assert_eq!(answer(host.as_mut(), generation, "primary"), Claim::Won);
            longest = longest.max(start.elapsed());
        }
        ends.store(true, Ordering::Relaxed);
        (flood.join().unwrap(), longest)
    });
    println!("{flood} strangers, {longest:?} for the longest claim");
    assert!(flood > 50 && longest < Duration::from_secs(10), "{flood}, {longest:?}");
    let log = stage.server.log();
    assert!(log.iter().any(|line| line.contains("the oldest are dropped")), "{log:#?}");
    assert!(log.len() < 30, "{} lines in the log", log.len());
    // Whoever says nothing is not waited for.
    let mut silent = TcpStream::connect(stage.server.address).unwrap();
    silent.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let start = Instant::now();
    let _ = silent.read(&mut [0; 100]);
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

/// The host of some VM, or whoever has broken into it, comes again and again with its certificate and asks nothing: from as
/// many addresses as fill all places, this one among them, and with the keys of a second VM.
#[test]
fn a_host_that_shows_its_certificate_and_asks_nothing_keeps_no_other_host_out() {
    let stage = Stage::set();
    let mut host = stage.open(&stage.keys.host()).unwrap();
    let its = Grant { send: Vms::Only(vec![OTHER_VM]), ..Grant::NONE };
    let keys = ["other", "another"].map(|name| stage.issue(&order(name, its.clone())));
    let knock = |number: usize| silent(&stage, 1 + number as u8 % 5, &keys[number % 2]);
    // More than there is room for, of five addresses and of all.
    for generation in 1..=3 {
        let open: Vec<_> = (0..100).filter_map(knock).collect();
        assert!(open.len() > 64, "{} have shown their certificate", open.len());
        assert_eq!(answer(host.as_mut(), generation, "primary"), Claim::Won);
    }
    // And while they come.
    let ends = AtomicBool::new(false);
    scope(|threads| {
        threads.spawn(|| {
            let mut open = std::collections::VecDeque::new();
            for number in (0..).take_while(|_| !ends.load(Ordering::Relaxed)) {
                open.extend(knock(number));
                if open.len() > 80 {
                    open.pop_front();
                }
            }
        });
        for generation in 4..=20 {
            assert_eq!(answer(host.as_mut(), generation, "primary"), Claim::Won);
        }
        ends.store(true, Ordering::Relaxed);
    });
    let log = stage.server.log();
    assert!(log.iter().any(|line| line.contains("the oldest are dropped")), "{log:#?}");
    assert!(!log.iter().any(|line| line.contains("too many connections; one of")), "{log:#?}");
}

/// Shows a certificate to the server, and asks nothing. Nothing comes of it if the server drops it before.
fn silent(stage: &Stage, last: u8, keys: &Path) -> Option<tls::Tls> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 1, last], 0)).into()).unwrap();
    socket.connect(&stage.server.address.into()).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut stranger = tls::tls(stream, Some(keys));
    while stranger.conn.is_handshaking() {
        stranger.conn.complete_io(&mut stranger.sock).ok()?;
    }
    Some(stranger)
}

/// It counts, and allows nothing here: that is said before a question is read.
#[test]
fn who_may_have_no_vm_and_be_no_arbiter_is_sent_away_at_once() {
    let stage = Stage::set();
    let operator = stage.issue(&order("alice", Grant::OPERATOR));
    let told = stage.refusal(&operator);
    assert!(told.contains("the certificate of alice allows no VM"), "{told}");
    let mut told = String::new();
    let mut stranger = silent(&stage, 1, &operator).expect("its certificate counts");
    drop(stranger.read_to_string(&mut told));
    assert!(told.contains("forbidden") && told.contains("`outlive keys issue --host NAME`"), "{told}");
    assert_eq!(answer(stage.open(&stage.keys.host()).unwrap().as_mut(), 1, "primary"), Claim::Won);
}

#[test]
fn what_an_operator_does_goes_over_tls_too() {
    let stage = Stage::set();
    let place = keys::place(stage.server.address, &stage.keys.host());
    let mut host = stage.open(&stage.keys.host()).unwrap();
    for generation in 1..=12 {
        assert_eq!(host.claim(&VM, generation, "primary"), Claim::Won);
    }
    let run = |words: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_outlive")).args(words).output().unwrap();
        (out.status.code(), String::from_utf8([out.stdout, out.stderr].concat()).unwrap())
    };
    let (vm, known) = (VM.to_string(), host.identity().to_owned());
    for (words, said) in [
        (&["arbiter", "list", &place][..], known.as_str()),
        (&["arbiter", "show", &place, &vm], "generation 12"),
        (&["arbiter", "prune", &place], "generations 1 to 4"),
        (&["arbiter", "release", &place, &vm, "--yes"], "released in generation 13"),
    ] {
        let (code, text) = run(words);
        assert!(code == Some(0) && text.contains(said), "{words:?}: {text}");
    }
    let (code, text) = run(&["arbiter", "init", &place]);
    assert!(code == Some(2) && text.contains("outlive arbiter init file:DIR"), "{text}");
    // With keys for another VM, or none.
    let other = stage.issue(&order("other", Grant { send: Vms::Only(vec![OTHER_VM]), ..Grant::NONE }));
    let (code, text) = run(&["arbiter", "release", &keys::place(stage.server.address, &other), &vm, "--yes"]);
    assert!(code == Some(2) && text.contains("knows no VM"), "{text}");
    let none = stage.keys.of("none");
    let (code, text) = run(&["arbiter", "list", &keys::place(stage.server.address, &none)]);
    assert!(
        code == Some(2) && text.contains("outlive keys init") && text.trim().lines().count() == 1,
        "{text}"
    );
    drop(stage.directory);
}

/// What was forgotten can be won once more, so no host decides on that.
#[test]
fn only_the_arbiters_own_certificate_has_a_vm_forgotten() {
    let stage = Stage::set();
    let (mut host, mut steward) =
        (stage.open(&stage.keys.host()).unwrap(), stage.open(&stage.keys.arbiter()).unwrap());
    assert_eq!(host.claim(&VM, 1, "primary"), Claim::Won);
    host.note_end(&VM, 1, "the guest powered off").unwrap();
    for mode in [Mode::Remove, Mode::Name] {
        let told = host.forget(&VM, Duration::ZERO, mode).unwrap_err().to_string();
        assert!(told.contains("prune file:DIR --forget-ended AGE"), "{told}");
    }
    assert_eq!(host.highest(&VM).unwrap(), Some(1));
    assert!(steward.forget(&VM, Duration::ZERO, Mode::Remove).unwrap());
}

/// Also of a host that never removes what is old.
#[test]
fn a_vm_has_few_files_whatever_its_hosts_say() {
    let stage = Stage::set();
    let mut host = stage.open(&stage.keys.host()).unwrap();
    let place = stage.directory.path().join(VM.to_string());
    assert_eq!(host.claim(&VM, 1, "primary"), Claim::Won);
    // As 0.2.0 took them from anybody.
    for generation in 1000..1100 {
        let text = format!("outlive end of a VM, version 1\nvm {VM}\ngeneration {generation}\nwhy x\nend\n");
        fs::write(place.join(format!("ended.{generation}")), text).unwrap();
    }
    for generation in 2..=150 {
        assert_eq!(host.claim(&VM, generation, "primary"), Claim::Won);
    }
    host.note_end(&VM, 150, "the end").unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let count = || fs::read_dir(&place).unwrap().count();
    while count() > 70 {
        assert!(Instant::now() < deadline, "{} files", count());
        sleep(Duration::from_millis(20));
    }
    assert_eq!(host.highest(&VM).unwrap(), Some(150));
    assert_eq!(host.ending(&VM).unwrap().unwrap().generation, 150);
    assert!(!place.join("ended.1000").exists());
}
