//! `outlive check`: what this machine has, what it lacks, and what to do about each thing that is missing. `outlive doctor`
//! puts the reports of two hosts side by side.
//!
//! It changes nothing and leaves nothing behind. The most important part is the trial: it runs a real VM for
//! a moment and compares the pages that dirty tracking found with those that the guest wrote.

mod arbiters;
mod facts;
mod kvm;
mod link;
mod memory;
mod network;
mod storage;
mod system;
mod trial;

use std::borrow::Cow;
use std::fmt::{self, Write as _};
use std::io::{self, Write as _};
use std::path::Path;

use serde::{Deserialize, Serialize};

pub use facts::{Cpu, Defined, Facts};
pub use memory::available_memory_bytes;

use crate::cli::CheckOptions;
use crate::exit;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Everything is as it should be.
    Ok,
    /// VMs run, but slower, less conveniently, or with a risk that the text names.
    Warning,
    /// VMs cannot run, or cannot be protected.
    Error,
}

impl State {
    /// For people.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Error => "ERROR",
        }
    }
}

/// One thing that was checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was checked, in one or two words.
    pub name: Cow<'static, str>,
    /// How bad it is.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What to do; empty if nothing.
    pub remedy: String,
}

impl Finding {
    pub(crate) fn ok(name: &'static str, found: impl Into<String>) -> Finding {
        Finding { name: name.into(), state: State::Ok, found: found.into(), remedy: String::new() }
    }

    pub(crate) fn warning(
        name: &'static str,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Finding {
        Finding { name: name.into(), state: State::Warning, found: found.into(), remedy: remedy.into() }
    }

    pub(crate) fn error(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding { name: name.into(), state: State::Error, found: found.into(), remedy: remedy.into() }
    }
}

/// All findings, in reading order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The worst state of all findings.
    pub result: State,
    /// The findings.
    pub findings: Vec<Finding>,
    /// What another host is compared with.
    pub facts: Facts,
}

impl Report {
    fn new(findings: Vec<Finding>, facts: Facts) -> Report {
        Report { result: worst(&findings), findings, facts }
    }

    /// 0 if VMs can run here, 2 if something essential is missing.
    pub fn exit_code(&self) -> u8 {
        if self.result == State::Error { exit::USAGE } else { exit::OK }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.findings.iter().map(|finding| finding.name.len()).max().unwrap_or(0);
        for Finding { name, state, found, remedy } in &self.findings {
            writeln!(f, "{:<7}  {name:<width$}  {found}", state.word())?;
            if !remedy.is_empty() {
                writeln!(f, "{:<7}  {:<width$}  -> {remedy}", "", "")?;
            }
        }
        f.write_char('\n')?;
        f.write_str(match self.result {
            State::Ok => "VMs can run on this machine.",
            State::Warning => "VMs can run on this machine; see the warnings.",
            State::Error => "VMs cannot run on this machine until everything marked ERROR is mended.",
        })
    }
}

/// The worst state of some findings.
pub(crate) fn worst(findings: &[Finding]) -> State {
    findings.iter().map(|finding| finding.state).max().unwrap_or(State::Ok)
}

/// Checks this machine, and the arbiters that definitions in `vms` name for the host of this name.
pub fn run(vms: Option<&Path>, host: Option<&str>) -> Report {
    let mut findings = kvm::findings();
    if findings.iter().all(|finding| finding.state != State::Error) {
        findings.push(trial::finding());
    }
    findings.extend(network::findings());
    findings.extend(link::findings());
    findings.push(memory::finding());
    let (storage, write) = storage::finding().unzip();
    findings.extend(storage);
    findings.extend(system::findings());
    let host = host.map_or_else(crate::process::host_name, str::to_owned);
    let definitions = vms.map(|vms| arbiters::of(vms, &host));
    let (arbiters, definitions) = definitions.unwrap_or_default();
    findings.extend(arbiters);
    let write_us = write.map(|it| it.as_micros() as u64);
    Report::new(findings, Facts { write_us, definitions, ..facts::here(host) })
}

/// The command: checks this machine, prints the findings to standard output, and returns the exit code.
pub fn command(options: &CheckOptions) -> u8 {
    let report = run(options.vms.as_deref(), options.host.as_deref());
    let text = if options.json { to_json(&report) } else { report.to_string() };
    // A reader that left early (a pipe into head) does not change the result.
    let _ = writeln!(io::stdout(), "{text}");
    report.exit_code()
}

fn to_json(report: &Report) -> String {
    serde_json::to_string_pretty(report).expect("names and texts are always JSON")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_finding_decides() {
        let ok = Finding::ok("a", "fine");
        let warning = Finding::warning("long name", "slow", "buy");
        let missing = Finding::error("b", "gone", "look for it");
        let report = |findings: &[&Finding]| {
            Report::new(findings.iter().copied().cloned().collect(), Facts::default())
        };
        assert_eq!(report(&[]).exit_code(), 0);
        assert_eq!(report(&[&ok, &warning]).exit_code(), 0);
        assert_eq!(report(&[&missing, &ok]).exit_code(), 2);
        let text = report(&[&ok, &warning, &missing]).to_string();
        let expected = "\
ok       a          fine
warning  long name  slow
                    -> buy
ERROR    b          gone
                    -> look for it

VMs cannot run on this machine until everything marked ERROR is mended.";
        assert_eq!(text, expected);
    }

    #[test]
    fn json_has_a_result_and_every_finding() {
        let findings = vec![Finding::ok("a", "fine"), Finding::warning("b", "\"slow\"", "buy")];
        let report = Report::new(findings, Facts { host: "hosta".into(), ..Facts::default() });
        let value: serde_json::Value = serde_json::from_str(&to_json(&report)).unwrap();
        assert_eq!(value["result"], "warning");
        assert_eq!(value["findings"][1]["found"], "\"slow\"");
        assert_eq!((&value["findings"][0]["remedy"], &value["facts"]["host"]), (&"".into(), &"hosta".into()));
        assert_eq!(serde_json::from_value::<Report>(value).unwrap(), report, "another host reads it");
    }

    /// Whatever this machine is, every problem comes with what to do, in one line.
    #[test]
    fn everything_that_is_not_ok_has_a_remedy() {
        for Finding { name, state, found, remedy } in run(None, None).findings {
            assert_eq!(state == State::Ok, remedy.is_empty(), "{name}: {found} {remedy}");
            assert!(!found.is_empty() && !found.contains('\n') && !remedy.contains('\n'), "{name}");
        }
    }
}
