//! `outlive rewind`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use clap::{Args, FromArgMatches};
use outlive_record::At;

use super::active::ActiveOptions;
use super::run::RunOptions;
use super::values::{ConsoleSpec, NetSpec, parse_name, parse_stop_within};
use crate::sandbox::Mode;

/// `outlive rewind`.
#[derive(Clone, Debug, Args)]
#[command(after_help = REWIND_EXAMPLES)]
pub struct RewindOptions {
    /// The directory of outlive standby --record
    #[arg(value_name = "RECORD")]
    pub record: PathBuf,

    /// The moment: how long ago (-30s, -5m, -2h), a time (2026-01-31T12:00:00Z), the number of a checkpoint, of a run's
    /// checkpoint (3/12345), or newest. Of a time the last checkpoint before it counts
    #[arg(long, value_name = "MOMENT", allow_hyphen_values = true, value_parser = Moment::from_str)]
    pub to: Moment,

    /// Directory that is made for the disks of the VM, disk-0.raw and so on. It must not be there, or be empty
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    pub into: Option<PathBuf>,

    /// Say which moment it would be and whether the VM can run here, and do nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Name of the new VM [default: the old one's, with -rewound behind it]
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    pub name: Option<String>,

    /// Connect the VM's network card: a tap interface that is created, and the bridge that it joins. It has the address of
    /// the old VM's card, and the guest its IP addresses: two machines with one address take each other's packets away if
    /// the old VM still runs in that network [default: the card is there and is connected to nothing]
    #[arg(long, value_name = "tap=NAME[,bridge=BR][,vlan=N]", value_parser = parse_card)]
    pub net: Option<NetSpec>,

    /// Where the guest's serial port and console go: a directory for their sockets, which is made if it is
    /// missing (see outlive console), or stdio
    #[arg(long, value_name = "DIR|stdio", value_parser = ConsoleSpec::from_str)]
    pub console: Option<ConsoleSpec>,

    /// Socket on which outlive status asks this process [default: named after the VM, in /run/outlive or
    /// $XDG_RUNTIME_DIR/outlive]
    #[arg(long, value_name = "PATH")]
    pub status: Option<PathBuf>,

    /// Append events as JSON lines to this file (- for standard output)
    #[arg(long, value_name = "FILE")]
    pub events: Option<PathBuf>,

    /// How long the guest may take to shut down after a first SIGTERM or SIGINT; then the VM is stopped as by a
    /// second one (100ms to 1h)
    #[arg(long, default_value = "120s", value_name = "TIME", value_parser = parse_stop_within)]
    pub stop_within: Duration,

    /// Keep all memory of this process in RAM. Needs CAP_IPC_LOCK, which root usually has, or an unlimited
    /// RLIMIT_MEMLOCK
    #[arg(long)]
    pub lock_memory: bool,

    /// Confine this process, as outlive run does. See docs/sandbox.md
    #[arg(long, default_value = "on", value_name = "on|log|off")]
    pub sandbox: Mode,

    /// Become this user once the tap can be made, if root starts this process. The record must be this user's, and it
    /// needs /dev/kvm [default: the user that starts it]
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,

    /// End when standard input is closed (for programs that start Outlive and may be killed themselves)
    #[arg(long, hide = true)]
    pub exit_with_stdin: bool,
}

impl RewindOptions {
    /// What the VM has while it runs here: as one that outlive run starts, without a standby.
    pub(crate) fn active(&self) -> ActiveOptions {
        let usual = <RunOptions as Args>::augment_args(clap::Command::new("run")).get_matches_from(["run"]);
        let usual = RunOptions::from_arg_matches(&usual).unwrap_or_else(|error| error.exit()).active;
        ActiveOptions {
            console: self.console.clone(),
            status: self.status.clone(),
            events: self.events.clone(),
            stop_within: self.stop_within,
            lock_memory: self.lock_memory,
            sandbox: self.sandbox,
            user: self.user.clone(),
            exit_with_stdin: self.exit_with_stdin,
            ..usual
        }
    }
}

fn parse_card(text: &str) -> Result<NetSpec, String> {
    let spec: NetSpec = text.parse()?;
    if spec.mac.is_some() || text.contains("queues=") || spec.mtu.is_some() {
        return Err("mac=, queues= and mtu= are as the guest has seen them: leave them out".into());
    }
    Ok(spec)
}

/// A moment of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The last one.
    Newest,
    /// So long ago.
    Ago(Duration),
    /// At this time.
    Time(SystemTime),
    /// A checkpoint, of a run if one is named.
    Checkpoint {
        /// The run.
        run: Option<u64>,
        /// Its number.
        number: u64,
    },
}

impl Moment {
    /// As a record is asked for it.
    pub(crate) fn at(self, now: SystemTime) -> At {
        match self {
            Self::Newest => At::Newest,
            Self::Ago(age) => {
                let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                At::Time(SystemTime::UNIX_EPOCH + since.saturating_sub(age))
            }
            Self::Time(time) => At::Time(time),
            Self::Checkpoint { run, number } => At::Checkpoint { run, number },
        }
    }
}

impl FromStr for Moment {
    type Err = NoMoment;

    fn from_str(text: &str) -> Result<Self, NoMoment> {
        let wrong = || NoMoment(text.to_owned());
        if text == "newest" {
            return Ok(Self::Newest);
        }
        if let Some(age) = text.strip_prefix('-') {
            return humantime::parse_duration(age).map(Self::Ago).map_err(|_| wrong());
        }
        if let Some((run, number)) = text.split_once('/') {
            let (run, number) = (parse_number(run), parse_number(number));
            return run
                .zip(number)
                .map(|(run, number)| Self::Checkpoint { run: Some(run), number })
                .ok_or_else(wrong);
        }
        if let Some(number) = parse_number(text) {
            return Ok(Self::Checkpoint { run: None, number });
        }
        parse_rfc3339(text).map(Self::Time).ok_or_else(wrong)
    }
}

/// Digits only: `+5` would be read, too.
fn parse_number(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// A time with its zone: without one it would be another moment on another host.
fn parse_rfc3339(text: &str) -> Option<SystemTime> {
    let parse = |local: &str| humantime::parse_rfc3339_weak(local).ok();
    if let Some(local) = text.strip_suffix(['Z', 'z']) {
        return parse(local);
    }
    let (local, zone) = text.split_at_checked(text.len().checked_sub(6)?)?;
    let (hours, minutes) = zone.get(1..)?.split_once(':')?;
    let (hours, minutes) = (parse_number(hours)?, parse_number(minutes)?);
    let ahead = Duration::from_secs((hours * 60 + minutes) * 60);
    let (valid, local) = (hours < 24 && minutes < 60, parse(local)?);
    match zone.as_bytes()[0] {
        b'+' if valid => local.checked_sub(ahead),
        b'-' if valid => local.checked_add(ahead),
        _ => None,
    }
}

/// A text that is no moment.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub struct NoMoment(String);

impl fmt::Display for NoMoment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "'{}' is no moment: give how long ago like -30s or -5m, a time with its zone like 2026-01-31T12:00:00Z, a \
             checkpoint's number, RUN/CHECKPOINT, or newest",
            self.0
        )
    }
}

const REWIND_EXAMPLES: &str = "\
The VM is started as a new one, with another id, from copies of the recorded disks. The old VM, its images and the record stay
as they are, and the old VM may run meanwhile. The guest notices nothing: its clock is behind by the time that has gone since.
Afterwards it can be started again from its disks, as any VM.

Examples:
  outlive rewind /var/lib/outlive/record/web --to -5m --into /srv/web-before --console stdio
      the VM as it was five minutes ago, connected to nothing, with its console on this terminal
  outlive rewind /var/lib/outlive/record/web --to 2026-01-31T12:00:00+01:00 --into /srv/web-before --net tap=lab0,bridge=lab
      as it was at noon, in a network of its own; not in that of the old VM while that runs
  outlive rewind /var/lib/outlive/record/web --to newest --dry-run
      which moment that would be, and whether the VM can run here
  outlive run --boot disk --memory 2G --disk path=/srv/web-before/disk-0.raw --net tap=vm0,bridge=br0
      later, the same VM from its disk";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(text: &str) -> Moment {
        text.parse().unwrap()
    }

    #[test]
    fn moments_are_read() {
        let number = |run, number| Moment::Checkpoint { run, number };
        assert_eq!(
            (at("newest"), at("0"), at("12345")),
            (Moment::Newest, number(None, 0), number(None, 12345))
        );
        assert_eq!(at("3/17"), number(Some(3), 17));
        let ago = |seconds| Moment::Ago(Duration::from_secs(seconds));
        assert_eq!(
            (at("-30s"), at("-5m"), at("-1h30m"), at("-2d")),
            (ago(30), ago(300), ago(5400), ago(172_800))
        );
        let noon = Moment::Time(SystemTime::UNIX_EPOCH + Duration::from_secs(1_769_860_800));
        for text in [
            "2026-01-31T12:00:00Z",
            "2026-01-31T12:00:00.000z",
            "2026-01-31 12:00:00Z",
            "2026-01-31T13:30:00+01:30",
            "2026-01-30T22:00:00-14:00",
        ] {
            assert_eq!(at(text), noon, "{text}");
        }
        for bad in [
            "",
            "-",
            "--into",
            "-5",
            "5m",
            "yesterday",
            "+5",
            "1/",
            "/1",
            "1/2/3",
            "-1/2",
            "99999999999999999999",
            "2026-01-31T12:00:00",
            "2026-01-31",
            "2026-01-31T12:00:00+1:00",
            "2026-01-31T12:00:00+24:00",
            "2026-01-31T12:00:00+00:60",
            "2026-13-31T12:00:00Z",
            "12:00:00Z",
            "é1:00",
            "2026-01-31T12:00:00é01:00",
        ] {
            let why = bad.parse::<Moment>().unwrap_err().to_string();
            assert!(why.contains("is no moment: give how long ago") && why.lines().count() == 1, "{why}");
        }
    }

    #[test]
    fn an_age_is_counted_from_now_and_no_further_than_time_itself() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        assert_eq!(at("-999s").at(now), At::Time(SystemTime::UNIX_EPOCH + Duration::from_secs(1)));
        assert_eq!(at("-99999years").at(now), At::Time(SystemTime::UNIX_EPOCH));
        assert_eq!(at("4/9").at(now), At::Checkpoint { run: Some(4), number: 9 });
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange(text in ".{0,40}") {
            let _ = text.parse::<Moment>();
        }

        #[test]
        fn what_history_shows_is_read(millis in 0_u64..4_000_000_000_000, zone in -1439_i64..=1439) {
            let time = SystemTime::UNIX_EPOCH + Duration::from_millis(millis);
            let shown = humantime::format_rfc3339_millis(time).to_string();
            prop_assert_eq!(at(&shown), Moment::Time(time));
            // The same moment, as a clock elsewhere has it.
            let local = time + Duration::from_secs(86_400);
            let local = if zone < 0 { local - Duration::from_secs(zone.unsigned_abs() * 60) }
                else { local + Duration::from_secs(zone.unsigned_abs() * 60) };
            let local = humantime::format_rfc3339_millis(local).to_string();
            let (sign, minutes) = (if zone < 0 { '-' } else { '+' }, zone.unsigned_abs());
            let text = format!("{}{sign}{:02}:{:02}", local.trim_end_matches('Z'), minutes / 60, minutes % 60);
            prop_assert_eq!(at(&text), Moment::Time(time + Duration::from_secs(86_400)), "{}", text);
        }

        #[test]
        fn numbers_are_read(run in any::<u64>(), number in any::<u64>()) {
            prop_assert_eq!(at(&format!("{run}/{number}")), Moment::Checkpoint { run: Some(run), number });
            prop_assert_eq!(at(&number.to_string()), Moment::Checkpoint { run: None, number });
        }
    }
}
