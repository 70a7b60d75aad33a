//! KVM: whether it exists, may be used and can do what Outlive needs, and which kind it is.

use std::fs;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};
use outlive_machine::{Host, HostError};

use super::Finding;

/// What Outlive can do without, at a price.
const USEFUL: [(Cap, &str, &str); 3] = [
    (
        Cap::TscControl,
        "the TSC of a guest cannot be scaled",
        "use hosts with equal TSC frequency (otherwise a standby refuses the VM)",
    ),
    (Cap::Xsave2, "KVM_CAP_XSAVE2 is missing", "use Linux 5.17 or newer for guests with AMX"),
    (
        Cap::GetTscKhz,
        "the TSC frequency cannot be read",
        "use a newer kernel; otherwise guests cannot tell the time",
    ),
];

/// The findings about KVM. If something is missing, a trial VM makes no sense.
pub(super) fn findings() -> Vec<Finding> {
    let host = match Host::open() {
        Ok(host) => host,
        Err(error) => return vec![cannot_open(&error)],
    };
    let needed =
        "/dev/kvm opens and has interrupt chip, irqfd, ioeventfd, immediate exit, register sync and clock";
    let mut findings = vec![Finding::ok("KVM", needed), module()];
    findings.extend(useful(host.kvm()));
    findings
}

fn cannot_open(error: &HostError) -> Finding {
    let text = error.to_string();
    // The error's text ends with its remedy.
    let (found, remedy) = text.split_once(": ").unwrap_or((&text, "see the error"));
    match error {
        HostError::Missing => Finding::error("KVM", found, remedy_for_no_device()),
        _ => Finding::error("KVM", found, remedy),
    }
}

/// Why there is no `/dev/kvm`: no processor feature, or no module.
fn remedy_for_no_device() -> &'static str {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    match virtualisation_of(&cpuinfo) {
        Some("vmx") => "load the module: modprobe kvm_intel",
        Some(_) => "load the module: modprobe kvm_amd",
        None => {
            "enable virtualisation (VT-x, AMD-V) in the firmware; in a virtual machine, enable nested \
             virtualisation on its host; in a container, pass /dev/kvm to it"
        }
    }
}

/// The processor's virtualisation feature.
fn virtualisation_of(cpuinfo: &str) -> Option<&'static str> {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")?.split_once(':'))?.1;
    ["vmx", "svm"].into_iter().find(|feature| flags.split_whitespace().any(|flag| flag == *feature))
}

/// Which KVM module is loaded, and what that means.
fn module() -> Finding {
    const NAME: &str = "KVM module";
    let parameter = |path: &str| fs::read_to_string(Path::new("/sys/module").join(path)).unwrap_or_default();
    let is_on = |path: &str| matches!(parameter(path).trim(), "Y" | "1");
    let loaded = |module: &str| Path::new("/sys/module").join(module).exists();
    if loaded("kvm_pvm") {
        // No defect of the machine: this is the best that it can do without hardware support.
        return Finding::ok(
            NAME,
            "kvm_pvm: no hardware virtualisation; the built-in guest runs, stock Linux kernels may not: KVM emulates what a \
             kernel does, slowly and not all of it",
        );
    }
    for (module, paging, what) in [
        ("kvm_intel", "kvm_intel/parameters/ept", "Intel VT-x"),
        ("kvm_amd", "kvm_amd/parameters/npt", "AMD-V"),
    ] {
        if loaded(module) {
            return if is_on(paging) {
                Finding::ok(NAME, format!("{module}: {what} with nested paging"))
            } else {
                Finding::warning(
                    NAME,
                    format!("{module}: {what} without nested paging, so write faults are slow"),
                    format!("load {module} with nested paging, if the processor has it"),
                )
            };
        }
    }
    Finding::warning(
        NAME,
        "not kvm_intel, kvm_amd or kvm_pvm: Outlive was not tested on it",
        "see whether the trial below succeeds; compare the demo's result with that of a known machine",
    )
}

fn useful(kvm: &Kvm) -> Vec<Finding> {
    let lacks = |(cap, found, remedy): (Cap, &str, &str)| {
        (!kvm.check_extension(cap)).then(|| Finding::warning("KVM features", found, remedy))
    };
    USEFUL.into_iter().filter_map(lacks).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_read_from_its_flags() {
        let of =
            |flags: &str| virtualisation_of(&format!("processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: vmx\n"));
        assert_eq!(of("fpu vme svm sse"), Some("svm"));
        assert_eq!(of("fpu vmx"), Some("vmx"));
        assert_eq!(of("fpu vmxoff nosvm"), None);
        assert_eq!(virtualisation_of(""), None);
    }

    #[test]
    fn errors_are_split_into_finding_and_remedy() {
        let finding = cannot_open(&HostError::Permission(Some("virt".into())));
        assert_eq!(finding.found, "no permission to open /dev/kvm");
        let remedy = "run as root or join its group (usermod -aG virt ";
        assert!(finding.remedy.starts_with(remedy), "{}", finding.remedy);
        // A group that may not use the device helps nobody.
        let finding = cannot_open(&HostError::Permission(None));
        assert!(finding.remedy.starts_with("run as root or let a group in"), "{}", finding.remedy);
        let finding = cannot_open(&HostError::Missing);
        assert_eq!(finding.found, "/dev/kvm does not exist");
        assert!(!finding.remedy.is_empty());
        let finding = cannot_open(&HostError::Capability("KVM_CAP_IRQFD"));
        assert_eq!(
            (finding.found.as_str(), finding.remedy.as_str()),
            ("this kernel's KVM lacks KVM_CAP_IRQFD", "use Linux 5.10 or newer")
        );
    }
}
