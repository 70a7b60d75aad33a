//! What two hosts have in common, and what is between them.

use std::time::Duration;

use outlive_node::peer::{Apart, Heard};

use crate::check::{Defined, Facts, Finding};

/// Clocks that are further apart confuse whoever reads logs, and judge certificates differently.
const CLOCKS_MS: i64 = 1000;
/// Each answer of a VM waits for a round trip.
const FAR: Duration = Duration::from_millis(2);
/// A link of 1 Gbit/s, less what TCP and TLS need of it. In bytes a second.
const SLOW: u64 = 110_000_000;
/// How many features are named.
const NAMED: usize = 6;

/// Compares two hosts. What is not known of one of them is left out.
pub(super) fn findings(here: &Facts, there: &Facts, heard: &Heard) -> Vec<Finding> {
    let two = Two { here, there };
    let about = [
        two.release(),
        two.kernel(),
        two.processor(),
        two.microcode(),
        two.features(),
        two.module(),
        two.tsc(),
        two.storage(),
        heard.clock.map(|apart| clocks(there, apart)),
        heard.round_trip.map(delay),
        heard.speed.map(bandwidth),
    ];
    about.into_iter().flatten().chain(two.definitions()).collect()
}

/// Both hosts.
struct Two<'a> {
    here: &'a Facts,
    there: &'a Facts,
}

impl Two<'_> {
    /// Something of both: what it is if it is the same, or what each has; `None` if it is not known of one.
    fn of(&self, what: impl Fn(&Facts) -> &str) -> Option<Result<String, String>> {
        let (mine, theirs) = (what(self.here), what(self.there));
        if mine.is_empty() || theirs.is_empty() {
            return None;
        }
        if mine == theirs {
            return Some(Ok(mine.to_owned()));
        }
        Some(Err(format!("{} has {mine}, {} has {theirs}", self.here.host, self.there.host)))
    }

    fn release(&self) -> Option<Finding> {
        let remedy = "upgrade the older one: releases that are further apart than one refuse each other (docs/upgrade.md)";
        Some(match self.of(|it| &it.release)? {
            Ok(release) => Finding::ok("release", release),
            Err(differ) => Finding::warning("release", differ, remedy),
        })
    }

    fn kernel(&self) -> Option<Finding> {
        let remedy = "use the same kernel: a VM that was started on the host whose KVM has more is refused by the other one";
        Some(match self.of(|it| &it.kernel)? {
            Ok(kernel) => Finding::ok("kernel", kernel),
            Err(differ) => Finding::warning("kernel", differ, remedy),
        })
    }

    fn processor(&self) -> Option<Finding> {
        const NAME: &str = "processor";
        if let Err(differ) = self.of(|it| &it.cpu.vendor)? {
            return Some(Finding::error(
                NAME,
                differ,
                "use two hosts of one vendor: no VM goes on at a processor of another one",
            ));
        }
        let model = &self.here.cpu.model;
        Some(match self.of(|it| &it.cpu.signature)? {
            Ok(signature) => Finding::ok(NAME, format!("the same: {model}, {signature}")),
            Err(differ) => Finding::warning(
                NAME,
                differ,
                "use hosts of one model, or start VMs on the one with fewer features: the other way round they are refused",
            ),
        })
    }

    fn microcode(&self) -> Option<Finding> {
        let remedy =
            "install the same microcode: an update may take features away, or say that a processor is safe";
        Some(match self.of(|it| &it.cpu.microcode)? {
            Ok(revision) => Finding::ok("microcode", format!("the same: {revision}")),
            Err(differ) => Finding::warning("microcode", differ, remedy),
        })
    }

    fn features(&self) -> Option<Finding> {
        const NAME: &str = "features";
        let (mine, theirs) = (&self.here.cpu.flags, &self.there.cpu.flags);
        if mine.is_empty() || theirs.is_empty() {
            return None;
        }
        let lacks = |host: &Facts, others: &[String]| {
            let missing: Vec<_> =
                others.iter().filter(|it| !host.cpu.flags.contains(it)).map(String::as_str).collect();
            let more = missing.len().saturating_sub(NAMED);
            let named = missing[..missing.len().min(NAMED)].join(", ");
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            (!missing.is_empty()).then(|| format!("{} lacks {named}{more}", host.host))
        };
        let lacks: Vec<_> =
            [lacks(self.here, theirs), lacks(self.there, mine)].into_iter().flatten().collect();
        if lacks.is_empty() {
            return Some(Finding::ok(NAME, format!("the same {}", mine.len())));
        }
        Some(Finding::warning(
            NAME,
            lacks.join("; "),
            "start VMs on the host with fewer features; a host that lacks one that the guest was told of refuses the VM",
        ))
    }

    fn module(&self) -> Option<Finding> {
        Some(match self.of(|it| &it.kvm)? {
            Ok(module) => Finding::ok("KVM module", format!("the same: {module}")),
            Err(differ) => {
                Finding::error("KVM module", differ, "use the same one: no VM goes on at another one")
            }
        })
    }

    fn tsc(&self) -> Option<Finding> {
        const NAME: &str = "TSC";
        let (mine, theirs) = (self.here.tsc_khz?, self.there.tsc_khz?);
        let found = format!("{mine} kHz on {}, {theirs} kHz on {}", self.here.host, self.there.host);
        // As a VM's state is judged when it is loaded.
        if u64::from(mine.abs_diff(theirs)) * 4000 <= u64::from(mine.min(theirs)) {
            return Some(Finding::ok(NAME, found));
        }
        if self.here.tsc_scales && self.there.tsc_scales {
            return Some(Finding::ok(NAME, format!("{found}; both scale a guest's")));
        }
        Some(Finding::error(
            NAME,
            found,
            "use hosts whose TSC has the same frequency, or that can scale it: otherwise a standby refuses VMs",
        ))
    }

    fn storage(&self) -> Option<Finding> {
        const NAME: &str = "storage";
        let (mine, theirs) = (self.here.write_us?, self.there.write_us?);
        let ms = |us: u64| us as f64 / 1e3;
        let found = format!(
            "a write takes {:.1} ms on {}, {:.1} ms on {}",
            ms(mine),
            self.here.host,
            ms(theirs),
            self.there.host
        );
        let (fast, slow) = (mine.min(theirs), mine.max(theirs));
        if slow < 5000 || slow < 4 * fast {
            return Some(Finding::ok(NAME, found));
        }
        Some(Finding::warning(
            NAME,
            found,
            "give both hosts alike storage: the slower one slows down a guest that writes much, and its takeovers",
        ))
    }

    /// VMs of two hosts must be defined on both, with one arbiter.
    fn definitions(&self) -> Vec<Finding> {
        const NAME: &str = "VMs";
        let of_two = |host: &'_ Facts| -> Vec<Defined> {
            host.definitions.iter().filter(|it| it.arbiter.is_some()).cloned().collect()
        };
        let (mine, theirs) = (of_two(self.here), of_two(self.there));
        let mut findings = Vec::new();
        let mut good = 0;
        for vm in &mine {
            match theirs.iter().find(|it| it.vm == vm.vm) {
                None => findings.push(only_on(&vm.vm, self.here, self.there)),
                Some(other) => match self.arbiters(vm, other) {
                    Some(finding) => findings.push(finding),
                    None => good += 1,
                },
            }
        }
        let new = theirs.iter().filter(|it| mine.iter().all(|vm| vm.vm != it.vm));
        findings.extend(new.map(|vm| only_on(&vm.vm, self.there, self.here)));
        if good > 0 {
            let vms = if good == 1 { "1 VM is" } else { &format!("{good} VMs are") };
            findings.insert(0, Finding::ok(NAME, format!("{vms} defined on both hosts")));
        }
        findings
    }

    /// What is wrong with the arbiter of a VM. One that does not answer is its host's own finding.
    fn arbiters(&self, mine: &Defined, theirs: &Defined) -> Option<Finding> {
        let (one, other) = (mine.identity.as_deref()?, theirs.identity.as_deref()?);
        (one != other).then(|| {
            Finding::error(
                "arbiter",
                format!(
                    "VM {}: {} has the arbiter {one}, {} has {other}",
                    mine.vm, self.here.host, self.there.host
                ),
                "give both hosts the same one, or mount the file system that has it: with two, two hosts may run the VM",
            )
        })
    }
}

fn only_on(vm: &str, has: &Facts, lacks: &Facts) -> Finding {
    Finding::warning(
        "VMs",
        format!("VM {vm} is defined on {} and not on {}", has.host, lacks.host),
        format!("outlive vm define {vm} FILE on {}, if it is to protect the VM", lacks.host),
    )
}

fn clocks(there: &Facts, Apart { ahead_ms, give_or_take_ms }: Apart) -> Finding {
    const NAME: &str = "clocks";
    let (far, which) = (ahead_ms.abs(), if ahead_ms < 0 { "behind" } else { "ahead" });
    if far <= CLOCKS_MS + give_or_take_ms {
        return Finding::ok(NAME, format!("at most {} ms apart", far + give_or_take_ms));
    }
    Finding::warning(
        NAME,
        format!("{} is {:.1} s {which}", there.host, far as f64 / 1e3),
        "have both set their clocks by NTP (chrony): certificates are judged, and logs compared, by them",
    )
}

fn delay(round_trip: Duration) -> Finding {
    const NAME: &str = "link delay";
    let found = format!("a round trip takes {:.2} ms at most", round_trip.as_secs_f64() * 1e3);
    if round_trip < FAR {
        return Finding::ok(NAME, found);
    }
    Finding::warning(
        NAME,
        found,
        "use a shorter way between the hosts: each answer of a VM waits for a round trip",
    )
}

fn bandwidth(speed: u64) -> Finding {
    const NAME: &str = "link speed";
    let found = format!("at least {} Mbit/s come through one connection with TLS", speed * 8 / 1_000_000);
    if speed >= SLOW {
        return Finding::ok(NAME, found);
    }
    Finding::warning(
        NAME,
        found,
        "use a link of 1 Gbit/s or more; a guest that writes faster than the link carries is held (docs/sizing.md)",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{Cpu, State};

    fn host(name: &str) -> Facts {
        let cpu = Cpu {
            vendor: "GenuineIntel".into(),
            model: "Xeon".into(),
            signature: "family 6, model 85, stepping 7".into(),
            microcode: "0x5003604".into(),
            flags: ["avx", "fpu", "vmx"].map(str::to_owned).to_vec(),
        };
        Facts {
            host: name.into(),
            release: "0.3.0".into(),
            kernel: "6.1.0".into(),
            cpu,
            kvm: "kvm_intel".into(),
            tsc_khz: Some(2_500_000),
            tsc_scales: false,
            write_us: Some(300),
            definitions: vec![defined("web", Some("one"))],
        }
    }

    fn defined(vm: &str, identity: Option<&str>) -> Defined {
        Defined { vm: vm.into(), arbiter: Some("file:/x".into()), identity: identity.map(str::to_owned) }
    }

    fn heard(ahead_ms: i64, round_trip_us: u64, speed: u64) -> Heard {
        Heard {
            check: serde_json::Value::Null,
            clock: Some(Apart { ahead_ms, give_or_take_ms: 3 }),
            round_trip: Some(Duration::from_micros(round_trip_us)),
            speed: Some(speed),
        }
    }

    #[test]
    fn two_like_hosts_are_fit() {
        let found = findings(&host("hosta"), &host("hostb"), &heard(-5, 120, 1_000_000_000));
        assert!(found.iter().all(|it| it.state == State::Ok && it.remedy.is_empty()), "{found:?}");
        for words in ["at most 8 ms apart", "0.12 ms", "8000 Mbit/s", "1 VM is defined on both", "kvm_intel"]
        {
            assert!(found.iter().any(|it| it.found.contains(words)), "{words}: {found:?}");
        }
        assert_eq!(found.len(), 12);
    }

    /// Each difference is found, as bad as it is, and has a remedy.
    #[test]
    fn each_difference_is_told_with_its_remedy() {
        let usual = heard(0, 100, 1_000_000_000);
        type Change = fn(&mut Facts);
        let changes: &[(&str, State, Change)] = &[
            ("release", State::Warning, |it| it.release = "0.2.0".into()),
            ("kernel", State::Warning, |it| it.kernel = "6.12.0".into()),
            ("processor", State::Error, |it| it.cpu.vendor = "AuthenticAMD".into()),
            ("processor", State::Warning, |it| it.cpu.signature = "family 6, model 106, stepping 6".into()),
            ("microcode", State::Warning, |it| it.cpu.microcode = "0x1".into()),
            ("features", State::Warning, |it| it.cpu.flags.push("avx512f".into())),
            ("KVM module", State::Error, |it| it.kvm = "kvm_pvm".into()),
            ("TSC", State::Error, |it| it.tsc_khz = Some(2_600_000)),
            ("storage", State::Warning, |it| it.write_us = Some(20_000)),
            ("arbiter", State::Error, |it| it.definitions = vec![defined("web", Some("two"))]),
            ("VMs", State::Warning, |it| it.definitions.push(defined("db", None))),
            ("VMs", State::Warning, |it| it.definitions.clear()),
        ];
        for (name, state, change) in changes {
            let mut there = host("hostb");
            change(&mut there);
            let mut found = findings(&host("hosta"), &there, &usual);
            found.retain(|it| it.state != State::Ok);
            assert_eq!(found.len(), 1, "{name}: {found:?}");
            assert_eq!((&*found[0].name, found[0].state), (*name, *state), "{found:?}");
            assert!(!found[0].remedy.is_empty() && !found[0].found.contains('\n'), "{found:?}");
        }
        for (name, bad) in [
            ("clocks", heard(2000, 100, 1_000_000_000)),
            ("link delay", heard(0, 5000, 1_000_000_000)),
            ("link speed", heard(0, 100, 12_000_000)),
        ] {
            let mut found = findings(&host("hosta"), &host("hostb"), &bad);
            found.retain(|it| it.state != State::Ok);
            assert_eq!((found.len(), &*found[0].name), (1, name), "{found:?}");
        }
    }

    #[test]
    fn what_is_not_known_is_left_out_and_what_scales_is_fine() {
        let nothing = Heard { clock: None, round_trip: None, speed: None, ..heard(0, 0, 0) };
        let unknown = Facts { host: "hostb".into(), ..Facts::default() };
        let found = findings(&host("hosta"), &unknown, &nothing);
        assert_eq!(found.iter().map(|it| &*it.name).collect::<Vec<_>>(), ["VMs"], "{found:?}");
        let scaling = |name: &str, khz: u32| Facts { tsc_scales: true, tsc_khz: Some(khz), ..host(name) };
        let found = findings(&scaling("hosta", 2_500_000), &scaling("hostb", 3_000_000), &nothing);
        assert!(found.iter().all(|it| it.state == State::Ok), "{found:?}");
        // A lone VM is nobody else's business.
        let mut alone = host("hosta");
        alone.definitions.push(Defined { arbiter: None, ..defined("alone", None) });
        let found = findings(&alone, &host("hostb"), &nothing);
        assert!(found.iter().all(|it| it.state == State::Ok), "{found:?}");
    }
}
