//! `outlive arbiter`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::values::{parse_age, parse_listen};

/// `outlive arbiter`.
#[derive(Clone, Debug, Args)]
#[command(after_help = ARBITER_EXAMPLES)]
pub struct ArbiterOptions {
    /// What to do.
    #[command(subcommand)]
    pub command: ArbiterCommand,
}

/// The commands of `outlive arbiter`.
#[derive(Clone, Debug, Subcommand)]
pub enum ArbiterCommand {
    /// Make an empty directory, or a prefix without keys in an etcd cluster, an arbiter: once, on one host, with
    /// the shared file system mounted
    Init {
        /// The arbiter, as in --arbiter
        #[arg(value_name = "ARBITER")]
        place: String,
    },
    /// List the VMs that an arbiter knows: who won the newest generation of each, and how long ago
    List {
        /// The arbiter, as in --arbiter
        #[arg(value_name = "ARBITER")]
        place: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show all that an arbiter knows of one VM
    Show {
        /// The arbiter, as in --arbiter
        #[arg(value_name = "ARBITER")]
        place: String,
        /// The VM's id, or its first characters, at least four
        #[arg(value_name = "VM")]
        vm: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Let a VM go that runs nowhere any more: its next generation is won, so no host goes on with it, and its end
    /// is noted. To start it again, outlive run then needs --accept-stale-image
    Release {
        /// The arbiter, as in --arbiter
        #[arg(value_name = "ARBITER")]
        place: String,
        /// The VM's id, or its first characters, at least four
        #[arg(value_name = "VM")]
        vm: String,
        /// Do it: without this option only say what would be done
        #[arg(long)]
        yes: bool,
    },
    /// Serve the arbiter in a directory of this machine, a third one, to hosts that have --arbiter outlive:HOST:PORT
    Serve {
        /// Address to listen on, or a name of this machine
        #[arg(long, value_name = "ADDR:PORT", value_parser = parse_listen)]
        listen: String,
        /// The directory that outlive arbiter init file:DIR has made an arbiter. Its disk must keep what it has
        /// confirmed
        #[arg(long, value_name = "DIR")]
        directory: PathBuf,
        /// Directory with this machine's keys, of the CA that the hosts' keys are of. Its certificate must allow it to
        /// be an arbiter: outlive keys issue --arbiter [default: /etc/outlive/keys]
        #[arg(long, value_name = "DIR")]
        keys: Option<PathBuf>,
        /// Do without keys: whoever reaches the address can win every generation of every VM. Only for addresses of
        /// this machine, for tests; hosts then have ?insecure behind the port
        #[arg(long, conflicts_with = "keys")]
        insecure: bool,
        /// End when standard input is closed (for programs that start Outlive and may be killed themselves)
        #[arg(long, hide = true)]
        exit_with_stdin: bool,
    },
    /// Remove claims that were superseded long ago, and keep the newest of each VM
    Prune {
        /// The arbiter, as in --arbiter
        #[arg(value_name = "ARBITER")]
        place: String,
        /// Also forget VMs that ended in order at least this long ago, for example 30days. The arbiter then
        /// no longer knows their images, and they start only with --accept-lost-claims.
        /// Where the arbiter is served, say it on its machine, with file:DIR: no host may
        #[arg(long, value_name = "AGE", value_parser = parse_age)]
        forget_ended: Option<Duration>,
        /// Only say what would be removed
        #[arg(long)]
        dry_run: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

const ARBITER_EXAMPLES: &str = "\
Examples:
  outlive arbiter init file:/srv/arbiter                  once, on one host; then check that the other host sees the same:
  outlive arbiter list file:/srv/arbiter                  its first line has the arbiter's id
  outlive arbiter show file:/srv/arbiter 3f2a             the generations of one VM, with their owners
  outlive arbiter prune file:/srv/arbiter --dry-run --forget-ended 90days
  outlive arbiter release file:/srv/arbiter 3f2a --yes    a VM whose hosts are gone: nobody goes on with it

  outlive arbiter init 'etcd:https://10.0.0.1:2379,https://10.0.0.2:2379?ca=/etc/outlive/etcd/ca.pem'
                                                          the same in an etcd cluster

  mkdir -p /var/lib/outlive-arbiter; outlive arbiter init file:/var/lib/outlive-arbiter
                                                          on a small third machine; its keys, where the CA is:
  outlive keys issue --host third --arbiter               copy them there, then as a service (systemd/):
  outlive arbiter serve --directory /var/lib/outlive-arbiter --listen 0.0.0.0:7010
                                                          hosts have --arbiter outlive:third:7010
  outlive arbiter list outlive:third:7010                 with the keys in /etc/outlive/keys; others:
  outlive arbiter list 'outlive:third:7010?keys=/root/keys'";
