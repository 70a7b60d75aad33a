//! What two hosts are compared by.

use std::fs;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};
use outlive_machine::Host;
use serde::{Deserialize, Serialize};

/// A host, as far as another one must be like it. What is empty is not known; a later release may say more.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// Its name.
    pub host: String,
    /// The release of Outlive.
    pub release: String,
    /// The kernel's release.
    pub kernel: String,
    /// The processor.
    pub cpu: Cpu,
    /// The KVM module that is loaded.
    pub kvm: String,
    /// How fast a guest's TSC is.
    pub tsc_khz: Option<u32>,
    /// Whether a guest may have a TSC of another speed.
    pub tsc_scales: bool,
    /// How long the storage takes to confirm a write, in microseconds.
    pub write_us: Option<u64>,
    /// The VMs that are defined here.
    pub definitions: Vec<Defined>,
}

/// A processor, as the kernel describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cpu {
    /// As CPUID names it.
    pub vendor: String,
    /// For people.
    pub model: String,
    /// Family, model and stepping.
    pub signature: String,
    /// Its microcode's revision.
    pub microcode: String,
    /// Its features.
    pub flags: Vec<String>,
}

/// A VM that a host has a definition of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Defined {
    /// Its name.
    pub vm: String,
    /// Its arbiter, as the definition names it.
    pub arbiter: Option<String>,
    /// What the arbiter says that it is.
    pub identity: Option<String>,
}

/// This host.
pub(super) fn here(host: String) -> Facts {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let kvm = Host::open().ok();
    let kvm = kvm.as_ref().map(Host::kvm);
    Facts {
        host,
        release: env!("CARGO_PKG_VERSION").into(),
        kernel: read("/proc/sys/kernel/osrelease").trim().into(),
        cpu: cpu(&read("/proc/cpuinfo")),
        kvm: module(|name| Path::new("/sys/module").join(name).exists()),
        tsc_khz: kvm.and_then(tsc_khz),
        tsc_scales: kvm.is_some_and(|kvm| kvm.check_extension(Cap::TscControl)),
        write_us: None,
        definitions: Vec::new(),
    }
}

fn module(loaded: impl Fn(&str) -> bool) -> String {
    ["kvm_pvm", "kvm_intel", "kvm_amd"].into_iter().find(|name| loaded(name)).unwrap_or_default().into()
}

/// As a new VM has it.
fn tsc_khz(kvm: &Kvm) -> Option<u32> {
    let vm = kvm.create_vm().ok()?;
    vm.create_vcpu(0).ok()?.get_tsc_khz().ok()
}

/// The first processor: all of a host are alike.
fn cpu(cpuinfo: &str) -> Cpu {
    let value = |key: &str| {
        let of = |line: &str| {
            let (name, value) = line.split_once(':')?;
            (name.trim() == key).then(|| value.trim().to_owned())
        };
        cpuinfo.lines().find_map(of).unwrap_or_default()
    };
    let mut flags: Vec<_> = value("flags").split_whitespace().map(str::to_owned).collect();
    flags.sort_unstable();
    let signature =
        format!("family {}, model {}, stepping {}", value("cpu family"), value("model"), value("stepping"));
    Cpu {
        vendor: value("vendor_id"),
        model: value("model name"),
        signature,
        microcode: value("microcode"),
        flags,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_is_read() {
        let text = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 85\nmodel name\t: Xeon\n\
                    stepping\t: 7\nmicrocode\t: 0x5003604\nflags\t\t: vmx fpu\n\nprocessor\t: 1\nmodel\t\t: 86\n";
        let read = cpu(text);
        assert_eq!(
            (read.vendor.as_str(), read.signature.as_str()),
            ("GenuineIntel", "family 6, model 85, stepping 7")
        );
        assert_eq!(
            (read.microcode.as_str(), read.flags),
            ("0x5003604", vec!["fpu".to_owned(), "vmx".into()])
        );
        assert_eq!(cpu("").vendor, "");
    }

    #[test]
    fn a_later_release_may_say_more_and_an_earlier_one_less() {
        let read: Facts = serde_json::from_str(r#"{"host":"b","new":1,"cpu":{"vendor":"x"}}"#).unwrap();
        assert_eq!((read.host.as_str(), read.cpu.vendor.as_str(), read.tsc_khz), ("b", "x", None));
    }

    #[test]
    fn this_host_says_what_it_is() {
        let facts = here("hosta".into());
        assert!(!facts.kernel.is_empty() && !facts.cpu.vendor.is_empty(), "{facts:?}");
        if Host::open().is_ok() {
            assert!(facts.tsc_khz.is_some_and(|khz| khz > 100_000), "{facts:?}");
        }
    }
}
