//! A cluster of three whose members are cut off from one another, but not from the hosts, and hosts that reach only a
//! minority of it. Members and hosts each have a network of their own; a cut is an interface that is down.
//!
//! ```text
//! member 0, 1, 2 ── peer ── bridge of the members
//!                ── at-0 ── bridge of host 0 ── eth ── host 0
//!                ── at-1 ── bridge of host 1 ── eth ── host 1
//! ```

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use outlive::arbiter::{self, Arbiter, Claim};
use outlive::network::{Namespace, Netlink};
use tempfile::TempDir;

use namespace::namespace;

use super::etcd_cluster::has_etcd;
use super::etcd_faults::{RACE, one_winner_each, wait_for_race};
use crate::conformance::answer;
use crate::support::{VM, directory, loser, why};

#[path = "../../common/namespace.rs"]
mod namespace;

const MEMBERS: usize = 3;
const HOSTS: usize = 2;
/// Longer than an election takes (etcd: 1 to 2 s).
const CUT: Duration = Duration::from_millis(2500);
/// How long a winner rests, longer than a claim takes.
const HEAD_START: Duration = Duration::from_millis(5);
/// How long a cluster may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);

fn peer(member: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 88, 0, member as u8 + 1)
}

/// Where a host finds a member.
fn client(host: usize, member: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 90 + host as u8, 0, member as u8 + 1)
}

/// The members, the hosts and their cables.
struct Lab {
    members: Vec<Namespace>,
    hosts: Vec<Namespace>,
    _switch: Namespace,
    prefix: &'static str,
    processes: Vec<Child>,
    _directory: TempDir,
}

impl Lab {
    /// A process remembers how far it has seen a cluster, by its URLs and prefix; so each lab has a prefix of its own.
    fn build(prefix: &'static str) -> Option<Self> {
        if !has_etcd() {
            return None;
        }
        let switch = namespace()?;
        let members: Vec<Namespace> = (0..MEMBERS).map(|_| namespace()).collect::<Option<_>>()?;
        let hosts: Vec<Namespace> = (0..HOSTS).map(|_| namespace()).collect::<Option<_>>()?;
        // A port of a bridge, and the other end of its cable in a namespace.
        let plug = |bridge: &str, port: &str, there: &Namespace, name: &str, address: Ipv4Addr| {
            switch
                .run(|| {
                    let mut netlink = Netlink::open().unwrap();
                    netlink.create_veth(port, name).unwrap();
                    netlink.move_to_namespace(name, there.as_fd()).unwrap();
                    netlink.attach(port, bridge).unwrap();
                    netlink.set_up(port).unwrap();
                })
                .unwrap();
            there
                .run(|| {
                    let mut netlink = Netlink::open().unwrap();
                    netlink.add_address(name, address, 24).unwrap();
                    netlink.set_up(name).unwrap();
                })
                .unwrap();
        };
        let bridges = ["peers", "host0", "host1"];
        switch
            .run(|| {
                let mut netlink = Netlink::open().unwrap();
                for bridge in bridges {
                    netlink.create_bridge(bridge).unwrap();
                    netlink.set_up(bridge).unwrap();
                }
            })
            .unwrap();
        for (number, member) in members.iter().enumerate() {
            plug("peers", &format!("p{number}"), member, "peer", peer(number));
            for host in 0..HOSTS {
                let (bridge, name) = (format!("host{host}"), format!("at-{host}"));
                plug(&bridge, &format!("c{host}-{number}"), member, &name, client(host, number));
            }
        }
        for (number, host) in hosts.iter().enumerate() {
            let address = Ipv4Addr::new(10, 90 + number as u8, 0, 100);
            plug(&format!("host{number}"), &format!("h{number}"), host, "eth", address);
        }
        let directory = directory();
        let processes = members.iter().enumerate().map(|(number, member)| start(number, member, &directory));
        let processes = processes.collect();
        Some(Self { members, hosts, _switch: switch, prefix, processes, _directory: directory })
    }

    /// As in `--arbiter` of a host. All reach the same cluster, at other addresses.
    fn place(&self, host: usize) -> String {
        let urls: Vec<String> =
            (0..MEMBERS).map(|member| format!("http://{}:2379", client(host, member))).collect();
        format!("etcd:{}/{}", urls.join(","), self.prefix)
    }

    fn on<R: Send>(&self, host: usize, work: impl FnOnce() -> R + Send) -> R {
        self.hosts[host].run(work).unwrap()
    }

    /// Makes the arbiter once the cluster answers.
    fn init(&self) {
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = self.on(0, || arbiter::init(&self.place(0)).map(drop)) {
            assert!(Instant::now() < deadline, "{error}");
            sleep(Duration::from_millis(100));
        }
    }

    fn open(&self, host: usize) -> Box<dyn Arbiter> {
        self.on(host, || arbiter::parse(&self.place(host)).unwrap())
    }

    /// Cuts a cable of a member, or mends it.
    fn cable(&self, member: usize, name: &str, is_up: bool) {
        let set = || {
            let mut netlink = Netlink::open().unwrap();
            if is_up { netlink.set_up(name) } else { netlink.set_down(name) }.unwrap();
        };
        self.members[member].run(set).unwrap();
    }

    /// For a while a member reaches no other one, and hosts reach it.
    fn alone(&self, member: usize, meanwhile: impl FnOnce()) {
        self.cable(member, "peer", false);
        meanwhile();
        self.cable(member, "peer", true);
    }

    /// For a while a host reaches this member only.
    fn sees_only(&self, host: usize, member: usize, meanwhile: impl FnOnce()) {
        let cut = |is_up| {
            for other in (0..MEMBERS).filter(|other| *other != member) {
                self.cable(other, &format!("at-{host}"), is_up);
            }
        };
        cut(false);
        meanwhile();
        cut(true);
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

fn start(number: usize, member: &Namespace, directory: &TempDir) -> Child {
    let name = format!("m{number}");
    let all: Vec<String> = (0..MEMBERS).map(|it| format!("m{it}=http://{}:2380", peer(it))).collect();
    let log = File::create(directory.path().join(format!("{name}.log"))).unwrap();
    let own = format!("http://{}:2380", peer(number));
    let mut command = Command::new("etcd");
    command.args(["--name", &name, "--initial-cluster", &all.join(","), "--initial-cluster-state", "new"]);
    command.args(["--listen-client-urls", "http://0.0.0.0:2379", "--listen-peer-urls", &own]);
    command.args(["--advertise-client-urls", &format!("http://{}:2379", client(0, number))]);
    command.args(["--initial-advertise-peer-urls", &own, "--data-dir"]).arg(directory.path().join(&name));
    member.spawn(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log)).unwrap()
}

/// The host that reaches only a minority is told so, the other one wins, and nobody wins twice when all is mended.
#[test]
fn a_host_that_reaches_only_a_minority_wins_nothing() {
    let Some(lab) = Lab::build("minority") else { return };
    lab.init();
    let (mut first, mut second) = (lab.open(0), lab.open(1));
    assert_eq!(lab.on(0, || answer(first.as_mut(), 1, "first")), Claim::Won);
    let mut generation = 1;
    // Each member in turn: one of them leads.
    for member in 0..MEMBERS {
        generation += 1;
        let (mine, other) = (&mut first, &mut second);
        lab.alone(member, || {
            lab.sees_only(0, member, || {
                let start = Instant::now();
                let told = why(lab.on(0, || mine.claim(&VM, generation, "first")));
                assert!(told.contains("majority"), "{told}");
                assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
                assert!(lab.on(0, || mine.highest(&VM)).is_err(), "it answers from memory");
                // The host that reaches the majority takes over.
                assert_eq!(lab.on(1, || answer(other.as_mut(), generation, "second")), Claim::Won);
                why(lab.on(0, || mine.claim(&VM, generation, "first")));
            });
        });
        assert_eq!(loser(lab.on(0, || answer(mine.as_mut(), generation, "first"))), "second");
        // A claim that was left lying in the minority is not won later.
        assert_eq!(lab.on(1, || answer(other.as_mut(), generation, "second")), Claim::Won);
    }
    assert_eq!(lab.on(1, || second.highest(&VM)).unwrap(), Some(generation));
}

/// Claims go on while members lose one another and hosts lose members.
#[test]
fn members_that_are_cut_off_during_claims_leave_one_winner_each() {
    let Some(lab) = Lab::build("cut") else { return };
    lab.init();
    let (lab, ends, reached) = (&lab, AtomicBool::new(false), AtomicU64::new(0));
    let said: Vec<(String, Vec<(u64, Claim)>)> = scope(|threads| {
        let racer = |host: usize| {
            let (ends, reached) = (&ends, &reached);
            move || {
                lab.on(host, || {
                    let mut arbiter = arbiter::parse(&lab.place(host)).unwrap();
                    let owner = format!("host {host}");
                    let mut said = Vec::new();
                    while !ends.load(Ordering::Relaxed) {
                        let generation = said.len() as u64 + 1;
                        let claim = answer(arbiter.as_mut(), generation, &owner);
                        if claim == Claim::Won {
                            // Or the other one may come second to every generation.
                            sleep(HEAD_START);
                        }
                        said.push((generation, claim));
                        reached.fetch_max(generation, Ordering::Relaxed);
                    }
                    (owner, said)
                })
            }
        };
        let racers: Vec<_> = (0..HOSTS).map(|host| threads.spawn(racer(host))).collect();
        sleep(Duration::from_millis(500));
        for member in 0..MEMBERS {
            lab.alone(member, || sleep(CUT));
            sleep(Duration::from_millis(700));
            lab.alone(member, || lab.sees_only(member % HOSTS, member, || sleep(CUT)));
            sleep(Duration::from_millis(700));
        }
        // All three for themselves: nobody has a majority.
        lab.alone(0, || lab.alone(1, || sleep(CUT)));
        sleep(CUT);
        wait_for_race(&reached);
        ends.store(true, Ordering::Relaxed);
        racers.into_iter().map(|racer| racer.join().unwrap()).collect()
    });
    let winners = one_winner_each(&said);
    let highest = lab.on(0, || arbiter::parse(&lab.place(0)).unwrap().highest(&VM).unwrap());
    assert_eq!(highest, winners.keys().next_back().copied());
    println!("{} generations won", winners.len());
    assert!(winners.len() as u64 > RACE, "there was a race: {}", winners.len());
    for host in 0..HOSTS {
        let owner = format!("host {host}");
        assert!(winners.values().any(|winner| *winner == owner), "{owner} has won nothing");
    }
}
