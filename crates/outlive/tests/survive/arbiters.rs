//! Takeovers with each kind of arbiter that is reached over the network, and what its failures mean: while it cannot
//! say who goes on, nobody does; when it can, one host does.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
use outlive::arbiter::{self, FileArbiter};
use outlive::events::Event;
use outlive::network::Netlink;

use crate::support::{PROGRAM, Process, Side, Witnesses, World, stop, wait_until};

/// A third machine on the clients' network, which both hosts reach.
const THIRD: &str = "10.77.0.1";

/// The arbiter that is served there without keys.
pub(crate) const SERVED: &str = "outlive:10.77.0.1:7010?insecure";

/// Nobody is to take over before a test wants it, on a machine that is busy with the servers. A process that dies is
/// noticed at once all the same.
const DEAD_AFTER: &str = "3s";

/// Gives both hosts an address on the clients' network.
pub(crate) fn join_clients_network(world: &World) {
    for (side, last) in [(Side::A, 11), (Side::B, 12)] {
        let address = Ipv4Addr::new(10, 77, 0, last);
        world.on(side, || Netlink::open().unwrap().add_address("br0", address, 24).unwrap());
    }
}

/// A server on the third machine. Killed and reaped when dropped.
pub(crate) struct Server(Child);

impl Server {
    fn start(world: &World, mut command: Command, name: &str) -> Self {
        let log = File::create(world.dir().join(format!("{name}.log"))).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        Self(world.spawn_third(&mut command))
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        stop::signal(self.0.id(), signal);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn standby(world: &World, side: Side, arbiter: &str) -> Process {
    let other = side.other().addr().to_string();
    world.standby_with(side, &["--standby", &other, "--arbiter", arbiter, "--dead-after", DEAD_AFTER])
}

pub(crate) fn protected(world: &World, arbiter: &str) -> (Process, Process) {
    let standby = standby(world, Side::B, arbiter);
    let other = Side::B.addr().to_string();
    let options = ["--standby", &other, "--arbiter", arbiter, "--dead-after", DEAD_AFTER];
    let mut primary = world.run_with(Side::A, &options);
    primary.wait_protected();
    (primary, standby)
}

/// The primary dies while the arbiter cannot say who goes on. The standby waits until it can.
fn while_nobody_can_say_the_standby_waits(primary: Process, standby: &mut Process, mend: impl FnOnce()) {
    primary.kill();
    standby.wait_for("without its arbiter", |e| matches!(e, Event::ArbiterUnreachable { .. }));
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert!(!standby.took_over());
    mend();
    assert_eq!(standby.wait_takeover(), 2);
}

fn etcd_member(world: &World, number: u16) -> Server {
    let url = |port: u16, number: u16| format!("http://{THIRD}:{}", port + number);
    let all: Vec<String> = (0..3).map(|it| format!("m{it}={}", url(2400, it))).collect();
    let mut command = Command::new("etcd");
    command.args(["--name", &format!("m{number}"), "--initial-cluster", &all.join(",")]);
    command.args(["--listen-client-urls", &url(2379, number), "--advertise-client-urls", &url(2379, number)]);
    command.args(["--listen-peer-urls", &url(2400, number)]);
    command.args(["--initial-advertise-peer-urls", &url(2400, number)]);
    command.arg("--data-dir").arg(world.dir().join(format!("m{number}")));
    Server::start(world, command, &format!("m{number}"))
}

#[test]
fn with_etcd_one_host_goes_on_whatever_a_minority_of_its_members_does() {
    let Some(world) = World::new() else { return };
    if !Command::new("etcd").arg("--version").output().is_ok_and(|out| out.status.success()) {
        println!("skipped: no etcd (apt-get install etcd-server)");
        return;
    }
    join_clients_network(&world);
    let mut members: Vec<Server> = (0..3).map(|number| etcd_member(&world, number)).collect();
    let urls: Vec<String> = (0..3).map(|number| format!("http://{THIRD}:{}", 2379 + number)).collect();
    let arbiter = format!("etcd:{}", urls.join(","));
    wait_until("a cluster that answers", || world.lan(|| arbiter::init(&arbiter).is_ok()));
    let (primary, mut taken) = protected(&world, &arbiter);
    let witnesses = Witnesses::start(&world, 2);
    witnesses.hear_all();
    // Two of three stand still: no majority.
    members[0].signal(SIGSTOP);
    members[1].signal(SIGSTOP);
    while_nobody_can_say_the_standby_waits(primary, &mut taken, || {
        members[0].signal(SIGCONT);
        members[1].signal(SIGCONT);
    });
    witnesses.hear_all();
    // A member dies together with the primary.
    let mut second = standby(&world, Side::A, &arbiter);
    taken.wait_protected();
    members.remove(0);
    taken.kill();
    assert_eq!(second.wait_takeover(), 3);
    witnesses.hear_all();
    witnesses.finish(&world);
}

/// Serves the directory `served` of this world with this program, without keys: the first release had none for it.
pub(crate) fn serve_with(world: &World, program: &Path, name: &str) -> Server {
    let directory = world.dir().join("served");
    let mut command = Command::new(program);
    command.args(["arbiter", "serve", "--insecure", "--listen", &format!("{THIRD}:7010"), "--directory"]);
    command.env("OUTLIVE_INSECURE_NETWORK", "1");
    start_serving(world, command, &directory, name)
}

fn serve(world: &World, name: &str) -> Server {
    let directory = world.dir().join("served");
    let mut command = Command::new(PROGRAM);
    command.arg("arbiter").arg("serve").arg("--keys").arg(world.arbiter_keys());
    command.args(["--listen", &format!("{THIRD}:7010"), "--directory"]);
    start_serving(world, command, &directory, name)
}

fn start_serving(world: &World, mut command: Command, directory: &Path, name: &str) -> Server {
    command.arg(directory);
    let server = Server::start(world, command, name);
    let log = world.dir().join(format!("{name}.log"));
    wait_until("a server that listens", || fs::read_to_string(&log).unwrap().contains(" listens on "));
    server
}

#[test]
fn with_a_served_arbiter_one_host_goes_on_and_nobody_while_it_is_down() {
    let Some(world) = World::new() else { return };
    join_clients_network(&world);
    fs::create_dir(world.dir().join("served")).unwrap();
    FileArbiter::init(&world.dir().join("served")).unwrap();
    let server = serve(&world, "first");
    // With the keys of each host's own process.
    let arbiter = format!("outlive:{THIRD}:7010");
    let (primary, mut taken) = protected(&world, &arbiter);
    let witnesses = Witnesses::start(&world, 2);
    witnesses.hear_all();
    drop(server);
    let mut again = None;
    while_nobody_can_say_the_standby_waits(primary, &mut taken, || again = Some(serve(&world, "second")));
    witnesses.hear_all();
    // The link is cut while it answers: one wins, and the other one hears who.
    let mut second = standby(&world, Side::A, &arbiter);
    taken.wait_protected();
    world.cut_link();
    wait_until("one side gives up", || taken.ended() || second.ended());
    let loser = if taken.ended() { &mut taken } else { &mut second };
    assert_eq!(loser.wait_exit(), 3);
    witnesses.hear_all();
    witnesses.finish(&world);
}

/// An operator's word, said to the process with this socket. Returns the exit code and what was said.
fn word(socket: &Path, words: &[&str]) -> (Option<i32>, String) {
    let out = Command::new(PROGRAM).args(words).arg("--socket").arg(socket).output().unwrap();
    let said = [out.stdout, out.stderr].concat();
    (out.status.code(), String::from_utf8(said).unwrap())
}

/// A protected VM whose arbiter is an operator: where each host answers, the primary and the standby.
fn protected_by_hand(world: &World) -> ([PathBuf; 2], Process, Process) {
    let sockets = ["a", "b"].map(|name| world.dir().join(name));
    let options = |side: Side, socket: &Path| {
        let other = side.other().addr().to_string();
        let status = socket.to_str().unwrap();
        ["--standby", &other, "--arbiter", "manual", "--status", status, "--dead-after", DEAD_AFTER]
            .map(str::to_owned)
    };
    let (at_a, at_b) = (options(Side::A, &sockets[0]), options(Side::B, &sockets[1]));
    let standby = world.standby_with(Side::B, &at_b.each_ref().map(String::as_str));
    let mut primary = world.run_with(Side::A, &at_a.each_ref().map(String::as_str));
    primary.wait_protected();
    (sockets, primary, standby)
}

#[test]
fn with_an_operator_as_arbiter_nobody_goes_on_before_the_word() {
    let Some(world) = World::new() else { return };
    let ([a, b], mut primary, mut standby) = protected_by_hand(&world);
    let witnesses = Witnesses::start(&world, 2);
    witnesses.hear_all();
    for (socket, command) in [(&a, "go-on-alone"), (&b, "take-over"), (&a, "give-up")] {
        let (code, said) = word(socket, &[command, "--generation", "2"]);
        assert!(code == Some(2) && said.contains("the other host is seen"), "{said}");
    }
    world.cut_link();
    for host in [&mut primary, &mut standby] {
        let asks = |e: &Event| matches!(e, Event::ArbiterUnreachable { why } if why.contains("AN OPERATOR MUST DECIDE"));
        host.wait_for("asking an operator", asks);
    }
    for (socket, command, generation, why) in [
        (&a, "take-over", "2", "the VM ran here"),
        (&b, "go-on-alone", "2", "this is the standby"),
        (&b, "take-over", "3", "generation 2 is to be decided"),
        (&b, "take-over", "1", "--help"),
    ] {
        let (code, said) = word(socket, &[command, "--generation", generation]);
        assert!(code == Some(2) && said.contains(why) && said.trim().lines().count() == 1, "{said}");
    }
    assert!(!standby.took_over() && !primary.has(|e| matches!(e, Event::Won { .. })));
    let (code, said) = word(&b, &["take-over", "--generation", "2"]);
    assert!(code == Some(0) && said.contains("this host's"), "{said}");
    assert_eq!(standby.wait_takeover(), 2);
    assert!(standby.has(|e| matches!(e, Event::OperatorDecided { generation: 2, here: true })));
    // Whoever is not sure says it again, and whoever changes their mind is late.
    let (code, said) = word(&b, &["take-over", "--generation", "2"]);
    assert!(code == Some(0) && said.contains("this host's already: nothing was changed"), "{said}");
    let (code, said) = word(&b, &["give-up", "--generation", "2"]);
    assert!(code == Some(2) && said.contains("cannot be taken back"), "{said}");
    // The VM runs there, so no word there helps.
    world.mend_link();
    let (code, said) = word(&a, &["go-on-alone", "--generation", "2"]);
    let runs = format!("the VM runs at {} already", Side::B.addr());
    let remedy = "`outlive give-up --generation 2` on THIS host";
    assert!(code == Some(2) && said.contains(&runs) && said.contains(remedy), "{said}");
    let (code, said) = word(&a, &["give-up", "--generation", "2"]);
    assert!(code == Some(0), "{said}");
    assert_eq!(primary.wait_exit(), 3);
    assert!(primary.log().contains("the other host, by an operator's word"), "{}", primary.log());
    witnesses.hear_all();
    witnesses.finish(&world);
}

/// Two operators, or one in a hurry, give one generation to both hosts. Nobody can undo that, but everybody hears of it.
#[test]
fn two_words_for_one_generation_are_told_loudly() {
    let Some(world) = World::new() else { return };
    let ([a, b], mut primary, mut standby) = protected_by_hand(&world);
    world.cut_link();
    for host in [&mut primary, &mut standby] {
        host.wait_for("asking an operator", |e| matches!(e, Event::ArbiterUnreachable { .. }));
    }
    for (socket, command) in [(&a, "go-on-alone"), (&b, "take-over")] {
        let (code, said) = word(socket, &[command, "--generation", "2"]);
        assert_eq!(code, Some(0), "{said}");
    }
    assert_eq!(standby.wait_takeover(), 2);
    primary.wait_for("alone", |e| matches!(e, Event::Won { generation: 2 }));
    world.mend_link();
    primary.wait_for("both", |e| matches!(e, Event::RunsTwice { same_vm: true, generation: 2, .. }));
    primary.wait_says("THE VM vm RUNS ON BOTH HOSTS: ", 1);
    assert!(primary.log().lines().any(|line| line.contains("ERROR") && line.contains("RUNS ON BOTH HOSTS")));
    let out = Command::new(PROGRAM).args(["status", "--socket"]).arg(&a).output().unwrap();
    let told = String::from_utf8(out.stdout).unwrap();
    assert!(told.contains("RUNS ON BOTH HOSTS"), "{told}");
    assert!(!primary.ended() && !standby.ended(), "nobody stops a VM by itself");
}

/// The hosts see each other again before the operator has decided: then one of them is told first that it has lost.
#[test]
fn an_operators_word_is_refused_while_the_other_host_answers() {
    let Some(world) = World::new() else { return };
    let ([a, b], mut primary, mut standby) = protected_by_hand(&world);
    world.cut_link();
    for host in [&mut primary, &mut standby] {
        host.wait_for("asking an operator", |e| matches!(e, Event::ArbiterUnreachable { .. }));
    }
    // What an operator sees first.
    let told = |socket: &Path| {
        let out = Command::new(PROGRAM).args(["status", "--socket"]).arg(socket).output().unwrap();
        String::from_utf8(out.stdout).unwrap()
    };
    for (socket, command) in [(&a, "`outlive go-on-alone`"), (&b, "`outlive take-over`")] {
        let said = told(socket);
        assert!(said.contains("AN OPERATOR MUST DECIDE") && said.contains(command), "{said}");
        assert!(said.contains("\n  arbiter:            an operator (manual)\n"), "{said}");
        assert!(!said.contains("the arbiter cannot be reached") && !said.contains("seen"), "{said}");
    }
    world.mend_link();
    let (code, said) = word(&a, &["go-on-alone", "--generation", "2"]);
    let seen = format!("the other host is seen at {}", Side::B.addr());
    assert!(
        code == Some(2) && said.contains(&seen) && said.contains("`outlive give-up --generation 2`"),
        "{said}"
    );
    assert!(!primary.has(|e| matches!(e, Event::Won { .. })));
    // A process that is stopped may go on.
    standby.signal(SIGSTOP);
    let (code, said) = word(&a, &["go-on-alone", "--generation", "2"]);
    assert!(code == Some(2) && said.contains(&seen), "{said}");
    standby.signal(SIGCONT);
    let (code, said) = word(&b, &["give-up", "--generation", "2"]);
    assert!(code == Some(0), "{said}");
    assert_eq!(standby.wait_exit(), 3);
    let (code, said) = word(&b, &["give-up", "--generation", "2"]);
    assert!(code == Some(2) && said.trim().lines().count() == 1, "{said}");
    let (code, said) = word(&a, &["go-on-alone", "--generation", "2"]);
    assert!(code == Some(0) && said.contains("this host's"), "{said}");
    primary.wait_for("alone", |e| matches!(e, Event::Won { generation: 2 }));
    let (code, said) = word(&a, &["go-on-alone", "--generation", "2"]);
    assert!(code == Some(0) && said.contains("already"), "{said}");
}
