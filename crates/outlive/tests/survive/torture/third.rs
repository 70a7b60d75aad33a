//! The third machine, which says who has the VM: a directory that both hosts see, the arbiter that Outlive serves, or an
//! etcd cluster of three. Both hosts reach it by a network of its own, so that it can be lost without anything else.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use outlive::arbiter;

use super::disk::Place;
use crate::support::{PATIENCE, PROGRAM, Pace, Side, World};

/// What it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arbiter {
    File,
    Own,
    Etcd,
}

impl Arbiter {
    /// As the environment wants it.
    pub(super) fn wanted() -> Self {
        match std::env::var("OUTLIVE_TORTURE_ARBITER").as_deref() {
            Err(_) | Ok("file") => Self::File,
            Ok("own") => Self::Own,
            Ok("etcd") => Self::Etcd,
            Ok(other) => panic!("OUTLIVE_TORTURE_ARBITER is file, own or etcd, not {other}"),
        }
    }
}

/// Where it is on its network. Members of a cluster have the next addresses.
fn address(member: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 66, 0, member as u8 + 1)
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
}

impl Third {
    /// Makes it, for the hosts that start from now on.
    pub(super) fn start(world: &mut World, arbiter: Arbiter) -> Self {
        let place = Place::of_arbiter(world);
        let mut third = Self { arbiter, place, servers: Vec::new() };
        if arbiter == Arbiter::File {
            return third;
        }
        world.join_third(MEMBERS);
        third.servers = (0..third.count()).map(|number| third.serve(world, number)).collect();
        let text = match arbiter {
            Arbiter::Etcd => {
                let urls: Vec<String> =
                    (0..MEMBERS).map(|it| format!("http://{}:2379", address(it))).collect();
                format!("etcd:{}", urls.join(","))
            }
            _ => format!("outlive:{}:{PORT}", address(0)),
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
                command.args(["arbiter", "serve", "--listen", &format!("{}:{PORT}", address(0))]);
                command.arg("--directory").arg(world.arbiter()).arg("--keys").arg(world.arbiter_keys());
                command.arg("--exit-with-stdin").stdin(Stdio::piped());
                command
            }
        };
        world.spawn_third(command.stdout(Stdio::null()).stderr(log))
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
            _ => world.lan(|| TcpStream::connect((address(0), PORT))).is_ok(),
        };
        while !answers() {
            assert!(Instant::now() < deadline, "{text} does not answer");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// SIGKILL of so many that nobody can say who has the VM, or the directory is gone; [`Third::back`] undoes it.
    pub(super) fn lose(&mut self, world: &World) {
        let most = self.most();
        match self.arbiter {
            Arbiter::File => fs::rename(world.arbiter(), away(world)).unwrap(),
            _ => self.servers.iter_mut().take(most).for_each(end),
        }
    }

    pub(super) fn back(&mut self, world: &World) {
        if self.arbiter == Arbiter::File {
            return fs::rename(away(world), world.arbiter()).unwrap();
        }
        for number in 0..self.most() {
            self.servers[number] = self.serve(world, number);
        }
    }

    /// SIGKILL of one server, and its next start at once.
    pub(super) fn kill_one(&mut self, world: &World, number: usize) {
        let number = number % self.count();
        end(&mut self.servers[number]);
        self.servers[number] = self.serve(world, number);
    }

    /// SIGSTOP or SIGCONT of so many that nobody can say who has the VM.
    pub(super) fn signal(&self, signal: Signal) {
        for server in self.servers.iter().take(self.most()) {
            kill(Pid::from_raw(server.id() as i32), signal).unwrap();
        }
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

fn member(number: usize, data: PathBuf) -> Command {
    let all: Vec<String> = (0..MEMBERS).map(|it| format!("m{it}=http://{}:2380", address(it))).collect();
    let (client, peer) =
        (format!("http://{}:2379", address(number)), format!("http://{}:2380", address(number)));
    let mut command = Command::new("etcd");
    command.args(["--name", &format!("m{number}"), "--initial-cluster", &all.join(",")]);
    command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
    command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
    command.arg("--data-dir").arg(data).stdin(Stdio::null());
    command
}

/// What a torture does to the third machine does what its name says, for each kind. Needs no VM.
#[test]
fn the_third_machine_is_lost_and_found_again() {
    for arbiter in [Arbiter::File, Arbiter::Own, Arbiter::Etcd] {
        let Some(mut world) = World::without_vms() else { return };
        if arbiter == Arbiter::Etcd
            && !Command::new("etcd").arg("--version").output().is_ok_and(|it| it.status.success())
        {
            println!("skipped: no etcd (apt-get install etcd-server)");
            return;
        }
        let mut third = Third::start(&mut world, arbiter);
        let mut asks = Asks { generations: 0, world };
        Side::BOTH.into_iter().for_each(|side| asks.wins(side));
        third.lose(&asks.world);
        Side::BOTH.into_iter().for_each(|side| asks.is_not_told(side));
        third.back(&asks.world);
        Side::BOTH.into_iter().for_each(|side| asks.wins(side));
        if !third.is_served() {
            continue;
        }
        third.signal(Signal::SIGSTOP);
        asks.is_not_told(Side::A);
        third.signal(Signal::SIGCONT);
        asks.wins(Side::A);
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
    }
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
