//! `cargo xtask nested prove`: tests Outlive's promises with stock Debian guests on hosts whose power is cut.

mod checks;
mod clocks;
mod debian;
mod files;
mod kernels;
mod own_kernel;
mod postgres;
mod reboot;
mod redis;
mod restores;
mod stage;

use std::io;
use std::time::Instant;

use crate::nested::background::BackgroundError;
use crate::nested::cluster::ClusterError;
use crate::run::{StepError, Workspace, step};
use crate::summary::Summary;

pub(crate) const EXAMPLES: &str = "\
Examples:
  cargo xtask nested prove              all of them
  cargo xtask nested prove redis        one
  cargo xtask nested prove --list";

/// A claim, and how it is tested.
struct Proof {
    name: &'static str,
    what: &'static str,
    run: fn(&Context<'_>) -> Result<(), ProofError>,
}

/// All of them.
const PROOFS: [Proof; 10] = [
    Proof {
        name: "guests",
        what: "Debian's kernels come up with 1 and 2 vCPUs, see their devices, restart and switch off",
        run: kernels::prove_guests,
    },
    Proof {
        name: "hosts",
        what: "on each Debian release as the hosts, a guest goes on after a power cut",
        run: kernels::prove_hosts,
    },
    Proof {
        name: "debian",
        what: "Debian with its own initrd, systemd and all services goes on after a power cut",
        run: debian::prove,
    },
    Proof {
        name: "reboot",
        what: "systemd's reboot of Debian with disk and card works, alone, protected and after a takeover",
        run: reboot::prove,
    },
    Proof {
        name: "own-kernel",
        what: "Debian boots the kernel that it has in /boot, and after an upgrade the new one, also after a takeover",
        run: own_kernel::prove,
    },
    Proof {
        name: "redis",
        what: "connections to Redis go on after a power cut, and no acknowledged write is lost",
        run: redis::prove,
    },
    Proof {
        name: "postgres",
        what: "PostgreSQL does not notice two power cuts, no acknowledged transaction is lost, no clock goes back",
        run: postgres::prove,
    },
    Proof {
        name: "files",
        what: "files are there after two power cuts, and fsck finds the committed images clean",
        run: files::prove,
    },
    Proof {
        name: "restores",
        what: "a guest that is taken over at random moments of its boot comes up",
        run: restores::prove,
    },
    Proof {
        name: "checks",
        what: "memory and disks of both hosts are the same over a boot and a load",
        run: checks::prove,
    },
];

/// The options of a proof.
struct Context<'a> {
    workspace: &'a Workspace,
    fetch: bool,
    /// Takeovers of the proof `restores`.
    restores: u32,
}

#[derive(clap::Args, Debug)]
pub(crate) struct ProofOptions {
    /// Only proofs whose name contains one of these
    name: Vec<String>,
    /// List the proofs
    #[arg(long)]
    list: bool,
    /// Takeovers of the proof `restores`
    #[arg(long, value_name = "NUMBER", default_value_t = MANY, value_parser = clap::value_parser!(u32).range(1..))]
    restores: u32,
    /// Use only what has been fetched and built before
    #[arg(long)]
    no_fetch: bool,
}

/// Why a proof failed.
#[derive(Debug, thiserror::Error)]
enum ProofError {
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Background(#[from] BackgroundError),
    /// The guest's agent cannot be reached.
    #[error("the guest does not answer to '{line}': {source}")]
    Agent { line: String, source: io::Error },
    /// A command in the guest failed.
    #[error("in the guest '{line}' ended with {status}:\n{output}")]
    InGuest { line: String, status: String, output: String },
    /// A client of the guest could not continue.
    #[error("{what}: {source}")]
    Client { what: String, source: io::Error },
    /// The claim is false.
    #[error("{0}")]
    Wrong(String),
}

impl ProofError {
    /// Whether this machine lacks something: a program, a right, or the way to Debian's packages.
    fn is_missing(&self) -> bool {
        matches!(self, ProofError::Cluster(error) if error.is_missing() || error.is_about_packages())
    }
}

/// Fails with a text unless the condition holds.
fn ensure(is_so: bool, otherwise: impl FnOnce() -> String) -> Result<(), ProofError> {
    if is_so { Ok(()) } else { Err(ProofError::Wrong(otherwise())) }
}

/// `cargo xtask nested prove`.
pub(crate) fn run(workspace: &Workspace, options: &ProofOptions) -> Result<(), StepError> {
    let wanted = |proof: &&Proof| {
        options.name.is_empty() || options.name.iter().any(|name| proof.name.contains(name.as_str()))
    };
    let proofs: Vec<&Proof> = PROOFS.iter().filter(wanted).collect();
    if options.list || proofs.is_empty() {
        PROOFS.iter().for_each(|proof| println!("{:12}{}", proof.name, proof.what));
        let unknown = || StepError::Unusable(format!("no proof is named {}", options.name.join(" or ")));
        return if options.list { Ok(()) } else { Err(unknown()) };
    }
    step(&mut workspace.cargo(["build", "--release", "--package", "outlive"]))?;
    let mut summary = Summary::default();
    let context = Context { workspace, fetch: !options.no_fetch, restores: options.restores };
    prove(&context, proofs.into_iter(), &mut summary);
    println!("\n{summary}");
    if summary.is_good() { Ok(()) } else { Err(StepError::TestsFailed) }
}

/// Proofs that every test run has time for, and the number of takeovers of the proof `restores` there.
const QUICK: [&str; 2] = ["redis", "restores"];
const FEW: u32 = 4;
const MANY: u32 = 50;

/// The part that `cargo xtask test` runs.
pub(crate) fn in_tests(
    workspace: &Workspace,
    fetch: bool,
    all: bool,
    summary: &mut Summary,
) -> Result<(), StepError> {
    // The build of the tests has just made the program.
    let context = Context { workspace, fetch, restores: if all { MANY } else { FEW } };
    prove(&context, PROOFS.iter().filter(|proof| all || QUICK.contains(&proof.name)), summary);
    Ok(())
}

/// `cargo xtask nested demo`.
pub(crate) fn demo(workspace: &Workspace) -> Result<(), StepError> {
    println!(
        "Two hosts with Debian's kernel, emulated by QEMU, and on one of them Debian 12 with Redis, protected by the other.\n\
         Clients write to Redis all the time; the first host's power is cut. Emulation is slow: this takes some minutes, the\n\
         first time 5 more for fetching kernels and building the guest's disk. To play with such hosts: cargo xtask nested shell"
    );
    let options = ProofOptions { name: vec!["redis".into()], list: false, restores: 1, no_fetch: false };
    run(workspace, &options)
}

fn prove<'a>(context: &Context<'_>, proofs: impl Iterator<Item = &'a Proof>, summary: &mut Summary) {
    for proof in proofs {
        summary.start_program("nested");
        println!("\nproof {}: {}", proof.name, proof.what);
        let start = Instant::now();
        match (proof.run)(context) {
            Ok(()) => {
                println!("proof {}: holds, after {} s", proof.name, start.elapsed().as_secs());
                summary.line("test result: ok. 1 passed; 0 failed");
            }
            Err(error) if error.is_missing() => {
                println!("skipped: {error}");
                summary.line(&format!("skipped: {error}"));
            }
            Err(error) => {
                println!("proof {}: FAILED after {} s: {error}", proof.name, start.elapsed().as_secs());
                summary.ended_badly(&format!("nested: {}", proof.name));
            }
        }
    }
}
