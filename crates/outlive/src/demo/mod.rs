//! `outlive demo`: the main job on one machine, from nothing to a verdict.
//!
//! Two processes of this same program play the two hosts. They live in the demo's own network namespace,
//! where a bridge joins the VM with the clients. The host that runs the VM is killed with SIGKILL several
//! times; each time the other one takes over and a new process takes the dead one's place. Meanwhile clients
//! write over TCP, and at the end everything that was acknowledged is read back.
//!
//! * `director`: the course of the demo, `cluster`: the processes, `events`: what they report;
//! * `arbiter`: who says which host goes on;
//! * `fill`: the guest writes to all of its memory first, where that is asked for;
//! * `load`: the clients (`client`, `ledger`, `gaps`), `verify`: the judge;
//! * `status` and `summary`: what a person sees;
//! * `nested`: a Linux guest and emulated hosts instead.

mod arbiter;
mod client;
mod cluster;
mod director;
mod events;
#[cfg(test)]
mod fake;
mod fill;
mod gaps;
mod ledger;
mod load;
mod nested;
mod status;
mod summary;
#[cfg(test)]
mod tests;
mod verify;

use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal::{SIGHUP, SIGINT, SIGTERM};
use outlive_machine::{Host, HostError};
use thiserror::Error;

use self::arbiter::Arbiter;
use self::cluster::{Cluster, Shape, WorkDir};
use self::director::{Director, Play, Stop};
use self::summary::Summary;
use crate::cli::{DemoOptions, parse_size};
use crate::link::LinkKind;
use crate::network::{EnterError, Netlink, NetlinkError, enter_own_namespace};
use crate::process::Signals;
use crate::{check, exit, logs};

const TUN: &str = "/dev/net/tun";
/// How many kills a second may be asked for. A small VM is protected again half a second after a kill.
const PER_SECOND: u64 = 2;
const BRIDGE: &str = "br0";
/// The clients' address on the bridge, the VM's address, and the length of their common prefix.
const CLIENTS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const VM: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const PREFIX: u8 = 24;
/// Where the payload serves the Redis protocol.
const PORT: u16 = 6379;

/// Why the demo did not run, or not to its end. Each message says in one line what to do about it.
#[derive(Debug, Error)]
pub enum DemoError {
    /// KVM is missing or may not be used.
    #[error(transparent)]
    Kvm(#[from] HostError),
    /// KVM does not exist here; emulated hosts have it.
    #[error("{0}; or see it on two hosts that QEMU emulates: outlive demo --nested")]
    NoKvm(#[source] HostError),
    /// The program was moved away from where it was built.
    #[error(
        "emulated hosts are made from Outlive's sources, which are no longer in {0}: in a checkout run \
         `cargo xtask nested demo`"
    )]
    NoSources(PathBuf),
    /// The build tool is missing.
    #[error("cannot run cargo: {0}; emulated hosts need Rust, see https://rustup.rs")]
    NoCargo(#[source] io::Error),
    /// The device that makes taps is missing or may not be used.
    #[error("cannot open {TUN}: {0}; load the module (modprobe tun), run as root, or chmod 666 {TUN}")]
    Tun(#[source] io::Error),
    /// The VM would not fit.
    #[error(
        "the VM's {memory}{times} are more than the {available_mib} MiB that this machine has free; give the VM \
         less with --memory"
    )]
    Memory {
        /// The size as it was given.
        memory: String,
        /// How often it is needed, in words.
        times: &'static str,
        /// Free memory of this machine.
        available_mib: u64,
    },
    /// A kill needs a protected VM, and protection takes a moment to come back.
    #[error(
        "{kills} kills in {seconds} s are too many: between two kills a new host must get all of the VM, so give \
         at most {PER_SECOND} a second (more --seconds or fewer --kills)"
    )]
    TooOften {
        /// As they were asked for.
        kills: u32,
        /// The time for them.
        seconds: u64,
    },
    /// The program is not installed.
    #[error("--arbiter etcd needs the program etcd: apt-get install etcd-server; or choose --arbiter own")]
    NoEtcd,
    /// Something else is installed, or it does not start.
    #[error("the demo's arbiter does not start: {0}; choose --arbiter file")]
    Arbiter(String),
    /// The network namespace could not be made.
    #[error(transparent)]
    Namespace(#[from] EnterError),
    /// The bridge could not be made.
    #[error(transparent)]
    Network(#[from] NetlinkError),
    /// A process of the demo refused to start in this environment; the text is its message.
    #[error("{0}")]
    Refused(String),
    /// The file for the JSON result cannot be written.
    #[error("cannot write {path}: {source}; choose another place with --json")]
    Json {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Something that the demo itself needs failed while it ran.
    #[error("the demo failed: {0}")]
    Io(#[from] io::Error),
}

impl DemoError {
    /// The exit code: 2 for an environment that does not allow the demo, 1 for a failure on the way.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Io(_) => exit::FAILED,
            _ => exit::USAGE,
        }
    }
}

/// The command: [`run`], with an error printed in one line. Returns the exit code.
pub fn command(options: &DemoOptions) -> u8 {
    run(options).unwrap_or_else(|error| {
        logs::say(&format!("outlive: {error}"));
        error.exit_code()
    })
}

/// Runs the demo and prints the summary to standard output; returns the exit code (0, 1 or 130).
///
/// Call it before any thread is started: it enters a network namespace of its own.
///
/// # Errors
///
/// The machine or the options do not allow it. Nothing is left behind then.
pub fn run(options: &DemoOptions) -> Result<u8, DemoError> {
    if options.nested {
        return Err(nested::become_it());
    }
    check_kills(options)?;
    check_machine(options)?;
    check_json(options)?;
    Arbiter::check(options.arbiter)?;
    // Before any thread is there; it is read by one, which must not be there before the namespace.
    let signals = Signals::take(&[SIGINT, SIGTERM, SIGHUP])?;
    enter_own_namespace()?;
    build_network()?;
    let interrupt = watch(signals)?;
    let seed = options.seed.unwrap_or_else(|| RandomState::new().hash_one("seed") % 1_000_000);
    let plural = if options.kills == 1 { "" } else { "s" };
    logs::say(&format!("outlive demo: {} kill{plural} in {} s, seed {seed}", options.kills, options.seconds));
    let (shape, dir) = (shape(options, seed)?, WorkDir::create()?);
    let arbiter = Arbiter::start(options.arbiter, &shape.program, &dir, shape.link)?;
    let cluster = Cluster::new(shape, arbiter, dir);
    let (summary, cluster) = match Director::new(play(options, seed), cluster, interrupt).run() {
        Ok(end) => end,
        Err(Stop::Environment(words)) => return Err(DemoError::Refused(words)),
        Err(Stop::Io(error)) => return Err(error.into()),
        Err(other) => return Err(io::Error::other(other).into()),
    };
    finish(options, &summary, cluster)
}

/// Ends everything, then says how it went.
fn finish(options: &DemoOptions, summary: &Summary, cluster: Cluster) -> Result<u8, DemoError> {
    let kept = if summary.ok() {
        drop(cluster);
        None
    } else {
        Some(cluster.end_and_keep())
    };
    let mut text = format!("{summary}\n");
    if let Some(kept) = kept {
        text += &format!("  Logs and event streams of all processes were kept in {}\n", kept.display());
    }
    // A reader that left early (a pipe into head) does not change the result.
    let _ = io::stdout().write_all(text.as_bytes());
    if let Some(path) = &options.json {
        fs::write(path, summary.to_json() + "\n")
            .map_err(|source| DemoError::Json { path: path.clone(), source })?;
    }
    Ok(summary.exit_code())
}

/// Options that both commands have.
fn shared_options(options: &DemoOptions) -> Vec<String> {
    let tail = ["--frame-tail", options.frame_tail.name()].map(str::to_owned);
    let sandbox = ["--sandbox", options.sandbox.name()].map(str::to_owned);
    options.epochs.to_args().into_iter().chain(tail).chain(sandbox).collect()
}

fn shape(options: &DemoOptions, seed: u64) -> io::Result<Shape> {
    Ok(Shape {
        program: std::env::current_exe()?,
        bridge: BRIDGE.into(),
        vm_ip: format!("{VM}/{PREFIX}"),
        vcpus: options.vcpus,
        memory: options.memory.clone(),
        link: if options.insecure { LinkKind::Plain } else { LinkKind::Tls13 },
        options: shared_options(options),
        seed,
    })
}

fn play(options: &DemoOptions, seed: u64) -> Play {
    Play {
        vm: SocketAddr::from((VM, PORT)),
        time: Duration::from_secs(options.seconds),
        kills: options.kills,
        clients: options.clients,
        rate: options.rate,
        fills: options.fill_memory,
        seed,
    }
}

/// Refuses kills that cannot be spread over the time.
fn check_kills(options: &DemoOptions) -> Result<(), DemoError> {
    let DemoOptions { kills, seconds, .. } = *options;
    if u64::from(kills) > seconds * PER_SECOND { Err(DemoError::TooOften { kills, seconds }) } else { Ok(()) }
}

/// Reports what is missing before anything is made; the processes would find out only later.
fn check_machine(options: &DemoOptions) -> Result<(), DemoError> {
    Host::open().map_err(|error| match error {
        HostError::Missing => DemoError::NoKvm(error),
        other => other.into(),
    })?;
    File::options().read(true).write(true).open(TUN).map_err(DemoError::Tun)?;
    let memory = parse_size(&options.memory).unwrap_or(u64::MAX);
    // The usual guest touches little of its memory.
    let (hosts, times) = if options.fill_memory { (2, " on each of two hosts") } else { (1, "") };
    match check::available_memory_bytes() {
        Some(available) if memory.saturating_mul(hosts) > available => {
            Err(DemoError::Memory { memory: options.memory.clone(), times, available_mib: available >> 20 })
        }
        _ => Ok(()),
    }
}

/// Finds out before the run, not after it, whether the result can be written.
fn check_json(options: &DemoOptions) -> Result<(), DemoError> {
    let Some(path) = &options.json else { return Ok(()) };
    let error = |source| DemoError::Json { path: path.clone(), source };
    if path.exists() {
        File::options().append(true).open(path).map(drop).map_err(error)
    } else {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let metadata = fs::metadata(folder).map_err(error)?;
        if metadata.is_dir() { Ok(()) } else { Err(error(io::ErrorKind::NotADirectory.into())) }
    }
}

/// Signals that end the demo in order.
fn watch(signals: Signals) -> io::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    signals.each("signals", move |_| set.store(true, Ordering::Relaxed))?;
    Ok(flag)
}

fn build_network() -> Result<(), NetlinkError> {
    let mut netlink = Netlink::open()?;
    netlink.create_bridge(BRIDGE)?;
    netlink.add_address(BRIDGE, CLIENTS, PREFIX)?;
    netlink.set_up(BRIDGE)
}
