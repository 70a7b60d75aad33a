//! `outlive hand-over`, `outlive take-over`, `outlive go-on-alone` and `outlive give-up`.

use std::path::PathBuf;

use clap::Args;
use clap::builder::RangedU64ValueParser;

/// An operator's word, for a VM with `--arbiter manual`.
#[derive(Clone, Debug, Args)]
#[command(after_help = WORD_HELP)]
pub struct WordOptions {
    /// The generation that is to be decided, as the log of the process and outlive status say
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<u64>::new().range(2..))]
    pub generation: u64,

    /// Speak with the process that has this --status [default: the only one that answers in the usual folders]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

/// Where the VM runs that is to go on at its standby.
#[derive(Clone, Debug, Args)]
#[command(after_help = HAND_OVER_HELP)]
pub struct HandOverOptions {
    /// Speak with the process that has this --status [default: the only one that answers in the usual folders]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

const HAND_OVER_HELP: &str = "\
The VM goes on at its standby from its last checkpoint, as after a takeover: no reboot, no lost write, no broken
connection. It is refused, and nothing changes, while the VM is not protected, its arbiter is manual or out of reach of
either host, its end was asked for, or the standby's host is cut off from the clients. If the standby does not come for it, the VM
goes on here. This process then waits as the standby (with --listen, or if it began as one), or ends with exit code 3.

Examples:
  outlive hand-over                                       the only VM that runs here
  outlive hand-over --socket /run/outlive/web.sock        one of several; outlive status shows them";

const WORD_HELP: &str = "\
Only for VMs whose hosts have --arbiter manual. When the two hosts have lost each other, the VM waits, and both logs say
which generation is to be decided. Exactly one host may have it: whoever gives it to both has two VMs with one address
and two histories. So first make sure that the VM does not run on the other host, best by switching that host off.

Examples:
  outlive take-over --generation 2       at the standby: it goes on from the last checkpoint
  outlive go-on-alone --generation 2     where the VM ran: it goes on there, without a standby
  outlive give-up --generation 2         at a host that still waits: the other one has it

The process refuses while it sees the other host.";
