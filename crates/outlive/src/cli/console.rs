//! `outlive console`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::values::parse_time;

/// `outlive console`.
#[derive(Clone, Debug, Args)]
#[command(after_help = CONSOLE_EXAMPLES)]
pub struct ConsoleOptions {
    /// The directory given to --console of outlive run or standby (its serial port then), or one of the
    /// sockets in it: serial or hvc0
    #[arg(value_name = "DIR[/serial|/hvc0]")]
    pub path: PathBuf,

    /// After standard input has ended, leave once the VM has printed nothing for this long, for example
    /// 200ms; without this option stay until the VM ends
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub wait: Option<Duration>,
}

const CONSOLE_EXAMPLES: &str = "\
Examples:
  outlive console /run/vm                          the serial port of the VM that was started with --console /run/vm
  outlive console /run/vm/hvc0                     its virtio console
  echo poweroff | outlive console /run/vm          from a script; ends with the VM
  outlive console --wait 200ms /run/vm </dev/null  what it has printed lately (up to 64 KiB)

At a terminal Ctrl-] detaches. The VM runs on.";
