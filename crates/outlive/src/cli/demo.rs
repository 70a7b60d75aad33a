//! `outlive demo`.

use std::path::PathBuf;

use clap::ValueEnum;
use clap::builder::RangedU64ValueParser;

use super::active::Switch;
use super::epochs::EpochOptions;
use super::values::parse_size;
use crate::sandbox::Mode;

/// Kill a protected VM again and again while clients write to it, then count what was lost.
///
/// Everything happens on this machine: two "hosts" are two processes, a bridge in its own network namespace
/// joins them with the clients, and a kill is a SIGKILL. Needs /dev/kvm and /dev/net/tun, changes nothing on
/// the machine and leaves nothing behind.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct DemoOptions {
    /// How long the clients write, in seconds; the kills are spread over this time
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = RangedU64ValueParser::<u64>::new().range(1..=86_400))]
    pub seconds: u64,

    /// How often the VM's host is killed
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = RangedU64ValueParser::<u32>::new().range(0..=10_000))]
    pub kills: u32,

    /// Clients that write over one connection each, which must last to the end; one more client opens new
    /// connections all the time
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = RangedU64ValueParser::<u32>::new().range(1..=64))]
    pub clients: u32,

    /// Virtual CPUs of the VM
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = RangedU64ValueParser::<u32>::new().range(1..=8))]
    pub vcpus: u32,

    /// Memory of the VM
    #[arg(long, default_value = "256M", value_name = "SIZE", value_parser = size)]
    pub memory: String,

    /// Have the guest write to all of its memory first, so that both hosts have all of it in use (needs twice as
    /// much)
    #[arg(long)]
    pub fill_memory: bool,

    /// When a checkpoint is taken
    #[command(flatten)]
    pub epochs: EpochOptions,

    /// Whether frames that a takeover would lose are kept (off: clients wait until TCP sends them again)
    #[arg(long, default_value = "on", value_name = "on|off")]
    pub frame_tail: Switch,

    /// Who says which host goes on
    #[arg(long, default_value = "file", value_name = "KIND")]
    pub arbiter: DemoArbiter,

    /// Seed for the times of the kills [default: a random one, which is printed]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,

    /// Also write the result to this file, as one JSON object
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// Do without TLS between the hosts, to compare
    #[arg(long)]
    pub insecure: bool,

    /// Whether the hosts' processes are confined (docs/sandbox.md)
    #[arg(long, default_value = "on", value_name = "on|log|off")]
    pub sandbox: Mode,

    /// Run a Debian guest with Redis on two hosts emulated by QEMU instead, one of which loses its power.
    /// Needs no KVM, but root, QEMU (fetched if it is missing) and Outlive's sources; the first run takes
    /// about 5 minutes longer
    #[arg(long, conflicts_with_all = ["seconds", "kills", "clients", "vcpus", "memory", "fill_memory", "policy", "latency", "interval", "frame_tail", "arbiter", "seed", "json", "rate", "insecure", "sandbox"])]
    pub nested: bool,

    /// Requests per second of all clients together
    #[arg(long, default_value_t = 2_000, value_name = "N", hide = true, value_parser = RangedU64ValueParser::<u32>::new().range(1..=1_000_000))]
    pub rate: u32,
}

/// The arbiter of a demo. Like everything of it, it is on this machine and goes with the demo.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DemoArbiter {
    /// A directory
    File,
    /// A directory that outlive arbiter serve serves
    Own,
    /// An etcd cluster of three members (needs the program etcd)
    Etcd,
}

impl DemoArbiter {
    /// As an argument.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Own => "own",
            Self::Etcd => "etcd",
        }
    }
}

const EXAMPLES: &str = "\
Examples:
  outlive demo                                  three kills in twenty seconds
  outlive demo --kills 50 --seconds 300         a long row of takeovers
  outlive demo --memory 1G --vcpus 2 --json result.json
  outlive demo --memory 8G --fill-memory        what a kill costs when all of a large memory is in use
  outlive demo --nested                         a Debian guest on two emulated hosts, a power cut
  outlive demo --kills 10 --frame-tail off      what clients wait for without copies of their frames
  outlive demo --arbiter etcd                   an etcd cluster says who goes on; own: outlive arbiter serve
  outlive demo --insecure                       the same without TLS between the hosts, to compare
  outlive demo --sandbox off                    the same with processes that keep their rights, to compare
  outlive demo --seed 42                        kill at the same moments as another run with seed 42";

/// Sizes are passed on as they were written; the demo's processes parse them as the commands do.
fn size(text: &str) -> Result<String, String> {
    parse_size(text).map(|_| text.to_owned())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        options: DemoOptions,
    }

    #[test]
    fn defaults_are_the_documented_ones() {
        let options = Program::try_parse_from(["demo"]).unwrap().options;
        assert_eq!((options.seconds, options.kills, options.clients, options.vcpus), (20, 3, 4, 1));
        assert_eq!(options.memory, "256M");
        assert!(options.seed.is_none() && options.json.is_none());
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            ["--seconds", "0"],
            ["--clients", "0"],
            ["--vcpus", "9"],
            ["--memory", "much"],
            ["--interval", "1"],
            ["--colour", "red"],
        ] {
            let args = ["demo"].into_iter().chain(bad);
            assert!(Program::try_parse_from(args).is_err(), "{bad:?}");
        }
    }
}
