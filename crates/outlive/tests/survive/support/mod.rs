//! Two hosts, a client network and the faults that a test causes.
//!
//! ```text
//!            lan: br0 10.77.0.1/24 (clients)
//!           to-a │               │ to-b
//!             up │               │ up
//!   host a: br0 ─┘               └─ br0 :host b
//!           vm0 (tap)         (tap) vm0
//!           link 10.99.0.1 ─────────── link 10.99.0.2
//! ```
//!
//! Each of the three is a network namespace without a name, made on a thread. Hosts are processes of the
//! program under test that end with their standard input, so nothing outlives a test, however it ends. Waits
//! are generous: these tests check what happens, not how fast.

mod client;
#[path = "../../common/namespace.rs"]
mod namespace;
mod nodes;
mod pipes;
mod process;
mod prometheus;
mod proxy;
mod slow;
mod small;
mod start;
#[path = "../../common/stop.rs"]
pub(crate) mod stop;
#[path = "../../common/tls.rs"]
mod tls;
mod tracer;
mod witness;
mod writer;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use outlive::arbiter::FileArbiter;
use outlive::keys::{self, Grant, Order};
use outlive::network::{Namespace, Netlink};

pub(crate) use namespace::namespace;

pub(crate) use client::{Client, Value};
pub(crate) use nodes::{Nodes, pid};
pub(crate) use pipes::fill;
pub(crate) use process::Process;
pub(crate) use prometheus::{Prometheus, instance, monitoring, watch_pair};
pub(crate) use proxy::{Proxy, Way};
pub(crate) use slow::{Pace, Slow};
pub(crate) use small::Small;
pub(crate) use start::{Log, Readers};
pub(crate) use tls::tls;
pub(crate) use tracer::{Held, flip_program_bit, take_all_memory, take_program_memory};
pub(crate) use witness::{MemoryLoad, Witnesses};
pub(crate) use writer::{
    Habits, WRITTEN, crashing as crashing_kernel, kernel as writer_kernel, kernel_with as writer_with,
};

/// How long anything may take before a test gives up; far longer than on a host that is not overloaded.
pub(crate) const PATIENCE: Duration = Duration::from_secs(150);
/// The program under test.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_outlive");
/// Where a standby listens.
pub(crate) const PORT: u16 = 7000;

/// How long keys count.
const KEYS_LIFE: Duration = Duration::from_secs(90 * 24 * 3600);

/// Memory of a VM whose size is not given, in bytes.
pub(crate) const MEMORY: u64 = 64 << 20;

const VM: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const REDIS: u16 = 6379;

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    A,
    B,
}

impl Side {
    pub(crate) const BOTH: [Side; 2] = [Side::A, Side::B];

    /// The other one.
    pub(crate) fn other(self) -> Side {
        match self {
            Side::A => Side::B,
            Side::B => Side::A,
        }
    }

    pub(crate) fn letter(self) -> char {
        match self {
            Side::A => 'a',
            Side::B => 'b',
        }
    }

    /// Its address on the link between the hosts.
    pub(crate) fn link_ip(self) -> Ipv4Addr {
        match self {
            Side::A => Ipv4Addr::new(10, 99, 0, 1),
            Side::B => Ipv4Addr::new(10, 99, 0, 2),
        }
    }

    /// Where its standby listens.
    pub(crate) fn addr(self) -> SocketAddr {
        SocketAddr::from((self.link_ip(), PORT))
    }
}

/// The two hosts and the clients' network; see the module.
pub(crate) struct World {
    lan: Namespace,
    hosts: [Namespace; 2],
    /// What each host has installed.
    programs: [PathBuf; 2],
    started: AtomicU32,
    arbiter: PathBuf,
    /// What processes are given as --arbiter, if it is not that directory.
    asked: Option<String>,
    /// Its links are neither encrypted nor authenticated.
    is_plain: bool,
    dir: tempfile::TempDir,
    /// The keys of all hosts, and the CA: hosts have their sockets and images in `dir`, and so `dir` as a whole.
    safe: tempfile::TempDir,
}

impl World {
    /// `None`, after saying why, where no VM can run.
    pub(crate) fn new() -> Option<World> {
        if has_kvm() { World::without_vms() } else { None }
    }

    /// The same for a test that runs no VM. `None`, after saying why, without root.
    pub(crate) fn without_vms() -> Option<World> {
        let lan = namespace()?;
        let hosts = [namespace()?, namespace()?];
        let dir = tempfile::Builder::new().prefix("outlive-survive-").tempdir().unwrap();
        let arbiter = dir.path().join("arbiter");
        let mut world = World {
            lan,
            hosts,
            programs: [PROGRAM.into(), PROGRAM.into()],
            started: AtomicU32::new(0),
            arbiter: arbiter.clone(),
            asked: None,
            is_plain: false,
            dir,
            safe: tempfile::Builder::new().prefix("outlive-keys-").tempdir().unwrap(),
        };
        world.place_arbiter(arbiter);
        world.make_keys();
        world.cable();
        Some(world)
    }

    /// The same for a test that speaks the protocol itself: the links have no TLS.
    pub(crate) fn plain() -> Option<World> {
        World::new().map(|world| World { is_plain: true, ..world })
    }

    fn make_keys(&self) {
        let order = |host: &str| Order { host: host.into(), grant: Grant::ALL, life: KEYS_LIFE };
        keys::init(&self.keys(Side::A), &order("hosta")).unwrap();
        keys::issue(&self.keys(Side::A), &order("hostb"), &self.keys(Side::B)).unwrap();
        let third = Order { grant: Grant::ARBITER, ..order("third") };
        keys::issue(&self.keys(Side::A), &third, &self.arbiter_keys()).unwrap();
    }

    /// The keys of a third machine that serves an arbiter.
    pub(crate) fn arbiter_keys(&self) -> PathBuf {
        self.safe.path().join("keys-third")
    }

    /// Gives both hosts an interface, `end`, to a network with a third machine, which has so many addresses there:
    /// 10.66.0.1 and those after it.
    pub(crate) fn join_third(&self, addresses: usize) {
        self.lan(|| {
            let mut netlink = Netlink::open().unwrap();
            netlink.create_bridge("third").unwrap();
            for last in 1..=addresses {
                netlink.add_address("third", Ipv4Addr::new(10, 66, 0, last as u8), 24).unwrap();
            }
            for side in Side::BOTH {
                let port = format!("third-{}", side.letter());
                netlink.create_veth(&port, "end").unwrap();
                netlink.move_to_namespace("end", self.host(side).as_fd()).unwrap();
                netlink.attach(&port, "third").unwrap();
                netlink.set_up(&port).unwrap();
            }
            netlink.set_up("third").unwrap();
        });
        for (side, last) in [(Side::A, 101), (Side::B, 102)] {
            self.on(side, || {
                let mut netlink = Netlink::open().unwrap();
                netlink.add_address("end", Ipv4Addr::new(10, 66, 0, last), 24).unwrap();
                netlink.set_up("end").unwrap();
            });
        }
    }

    /// Cuts a host off from the third machine, or joins it again.
    pub(crate) fn see_third(&self, side: Side, sees: bool) {
        self.on(side, || {
            let mut netlink = Netlink::open().unwrap();
            if sees { netlink.set_up("end") } else { netlink.set_down("end") }.unwrap();
        });
    }

    /// What processes that start now have as --arbiter.
    pub(crate) fn asked(&self) -> String {
        self.asked.clone().unwrap_or_else(|| format!("file:{}", self.arbiter().display()))
    }

    /// Processes that start from now on have this --arbiter.
    pub(crate) fn ask_arbiter(&mut self, text: String) {
        self.asked = Some(text);
    }

    /// Whether all hosts are in the sandbox, as they usually are.
    pub(crate) fn is_confined() -> bool {
        std::env::var_os("OUTLIVE_TEST_SANDBOX").is_none_or(|it| it != "0")
    }

    /// The keys of a host.
    pub(crate) fn keys(&self, side: Side) -> PathBuf {
        self.safe.path().join(format!("keys-{}", side.letter()))
    }

    fn cable(&self) {
        self.lan(|| {
            let mut netlink = Netlink::open().unwrap();
            netlink.create_bridge("br0").unwrap();
            netlink.add_address("br0", Ipv4Addr::new(10, 77, 0, 1), 24).unwrap();
            for side in [Side::A, Side::B] {
                let port = format!("to-{}", side.letter());
                netlink.create_veth(&port, "up").unwrap();
                netlink.move_to_namespace("up", self.host(side).as_fd()).unwrap();
                netlink.attach(&port, "br0").unwrap();
                netlink.set_up(&port).unwrap();
            }
            netlink.set_up("br0").unwrap();
        });
        self.on(Side::A, || {
            let mut netlink = Netlink::open().unwrap();
            netlink.create_veth("link", "far").unwrap();
            netlink.move_to_namespace("far", self.host(Side::B).as_fd()).unwrap();
        });
        for side in [Side::A, Side::B] {
            let link = World::link(side);
            self.on(side, || {
                let mut netlink = Netlink::open().unwrap();
                netlink.create_bridge("br0").unwrap();
                netlink.attach("up", "br0").unwrap();
                netlink.set_up("up").unwrap();
                netlink.set_up("br0").unwrap();
                netlink.add_address(link, side.link_ip(), 24).unwrap();
                netlink.set_up(link).unwrap();
            });
        }
    }

    fn host(&self, side: Side) -> &Namespace {
        match side {
            Side::A => &self.hosts[0],
            Side::B => &self.hosts[1],
        }
    }

    /// Installs a program on a host: it is what starts there from now on. What runs there goes on.
    pub(crate) fn install(&mut self, side: Side, program: PathBuf) {
        self.programs[side as usize] = program;
    }

    /// The program that a host has installed.
    pub(crate) fn program(&self, side: Side) -> &Path {
        &self.programs[side as usize]
    }

    /// Runs something in the network of a host.
    pub(crate) fn on<R: Send>(&self, side: Side, work: impl FnOnce() -> R + Send) -> R {
        self.host(side).run(work).unwrap()
    }

    /// Runs something in the clients' network.
    pub(crate) fn lan<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.lan.run(work).unwrap()
    }

    /// Starts a program on a third machine, which is in the clients' network.
    pub(crate) fn spawn_third(&self, command: &mut Command) -> Child {
        self.lan.spawn(command).unwrap()
    }

    /// Starts any program on a host.
    pub(crate) fn spawn_on(&self, side: Side, command: &mut Command) -> Child {
        self.host(side).spawn(command).unwrap()
    }

    /// The folder of this world, which goes with it.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A host's image, where a test gives it one.
    pub(crate) fn image(&self, side: Side) -> PathBuf {
        self.dir().join(format!("{side:?}.img"))
    }

    /// The arbiter's directory.
    pub(crate) fn arbiter(&self) -> PathBuf {
        self.arbiter.clone()
    }

    /// Makes a new arbiter in another place, for processes that start from now on.
    pub(crate) fn place_arbiter(&mut self, place: PathBuf) {
        fs::create_dir(&place).unwrap();
        FileArbiter::init(&place).unwrap();
        self.arbiter = place;
    }

    /// The VM's Redis server.
    pub(crate) fn server(&self) -> SocketAddr {
        self.server_of(0)
    }

    /// The Redis server of the VM with this number, from 0.
    pub(crate) fn server_of(&self, number: usize) -> SocketAddr {
        let [a, b, c, last] = VM.octets();
        SocketAddr::from(([a, b, c, last + number as u8], REDIS))
    }

    /// Cuts the link between the hosts, by the interface of host a.
    pub(crate) fn cut_link(&self) {
        self.on(Side::A, || Netlink::open().unwrap().set_down("link").unwrap());
    }

    /// Mends the link.
    pub(crate) fn mend_link(&self) {
        self.on(Side::A, || Netlink::open().unwrap().set_up("link").unwrap());
    }

    /// Runs a program in the network of a host. Returns whether it succeeded.
    pub(crate) fn command(&self, side: Side, words: &[&str]) -> bool {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).stdout(Stdio::null()).stderr(Stdio::null());
        self.host(side).spawn(&mut command).is_ok_and(|mut child| child.wait().unwrap().success())
    }

    /// The interface of a host on the link.
    pub(crate) fn link(side: Side) -> &'static str {
        match side {
            Side::A => "link",
            Side::B => "far",
        }
    }

    /// Leaves the folder where it is.
    pub(crate) fn keep(&mut self) -> PathBuf {
        self.dir.disable_cleanup(true);
        self.dir().to_owned()
    }

    /// Undoes [`World::keep`].
    pub(crate) fn keep_no_more(&mut self) {
        self.dir.disable_cleanup(false);
    }

    /// Frames that the VM on a host has sent into the network so far. The port of the host's bridge counts
    /// them, and nothing else sends there: neither the tap, which goes with its process, nor a bridge without
    /// an address.
    pub(crate) fn frames_out(&self, side: Side) -> u64 {
        let table = self.on(side, || fs::read_to_string("/proc/thread-self/net/dev").unwrap());
        let line = table.lines().find_map(|l| l.trim().strip_prefix("up:")).expect("the port is there");
        // Eight columns about received data, then bytes and frames sent.
        line.split_whitespace().nth(9).unwrap().parse().unwrap()
    }

    /// Like [`World::frames_out`], once the number has not changed for a while.
    pub(crate) fn settled_frames_out(&self, side: Side) -> u64 {
        let deadline = Instant::now() + PATIENCE;
        let mut before = self.frames_out(side);
        loop {
            std::thread::sleep(Duration::from_millis(100));
            let now = self.frames_out(side);
            if now == before {
                return now;
            }
            assert!(Instant::now() < deadline, "host {side:?} does not stop sending");
            before = now;
        }
    }
}

/// Whether VMs can run here; prints a message if not.
pub(crate) fn has_kvm() -> bool {
    let there = fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        println!("skipped: no /dev/kvm");
    }
    there
}

/// Waits until a condition holds.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited {} s for: {what}", PATIENCE.as_secs());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Random choices that can be repeated.
pub(crate) struct Dice(fastrand::Rng);

impl Dice {
    /// Takes the seed from `OUTLIVE_SEED` or makes one, and prints it.
    pub(crate) fn new() -> Dice {
        let seed = std::env::var("OUTLIVE_SEED").ok().map(|s| s.parse().expect("OUTLIVE_SEED is a number"));
        let seed = seed.unwrap_or_else(|| {
            use std::hash::BuildHasher;
            std::hash::RandomState::new().hash_one("seed") % 1_000_000
        });
        println!("seed {seed}: OUTLIVE_SEED={seed} repeats these choices");
        Dice::of(seed)
    }

    /// Random choices from a known seed.
    pub(crate) fn of(seed: u64) -> Dice {
        Dice(fastrand::Rng::with_seed(seed))
    }

    /// The seed, until the first choice.
    pub(crate) fn seed(&self) -> u64 {
        self.0.get_seed()
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0.u64(0..end)
    }

    /// Sleeps for a time below `end`, to the microsecond.
    pub(crate) fn sleep_below(&mut self, end: Duration) {
        std::thread::sleep(Duration::from_micros(self.below(end.as_micros() as u64)));
    }
}
