//! The third machine, which says who has the VM: a directory that both hosts see, the arbiter that Outlive serves, or an
//! etcd cluster of three. Both hosts reach it by a network of its own, so that it can be lost without anything else; the
//! members of a cluster reach one another by yet another one.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use outlive::arbiter;
use outlive::network::{Namespace, Netlink};
use serde_json::{Value, json};

use super::disk::Place;
use crate::support::{Dice, PATIENCE, PROGRAM, Pace, Side, World, namespace, stop, wait_until};

/// What it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arbiter {
    File,
    Own,
    Etcd,
}

impl Arbiter {
    /// As the environment wants it; without a wish any kind, for each VM another one.
    pub(super) fn wanted(dice: &mut Dice) -> Self {
        match std::env::var("OUTLIVE_TORTURE_ARBITER").as_deref() {
            Err(_) | Ok("any") => Self::any(dice),
            Ok("file") => Self::File,
            Ok("own") => Self::Own,
            Ok("etcd") => Self::Etcd,
            Ok(other) => panic!("OUTLIVE_TORTURE_ARBITER is file, own, etcd or any, not {other}"),
        }
    }

    fn any(dice: &mut Dice) -> Self {
        // The same choices wherever a seed is repeated.
        match dice.below(3) {
            0 => Self::File,
            1 => Self::Own,
            _ if has_etcd() => Self::Etcd,
            _ => {
                println!("no etcd (apt-get install etcd-server), so Outlive's own arbiter is tortured");
                Self::Own
            }
        }
    }
}

fn has_etcd() -> bool {
    Command::new("etcd").arg("--version").output().is_ok_and(|it| it.status.success())
}

/// Where Outlive's own is on the network that the hosts reach.
const SERVED: Ipv4Addr = Ipv4Addr::new(10, 66, 0, 1);

/// Where the hosts find a member of a cluster.
fn front(member: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 66, 0, member as u8 + 11)
}

/// Where the other members find it.
fn peer(member: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 67, 0, member as u8 + 11)
}

/// The port of Outlive's own.
const PORT: u16 = 7010;
/// Members of a cluster.
const MEMBERS: usize = 3;

/// Its servers are killed when it is dropped.
pub(super) struct Third {
    pub(super) arbiter: Arbiter,
    place: Place,
    servers: Vec<Child>,
    /// The machines of a cluster's members.
    machines: Vec<Namespace>,
    /// Those that were lost last.
    lost: Vec<usize>,
}

impl Third {
    /// Makes it, for the hosts that start from now on.
    pub(super) fn start(world: &mut World, arbiter: Arbiter) -> Self {
        let place = Place::of_arbiter(world);
        let (servers, machines, lost) = (Vec::new(), Vec::new(), Vec::new());
        let mut third = Self { arbiter, place, servers, machines, lost };
        if arbiter == Arbiter::File {
            return third;
        }
        world.join_third(1);
        if arbiter == Arbiter::Etcd {
            third.machines = machines_of_members(world);
        }
        third.servers = (0..third.count()).map(|number| third.serve(world, number)).collect();
        let text = match arbiter {
            Arbiter::Etcd => {
                let urls: Vec<String> = (0..MEMBERS).map(|it| format!("http://{}:2379", front(it))).collect();
                format!("etcd:{}", urls.join(","))
            }
            _ => format!("outlive:{SERVED}:{PORT}"),
        };
        third.wait(world, &text);
        world.ask_arbiter(text);
        third
    }

    fn count(&self) -> usize {
        match self.arbiter {
            Arbiter::File => 0,
            Arbiter::Own => 1,
            Arbiter::Etcd => MEMBERS,
        }
    }

    /// So many that the rest cannot say who has the VM.
    fn most(&self) -> usize {
        self.count() / 2 + 1
    }

    fn serve(&self, world: &World, number: usize) -> Child {
        let log = world.dir().join(format!("arbiter-{number}.log"));
        let log = File::options().create(true).append(true).open(log).unwrap();
        let mut command = match self.arbiter {
            Arbiter::Etcd => member(number, world.dir().join(format!("member-{number}"))),
            _ => {
                let mut command = Command::new(PROGRAM);
                command.args(["arbiter", "serve", "--listen", &format!("{SERVED}:{PORT}")]);
                command.arg("--directory").arg(world.arbiter()).arg("--keys").arg(world.arbiter_keys());
                command.arg("--exit-with-stdin").stdin(Stdio::piped());
                command
            }
        };
        command.stdout(Stdio::null()).stderr(log);
        match self.machines.get(number) {
            Some(machine) => machine.spawn(&mut command).unwrap(),
            None => world.spawn_third(&mut command),
        }
    }

    /// Waits until it answers.
    fn wait(&self, world: &World, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        let answers = || match self.arbiter {
            // A process of its own: this one would go on asking an earlier cluster, or that of another pair, which had
            // the same addresses.
            Arbiter::Etcd => {
                let mut command = Command::new(PROGRAM);
                command.args(["arbiter", "init", text]).stdout(Stdio::null()).stderr(Stdio::null());
                world.spawn_third(&mut command).wait().is_ok_and(|status| status.success())
            }
            _ => world.lan(|| TcpStream::connect((SERVED, PORT))).is_ok(),
        };
        while !answers() {
            assert!(Instant::now() < deadline, "{text} does not answer");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// So many, from this one on, that the rest cannot say who has the VM.
    fn majority(&self, first: usize) -> Vec<usize> {
        (0..self.most()).map(|it| (first + it) % self.count()).collect()
    }

    /// SIGKILL of so many, from this one on, that nobody can say who has the VM, or the directory is gone; [`Third::back`]
    /// undoes it.
    pub(super) fn lose(&mut self, world: &World, first: usize) {
        if self.arbiter == Arbiter::File {
            return fs::rename(world.arbiter(), away(world)).unwrap();
        }
        self.lost = self.majority(first);
        for &number in &self.lost {
            end(&mut self.servers[number]);
        }
    }

    pub(super) fn back(&mut self, world: &World) {
        if self.arbiter == Arbiter::File {
            return fs::rename(away(world), world.arbiter()).unwrap();
        }
        for number in std::mem::take(&mut self.lost) {
            self.servers[number] = self.serve(world, number);
        }
    }

    /// SIGKILL of one server, and its next start at once.
    pub(super) fn kill_one(&mut self, world: &World, number: usize) {
        let number = number % self.count();
        end(&mut self.servers[number]);
        self.servers[number] = self.serve(world, number);
    }

    /// SIGSTOP or SIGCONT of so many, from this one on, that nobody can say who has the VM.
    pub(super) fn signal(&self, signal: Signal, first: usize) {
        for number in self.majority(first) {
            stop::signal(self.servers[number].id(), signal);
        }
    }

    /// Whether it is a cluster, whose members can lose one another.
    pub(super) fn is_cluster(&self) -> bool {
        !self.machines.is_empty()
    }

    /// How many members it has.
    pub(super) fn members(&self) -> usize {
        self.machines.len()
    }

    /// A member reaches no other one, or does so again. The hosts reach it all the time.
    pub(super) fn reaches_others(&self, member: usize, reaches: bool) {
        let set = || {
            let mut netlink = Netlink::open().unwrap();
            if reaches { netlink.set_up("peer") } else { netlink.set_down("peer") }.unwrap();
        };
        self.machines[member].run(set).unwrap();
    }

    /// The member that leads, as most of them say.
    pub(super) fn leader(&self, world: &World) -> Option<usize> {
        let status = |member| world.lan(|| status(member));
        let told: Vec<Value> = (0..self.machines.len()).map(|it| status(it).unwrap_or_default()).collect();
        let most =
            |leader: &&Value| 2 * told.iter().filter(|it| it["leader"] == **leader).count() > told.len();
        let leader = told.iter().map(|it| &it["leader"]).filter(|it| it.is_string()).find(most)?;
        told.iter().position(|it| it["header"]["member_id"] == *leader)
    }

    /// Whether it has servers, which can be killed and frozen.
    pub(super) fn is_served(&self) -> bool {
        self.arbiter != Arbiter::File
    }

    /// Whether what it writes can be slow.
    pub(super) fn can_be_slow(&self) -> bool {
        self.place.can_be_slow() && self.arbiter != Arbiter::Etcd
    }

    pub(super) fn set(&self, pace: Pace) {
        self.place.set(pace);
    }
}

impl Drop for Third {
    fn drop(&mut self) {
        self.servers.iter_mut().for_each(end);
    }
}

fn away(world: &World) -> PathBuf {
    world.arbiter().with_file_name("away")
}

fn end(server: &mut Child) {
    let _ = server.kill();
    let _ = server.wait();
}

/// What a member says of itself, if it answers.
fn status(member: usize) -> Option<Value> {
    let time = Some(Duration::from_secs(2));
    let config = ureq::Agent::config_builder().timeout_global(time).proxy(None).build();
    let url = format!("http://{}:2379/v3/maintenance/status", front(member));
    ureq::Agent::from(config).post(url).send_json(json!({})).ok()?.body_mut().read_json().ok()
}

/// Each has a cable to the hosts' network and one to the other members.
fn machines_of_members(world: &World) -> Vec<Namespace> {
    world.lan(|| {
        let mut netlink = Netlink::open().unwrap();
        netlink.create_bridge("peers").unwrap();
        netlink.set_up("peers").unwrap();
    });
    let machine = |number| {
        let machine = namespace().expect("the hosts have theirs");
        for (bridge, name, address) in [("third", "front", front(number)), ("peers", "peer", peer(number))] {
            let port = format!("{name}-{number}");
            world.lan(|| {
                let mut netlink = Netlink::open().unwrap();
                netlink.create_veth(&port, name).unwrap();
                netlink.move_to_namespace(name, machine.as_fd()).unwrap();
                netlink.attach(&port, bridge).unwrap();
                netlink.set_up(&port).unwrap();
            });
            let plug = || {
                let mut netlink = Netlink::open().unwrap();
                netlink.add_address(name, address, 24).unwrap();
                netlink.set_up(name).unwrap();
            };
            machine.run(plug).unwrap();
        }
        machine
    };
    (0..MEMBERS).map(machine).collect()
}

fn member(number: usize, data: PathBuf) -> Command {
    let all: Vec<String> = (0..MEMBERS).map(|it| format!("m{it}=http://{}:2380", peer(it))).collect();
    let (client, own) = (format!("http://{}:2379", front(number)), format!("http://{}:2380", peer(number)));
    let mut command = Command::new("etcd");
    command.args(["--name", &format!("m{number}"), "--initial-cluster", &all.join(",")]);
    command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
    command.args(["--listen-peer-urls", &own, "--initial-advertise-peer-urls", &own]);
    command.arg("--data-dir").arg(data).stdin(Stdio::null());
    command
}

/// What a torture does to the third machine does what its name says, for each kind. Needs no VM.
#[test]
fn the_third_machine_is_lost_and_found_again() {
    for arbiter in [Arbiter::File, Arbiter::Own, Arbiter::Etcd] {
        let Some(mut world) = World::without_vms() else { return };
        if arbiter == Arbiter::Etcd && !has_etcd() {
            println!("skipped: no etcd (apt-get install etcd-server)");
            return;
        }
        let mut third = Third::start(&mut world, arbiter);
        let mut asks = Asks { generations: 0, world };
        Side::BOTH.into_iter().for_each(|side| asks.wins(side));
        for first in 0..third.count().max(1) {
            third.lose(&asks.world, first);
            Side::BOTH.into_iter().for_each(|side| asks.is_not_told(side));
            third.back(&asks.world);
            Side::BOTH.into_iter().for_each(|side| asks.wins(side));
        }
        if !third.is_served() {
            continue;
        }
        for first in 0..third.count() {
            third.signal(Signal::SIGSTOP, first);
            asks.is_not_told(Side::A);
            third.signal(Signal::SIGCONT, first);
            asks.wins(Side::A);
        }
        for number in 0..4 {
            third.kill_one(&asks.world, number);
            asks.wins(Side::B);
        }
        for side in Side::BOTH {
            asks.world.see_third(side, false);
            asks.is_not_told(side);
            asks.wins(side.other());
            asks.world.see_third(side, true);
            asks.wins(side);
        }
        if third.is_cluster() {
            members_lose_one_another(&third, &mut asks);
        }
    }
}

fn members_lose_one_another(third: &Third, asks: &mut Asks) {
    let leader = |asks: &Asks, but: Option<usize>| {
        let mut found = None;
        wait_until("a member that leads", || {
            found = third.leader(&asks.world);
            found.is_some() && found != but
        });
        found.unwrap()
    };
    // The others choose another leader, and the hosts win whomever they ask first.
    let first = leader(asks, None);
    third.reaches_others(first, false);
    Side::BOTH.into_iter().for_each(|side| asks.wins(side));
    leader(asks, Some(first));
    third.reaches_others(first, true);
    Side::BOTH.into_iter().for_each(|side| asks.wins(side));
    // Each for itself: nobody has a majority, although the hosts reach them all.
    (0..2).for_each(|member| third.reaches_others(member, false));
    Side::BOTH.into_iter().for_each(|side| asks.is_not_told(side));
    (0..2).for_each(|member| third.reaches_others(member, true));
    Side::BOTH.into_iter().for_each(|side| asks.wins(side));
}

/// Two hosts that ask it.
struct Asks {
    world: World,
    generations: u64,
}

impl Asks {
    /// A host claims a generation with its own keys.
    fn claim(&self, side: Side, generation: u64) -> Result<(), String> {
        let asked = self.world.asked();
        let asked = asked.strip_prefix("etcd:").map_or_else(|| asked.clone(), |urls| its_own(urls, side));
        let place = arbiter::with_keys(&asked, Some(&self.world.keys(side)));
        self.world.on(side, || {
            let mut arbiter = arbiter::parse(&place).map_err(|error| error.to_string())?;
            match arbiter.claim(&arbiter::VmId([0x70; 16]), generation, "torture") {
                arbiter::Claim::Won => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
    }

    /// It wins the next one, in time.
    fn wins(&mut self, side: Side) {
        self.generations += 1;
        let deadline = Instant::now() + PATIENCE;
        while let Err(why) = self.claim(side, self.generations) {
            assert!(Instant::now() < deadline, "{side:?}, generation {}: {why}", self.generations);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// It gets no answer.
    fn is_not_told(&self, side: Side) {
        let told = self.claim(side, self.generations + 1);
        assert!(told.as_ref().is_err_and(|why| !why.starts_with("Lost")), "{side:?}: {told:?}");
    }
}

/// A process keeps its connections to a cluster, by the list of members, wherever they were made. So each host of this
/// test's process, unlike those of a torture, needs a list of its own.
fn its_own(urls: &str, side: Side) -> String {
    let mut urls: Vec<&str> = urls.split(',').collect();
    urls.rotate_left(1 + side as usize);
    format!("etcd:{}", urls.join(","))
}
