//! The command line.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::check::CheckOptions;
use crate::demo::DemoOptions;

/// A virtual machine that outlives its host.
///
/// Outlive checkpoints a running VM many hundred times a second to a standby host. When the primary host dies, the
/// VM goes on elsewhere from its last checkpoint: no reboot, no lost transaction, no broken connection.
#[derive(Debug, Parser)]
#[command(name = "outlive", version, propagate_version = true, after_help = EXAMPLES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  outlive check                      what this machine has and what it lacks
  outlive demo                       see a VM survive three kills, on this machine alone
  outlive standby --listen 0.0.0.0:7000 --arbiter file:/srv/arbiter --net tap=vm0,bridge=br0
  outlive run --standby hostb:7000 --arbiter file:/srv/arbiter --net tap=vm0,bridge=br0 --ip 10.0.0.5/24

Exit codes: 0 ended in order; 1 failed; 2 wrong options or something missing on this machine (one line says what to
do); 3 the other side won the VM, this one has stopped.

Log level: RUST_LOG=debug (error, warn, info, debug, trace). Logs go to standard error.";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a VM on this host, protected when it has a standby
    Run(RunOptions),
    /// Wait for a VM to protect and take over when its host dies
    Standby(StandbyOptions),
    /// Kill a protected VM again and again on this machine and count what was lost
    Demo(DemoOptions),
    /// Say whether this machine can run VMs, and what to do about each thing that is missing
    Check(CheckOptions),
}

/// Options that a primary and a standby share: what the VM does once it runs here.
#[derive(Clone, Debug, Args)]
pub struct ActiveOptions {
    /// Standby to protect the VM with (repeat for alternatives; asked in turn until one accepts)
    #[arg(long = "standby", value_name = "HOST:PORT", requires = "arbiter", value_parser = parse_host_port)]
    pub standbys: Vec<String>,

    /// Time between two checkpoints, for example 1ms or 500us
    #[arg(long, default_value = "1ms", value_name = "TIME", value_parser = parse_interval)]
    pub interval: Duration,

    /// Dirty pages at which a checkpoint is taken early; staging has room for twice as many
    #[arg(long, default_value_t = 2048, value_name = "PAGES", value_parser = RangedU64ValueParser::<usize>::new().range(16..=262_144))]
    pub max_dirty: usize,

    /// Silence after which the peer counts as dead; of two hosts the longer one counts. A process that dies is
    /// noticed at once
    #[arg(long, default_value = "500ms", value_name = "TIME", value_parser = parse_dead_after)]
    pub dead_after: Duration,

    /// How dirty pages are found
    #[arg(long, default_value = "auto", value_name = "NAME")]
    pub tracker: TrackerChoice,

    /// Write events as JSON lines to this file (- for standard output); it grows by some megabytes a minute
    #[arg(long, value_name = "FILE")]
    pub events: Option<PathBuf>,

    /// End when standard input is closed (for programs that start Outlive and may be killed themselves)
    #[arg(long, hide = true)]
    pub exit_with_stdin: bool,
}

/// `outlive run`.
#[derive(Clone, Debug, Args)]
#[command(after_help = RUN_EXAMPLES)]
pub struct RunOptions {
    /// Name of the VM, for people
    #[arg(long, default_value = "vm", value_parser = parse_name)]
    pub name: String,

    /// Virtual CPUs
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = RangedU64ValueParser::<u8>::new().range(1..=8))]
    pub vcpus: u8,

    /// Memory, for example 256M or 2G
    #[arg(long, default_value = "256M", value_name = "SIZE", value_parser = parse_size)]
    pub memory: u64,

    /// Network card: a tap interface that is created, and the bridge that it joins
    #[arg(long, value_name = "tap=NAME[,bridge=BR][,mac=MAC]", value_parser = NetSpec::from_str)]
    pub net: Option<NetSpec>,

    /// IPv4 address of the guest with its prefix length
    #[arg(long, default_value = "10.77.0.2/24", value_name = "ADDR/LEN", value_parser = IpSpec::from_str)]
    pub ip: IpSpec,

    /// Default gateway of the guest
    #[arg(long, value_name = "ADDR", requires = "net")]
    pub gateway: Option<Ipv4Addr>,

    /// The third place that says who may run the VM: a directory that both hosts see
    #[arg(long, value_name = "file:DIR")]
    pub arbiter: Option<String>,

    /// Seed of the guest's random numbers; fresh ones are taken without it
    #[arg(long, value_name = "N", hide = true)]
    pub seed: Option<u64>,

    /// Options that matter while the VM runs here
    #[command(flatten)]
    pub active: ActiveOptions,
}

const RUN_EXAMPLES: &str = "\
Examples:
  outlive run --net tap=vm0 --ip 10.77.0.2/24
      an unprotected VM with a Redis server on port 6379; to reach it from this host:
      ip addr add 10.77.0.1/24 dev vm0; redis-cli -h 10.77.0.2
  outlive run --net tap=vm0,bridge=br0 --ip 10.0.0.5/24 --standby hostb:7000 --arbiter file:/srv/arbiter
      the same VM protected by host b; /srv/arbiter is a directory that both hosts see
  outlive run --vcpus 2 --memory 1G --interval 500us --max-dirty 8192 ...
      two checkpoints a millisecond";

/// `outlive standby`.
#[derive(Clone, Debug, Args)]
#[command(after_help = STANDBY_EXAMPLES)]
pub struct StandbyOptions {
    /// Address to listen on
    #[arg(long, value_name = "ADDR:PORT", value_parser = parse_listen)]
    pub listen: String,

    /// The third place that says who may run the VM: a directory that both hosts see
    #[arg(long, value_name = "file:DIR")]
    pub arbiter: String,

    /// Network card of the VM on this host: a tap interface that is created, and the bridge that it joins
    #[arg(long, value_name = "tap=NAME[,bridge=BR]", value_parser = parse_standby_card)]
    pub net: Option<NetSpec>,

    /// Options that matter once the VM runs here
    #[command(flatten)]
    pub active: ActiveOptions,
}

const STANDBY_EXAMPLES: &str = "\
Examples:
  outlive standby --listen 0.0.0.0:7000 --arbiter file:/srv/arbiter --net tap=vm0,bridge=br0
      waits for one VM and takes it over when its host dies
  outlive standby --listen 0.0.0.0:7000 --arbiter file:/srv/arbiter --net tap=vm0,bridge=br0 --standby hosta:7000
      the same, and protects the VM with host a after a takeover

The link is not encrypted in this version: use a network that only the two hosts share.";

/// Which dirty-page tracker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TrackerChoice {
    /// The best that this kernel has
    Auto,
    /// KVM's dirty ring (Linux 5.11 and newer)
    Ring,
    /// KVM's dirty bitmap, cleared page by page (Linux 5.2 and newer)
    ClearLog,
    /// KVM's dirty bitmap
    Bitmap,
}

impl From<TrackerChoice> for outlive_dirty::Choice {
    fn from(choice: TrackerChoice) -> Self {
        match choice {
            TrackerChoice::Auto => Self::Auto,
            TrackerChoice::Ring => Self::Ring,
            TrackerChoice::ClearLog => Self::ClearLog,
            TrackerChoice::Bitmap => Self::Bitmap,
        }
    }
}

/// A network card: `tap=NAME[,bridge=BR][,mac=MAC]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetSpec {
    /// Name of the tap interface, 1 to 15 characters.
    pub tap: String,
    /// Bridge that the tap joins.
    pub bridge: Option<String>,
    /// The card's address; made from the VM's id without it.
    pub mac: Option<[u8; 6]>,
}

impl FromStr for NetSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut spec = Self { tap: String::new(), bridge: None, mac: None };
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("tap", name)) => spec.tap = interface_name(name)?,
                Some(("bridge", name)) => spec.bridge = Some(interface_name(name)?),
                Some(("mac", mac)) => spec.mac = Some(parse_mac(mac)?),
                _ => return Err(format!("'{part}' is not tap=NAME, bridge=NAME or mac=MAC")),
            }
        }
        if spec.tap.is_empty() {
            return Err("tap=NAME is missing".into());
        }
        Ok(spec)
    }
}

fn interface_name(name: &str) -> Result<String, String> {
    let good = !name.is_empty()
        && name.len() <= 15
        && name.bytes().all(|b| b.is_ascii_graphic() && !b"/:%".contains(&b))
        && name != "."
        && name != "..";
    if good {
        Ok(name.into())
    } else {
        Err(format!("'{name}' is not an interface name of 1 to 15 characters"))
    }
}

fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let wrong = || format!("'{text}' is not a MAC address like 02:00:00:00:00:01");
    let mut mac = [0u8; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
        let part = part.ok_or_else(wrong)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    if parts.next().is_some() {
        return Err(wrong());
    }
    if mac[0] & 1 == 1 || mac == [0; 6] {
        return Err(format!("'{text}' is a multicast or zero address, which no network card can have"));
    }
    Ok(mac)
}

/// An IPv4 address with its prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpSpec {
    /// The address.
    pub address: Ipv4Addr,
    /// The prefix length, 1 to 30.
    pub prefix: u8,
}

impl FromStr for IpSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is not ADDRESS/LENGTH, for example 10.77.0.2/24");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address = address.parse().map_err(|_| wrong())?;
        let prefix = prefix.parse().ok().filter(|p| (1..=30).contains(p)).ok_or_else(wrong)?;
        Ok(Self { address, prefix })
    }
}

/// A size in bytes: a number with an optional K, M, G or T (powers of 1024).
///
/// # Errors
/// One line that shows a right one.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is not a size like 256M or 2G");
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

/// A time: a number with us, ms or s.
///
/// # Errors
/// One line that shows a right one.
pub fn parse_time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("'{text}' is not a time like 500us, 1ms or 2s");
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    match &text[digits.len()..] {
        "us" => Ok(Duration::from_micros(number)),
        "ms" => Ok(Duration::from_millis(number)),
        "s" => Ok(Duration::from_secs(number)),
        _ => Err(wrong()),
    }
}

fn parse_host_port(text: &str) -> Result<String, String> {
    let good = text.rsplit_once(':').is_some_and(|(host, port)| {
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    if good { Ok(text.into()) } else { Err(format!("'{text}' is not HOST:PORT, for example hostb:7000")) }
}

fn parse_listen(text: &str) -> Result<String, String> {
    let good = text
        .rsplit_once(':')
        .is_some_and(|(address, port)| !address.is_empty() && port.parse::<u16>().is_ok());
    if good { Ok(text.into()) } else { Err(format!("'{text}' is not ADDR:PORT, for example 0.0.0.0:7000")) }
}

fn parse_standby_card(text: &str) -> Result<NetSpec, String> {
    let spec: NetSpec = text.parse()?;
    match spec.mac {
        None => Ok(spec),
        Some(_) => Err("mac= belongs to outlive run: a standby's card has the VM's own address".into()),
    }
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    let time = parse_time(text)?;
    // Output waits for the end of its epoch; beyond a second not even an address would be resolved.
    if time < Duration::from_micros(100) || time > Duration::from_secs(1) {
        return Err(format!("an interval of '{text}' is not possible: give 100us to 1s"));
    }
    Ok(time)
}

fn parse_dead_after(text: &str) -> Result<Duration, String> {
    let time = parse_time(text)?;
    if time < Duration::from_millis(20) || time > Duration::from_secs(60) {
        return Err(format!("'{text}' is not possible: give 20ms to 60s"));
    }
    Ok(time)
}

fn parse_name(text: &str) -> Result<String, String> {
    let good = (1..=64).contains(&text.len()) && text.chars().all(|c| c.is_ascii_graphic());
    if good { Ok(text.into()) } else { Err("a name has 1 to 64 visible ASCII characters".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_and_times_are_read() {
        assert_eq!(parse_size("256M"), Ok(256 << 20));
        assert_eq!(parse_size("2GiB"), Ok(2 << 30));
        assert_eq!(parse_size("4096"), Ok(4096));
        for bad in ["", "M", "-1", "1X", "99999999999T", "1.5G", "²G"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_time("500us"), Ok(Duration::from_micros(500)));
        for bad in ["", "ms", "1", "1h", "-1ms"] {
            assert!(parse_time(bad).is_err(), "{bad}");
        }
        assert!(parse_interval("1us").is_err() && parse_interval("1ms").is_ok());
    }

    #[test]
    fn cards_are_read() {
        let spec: NetSpec = "tap=t0,bridge=br0,mac=02:00:00:00:00:09".parse().unwrap();
        assert_eq!((spec.tap.as_str(), spec.bridge.as_deref()), ("t0", Some("br0")));
        assert_eq!(spec.mac, Some([2, 0, 0, 0, 0, 9]));
        for bad in
            ["", "bridge=br0", "tap=", "tap=sixteen-letters-", "tap=a/b", "tap=t,mac=1", "tap=t,colour=red"]
        {
            assert!(bad.parse::<NetSpec>().is_err(), "{bad}");
        }
        for bad in [
            "01:00:00:00:00:00",
            "00:00:00:00:00:00",
            "02:00:00:00:00:00:00",
            "2:0:0:0:0:0",
            "+2:00:00:00:00:00",
        ] {
            assert!(parse_mac(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn protection_needs_an_arbiter() {
        let parse = |args: &[&str]| Cli::try_parse_from(["outlive", "run"].iter().chain(args));
        assert!(parse(&[]).is_ok());
        assert!(parse(&["--standby", "b:7000"]).is_err());
        assert!(parse(&["--standby", "b:7000", "--arbiter", "file:/x"]).is_ok());
        assert!(parse(&["--ip", "10.0.0.1"]).is_err());
        assert!(parse(&["--nonsense"]).is_err());
        for bad in ["b", "b:", ":7000", "b:0", "b:70000", ""] {
            assert!(parse(&["--standby", bad, "--arbiter", "file:/x"]).is_err(), "{bad}");
        }
        assert!(parse(&["--standby", "[::1]:7000", "--arbiter", "file:/x"]).is_ok());
        let standby = |args: &[&str]| {
            Cli::try_parse_from(["outlive", "standby", "--arbiter", "file:/x"].iter().chain(args))
        };
        assert!(standby(&["--listen", "0.0.0.0:7000", "--net", "tap=t"]).is_ok());
        assert!(standby(&["--listen", "7000"]).is_err() && standby(&["--listen", ":7000"]).is_err());
        assert!(standby(&["--listen", "0.0.0.0:7000", "--net", "tap=t,mac=02:00:00:00:00:01"]).is_err());
    }
}
