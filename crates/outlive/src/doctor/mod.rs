//! `outlive doctor`: whether two hosts can keep VMs together. Each is checked by itself, as `outlive check` does, this one
//! here and the other one by its node; then they are compared, and the way between them is measured.

mod between;

use std::fmt::{self, Display, Write as _};
use std::io::{self, Write as _};
use std::path::PathBuf;

use outlive_node::Host;
use outlive_node::peer::{self, Heard, PeerError};
use serde::Serialize;

use crate::check::{self, Finding, Report, State};
use crate::cli::DoctorOptions;
use crate::exit;
use crate::link::open_keys;

/// Why the other host is not compared.
#[derive(Debug, thiserror::Error)]
enum DoctorError {
    /// Its node cannot be asked.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// What it says is not understood.
    #[error("the check of {0} is not understood: {1}; is it of another release?")]
    Answer(Host, #[source] serde_json::Error),
    /// One host is no pair.
    #[error("--peer {0} is this host itself ({1}): give the other host of the pair")]
    Itself(Host, String),
}

/// What was found.
#[derive(Debug, Serialize)]
struct Opinion {
    /// The worst of everything.
    result: State,
    /// This host, and the other one if it was asked.
    hosts: Vec<Report>,
    /// What is between them.
    between: Vec<Finding>,
}

impl Opinion {
    fn alone(here: Report) -> Self {
        Self { result: here.result, hosts: vec![here], between: Vec::new() }
    }

    fn of_both(here: Report, there: Report, heard: &Heard) -> Self {
        let between = between::findings(&here.facts, &there.facts, heard);
        let result = here.result.max(there.result).max(check::worst(&between));
        Self { result, hosts: vec![here, there], between }
    }

    fn exit_code(&self) -> u8 {
        if self.result == State::Error { exit::FAILED } else { exit::OK }
    }

    /// Every finding with the host that it is about; one that is the same on both is told once.
    fn rows(&self) -> Vec<(&str, &Finding)> {
        let name = |at: usize| self.hosts.get(at).map_or("", |host| host.facts.host.as_str());
        let findings =
            |at: usize| self.hosts.get(at).map(|host| host.findings.as_slice()).unwrap_or_default();
        let mut theirs: Vec<_> = findings(1).iter().collect();
        let mut rows = Vec::new();
        for (at, mine) in findings(0).iter().enumerate() {
            if let Some(same) = theirs.iter().position(|it| *it == mine) {
                theirs.remove(same);
                rows.push(("both", mine));
                continue;
            }
            rows.push((name(0), mine));
            // What the other host says of the same stands below.
            if findings(0)[at + 1..].iter().all(|it| it.name != mine.name) {
                let (alike, rest): (Vec<_>, Vec<_>) = theirs.into_iter().partition(|it| it.name == mine.name);
                theirs = rest;
                rows.extend(alike.into_iter().map(|it| (name(1), it)));
            }
        }
        rows.extend(theirs.into_iter().map(|it| (name(1), it)));
        rows.extend(self.between.iter().map(|it| ("between", it)));
        rows
    }
}

impl Display for Opinion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = self.rows();
        let longest = |length: fn(&(&str, &Finding)) -> usize| rows.iter().map(length).max().unwrap_or(0);
        let (wide, wider) = (longest(|row| row.1.name.len()), longest(|row| row.0.len()));
        for (host, Finding { name, state, found, remedy }) in &rows {
            writeln!(f, "{:<7}  {name:<wide$}  {host:<wider$}  {found}", state.word())?;
            if !remedy.is_empty() {
                writeln!(f, "{:<7}  {:<wide$}  {:<wider$}  -> {remedy}", "", "", "")?;
            }
        }
        f.write_char('\n')?;
        let what = if self.hosts.len() > 1 {
            "VMs can be protected by these two hosts"
        } else {
            "VMs can run on this host"
        };
        match self.result {
            State::Ok => write!(f, "{what}."),
            State::Warning => write!(f, "{what}; see the warnings."),
            State::Error => f.write_str("Something is in the way: mend everything marked ERROR."),
        }
    }
}

/// Carries the command out. Returns the exit code.
pub fn command(options: &DoctorOptions) -> u8 {
    let here = check::run(Some(&options.vms), options.host.as_deref());
    let asked = options.peer.as_ref().map(|peer| other(options, peer, &here));
    let (opinion, failed) = match asked {
        None => (Opinion::alone(here), None),
        Some(Ok((there, heard))) => (Opinion::of_both(here, there, &heard), None),
        Some(Err(why)) => (Opinion::alone(here), Some(why)),
    };
    let text = if options.json {
        serde_json::to_string_pretty(&opinion).expect("names and texts are always JSON")
    } else {
        opinion.to_string()
    };
    // A reader that left early (a pipe into head) does not change the result.
    let _ = writeln!(io::stdout(), "{text}");
    failed.map_or_else(|| opinion.exit_code(), exit::usage)
}

fn other(options: &DoctorOptions, peer: &Host, here: &Report) -> Result<(Report, Heard), DoctorError> {
    let variable = || std::env::var_os("OUTLIVE_KEYS").filter(|it| !it.is_empty()).map(PathBuf::from);
    let keys = options.keys.clone().or_else(variable);
    let heard = peer::ask(peer, open_keys(keys.as_deref()))?;
    let there: Report =
        serde_json::from_value(heard.check.clone()).map_err(|why| DoctorError::Answer(peer.clone(), why))?;
    if there.facts.host == here.facts.host {
        return Err(DoctorError::Itself(peer.clone(), there.facts.host));
    }
    Ok((there, heard))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Facts;

    fn report(host: &str, findings: &[Finding]) -> Report {
        let facts = Facts { host: host.into(), ..Facts::default() };
        Report { result: check::worst(findings), findings: findings.to_vec(), facts }
    }

    const HEARD: Heard = Heard { check: serde_json::Value::Null, clock: None, round_trip: None, speed: None };

    #[test]
    fn two_hosts_stand_side_by_side() {
        let same = Finding::ok("KVM", "opens");
        let here =
            report("hosta", &[same.clone(), Finding::ok("memory", "much"), Finding::ok("clock", "tsc")]);
        let little = Finding::warning("memory", "little", "free some");
        let there =
            report("hostb", &[same, Finding::ok("arbiter", "answers"), little, Finding::ok("clock", "hpet")]);
        let opinion = Opinion::of_both(here, there, &HEARD);
        let expected = "\
ok       KVM      both   opens
ok       memory   hosta  much
warning  memory   hostb  little
                         -> free some
ok       clock    hosta  tsc
ok       clock    hostb  hpet
ok       arbiter  hostb  answers

VMs can be protected by these two hosts; see the warnings.";
        assert_eq!(opinion.to_string(), expected);
        assert_eq!((opinion.result, opinion.exit_code()), (State::Warning, 0));
    }

    #[test]
    fn an_error_on_either_host_or_between_them_decides() {
        let (good, bad) = (report("hosta", &[]), report("hostb", &[Finding::error("KVM", "gone", "look")]));
        assert_eq!(Opinion::alone(good.clone()).exit_code(), 0);
        assert_eq!(Opinion::alone(bad.clone()).exit_code(), 1);
        assert_eq!(Opinion::of_both(good.clone(), bad, &HEARD).exit_code(), 1);
        let mut other = report("hostb", &[]);
        other.facts.kvm = "kvm_amd".into();
        let mut intel = good;
        intel.facts.kvm = "kvm_intel".into();
        let opinion = Opinion::of_both(intel, other, &HEARD);
        assert_eq!(opinion.exit_code(), 1);
        let json: serde_json::Value = serde_json::to_value(&opinion).unwrap();
        assert_eq!((&json["result"], &json["between"][0]["name"]), (&"error".into(), &"KVM module".into()));
    }
}
