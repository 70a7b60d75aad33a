//! The kernel's version with what is known of it, processors, clock, limits.

use std::fs;
use std::thread::available_parallelism;

use nix::sys::resource::{Resource, getrlimit};

use super::Finding;

/// With fewer open files than this, a standby with a few connections reaches the limit.
const OPEN_FILES: u64 = 256;

pub(super) fn findings() -> Vec<Finding> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut findings = kernel(read("/proc/sys/kernel/osrelease").trim(), &read("/proc/version"));
    findings.push(processors(available_parallelism().map_or(1, usize::from)));
    findings.push(clock(
        read("/sys/devices/system/clocksource/clocksource0/current_clocksource").trim(),
        &read("/proc/cpuinfo"),
    ));
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        findings.push(open_files(soft, hard));
    }
    findings
}

/// Version, patch level and stable number: 6.1.84 is `(6, 1, 84)`.
type Version = (u32, u32, u32);

/// A kernel bug that matters to Outlive.
struct Fault {
    what: &'static str,
    remedy: &'static str,
    has: fn(Version) -> bool,
}

/// Upstream names the stable releases with the fix; distributions also fix older ones without saying so.
const FAULTS: [Fault; 2] = [
    Fault {
        what: "can lose a page that is written at the moment when dirty tracking starts (fixed in 5.19.10)",
        remedy: "use Linux 6.1 or newer, unless your distribution has fixed it",
        has: |version| version < (5, 19, 10),
    },
    Fault {
        what: "does not mark pages that emulated locked instructions write (fixed in 6.1.84, 6.7.12 and 6.9)",
        remedy: "use a newer kernel of the same series, unless your distribution has fixed it",
        has: |version| match (version.0, version.1) {
            (5, 15) => false,
            (6, 1) => version.2 < 84,
            (6, 6) => version.2 < 24,
            (6, 7) => version.2 < 12,
            (6, 8) => version.2 < 3,
            _ => version < (6, 9, 0),
        },
    },
];

/// `banner` is that of the build. Debian's release says `6.1.0-56-amd64` for many versions; the banner ends
/// with `#1 SMP PREEMPT_DYNAMIC Debian 6.1.192-2 (2026-10-30)`.
fn kernel(release: &str, banner: &str) -> Vec<Finding> {
    const NAME: &str = "kernel";
    let of_debian = banner.rsplit_once(" Debian ").and_then(|(_, version)| parse_version(version));
    let Some(version) = of_debian.max(parse_version(release)) else {
        let remedy = "compare it yourself: Outlive needs Linux 6.1 or newer";
        return vec![Finding::warning(NAME, format!("Linux with the unknown version '{release}'"), remedy)];
    };
    let faults = FAULTS.iter().filter(|fault| (fault.has)(version));
    let findings: Vec<Finding> = faults
        .map(|fault| Finding::warning(NAME, format!("Linux {release} {}", fault.what), fault.remedy))
        .collect();
    if findings.is_empty() { vec![Finding::ok(NAME, format!("Linux {release}"))] } else { findings }
}

/// Reads releases such as `6.18.44-custom` and `6.1.0-18-amd64`.
fn parse_version(release: &str) -> Option<Version> {
    let mut numbers = release.split(['.', '-', '+', '~']).map(str::parse);
    let (major, minor) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    Some((major, minor, numbers.next().and_then(Result::ok).unwrap_or(0)))
}

fn processors(count: usize) -> Finding {
    const NAME: &str = "processors";
    match count {
        1 => Finding::warning(
            NAME,
            "1: the guest and its checkpoints take turns",
            "give this machine two processors or more",
        ),
        _ => Finding::ok(NAME, format!("{count}")),
    }
}

fn clock(source: &str, cpuinfo: &str) -> Finding {
    const NAME: &str = "clock";
    let flags =
        cpuinfo.lines().find_map(|line| line.strip_prefix("flags")?.split_once(':')).map_or("", |it| it.1);
    let has = |flag: &str| flags.split_whitespace().any(|it| it == flag);
    if !has("constant_tsc") {
        return Finding::warning(
            NAME,
            "the TSC changes its speed with the processor",
            "use a processor with constant_tsc; otherwise guests have the wrong time",
        );
    }
    match source {
        "tsc" | "kvm-clock" | "hyperv_clocksource_tsc_page" => {
            Finding::ok(NAME, format!("constant TSC, {source}"))
        }
        other => Finding::warning(
            NAME,
            format!("the kernel's clock is '{other}', which is slow to read and a sign of a bad TSC"),
            "boot with clocksource=tsc if the TSC is good (see the kernel's log)",
        ),
    }
}

fn open_files(soft: u64, hard: u64) -> Finding {
    const NAME: &str = "open files";
    if soft >= OPEN_FILES {
        return Finding::ok(NAME, format!("up to {soft}"));
    }
    let remedy = if hard >= OPEN_FILES { "ulimit -n 1024" } else { "as root: ulimit -n 1024" };
    Finding::warning(NAME, format!("only up to {soft}"), remedy)
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn versions_of_all_kinds_are_read() {
        assert_eq!(parse_version("6.18.44-fc-v657"), Some((6, 18, 44)));
        assert_eq!(parse_version("6.1.0-18-amd64"), Some((6, 1, 0)));
        assert_eq!(parse_version("7.0-rc1"), Some((7, 0, 0)));
        assert_eq!(parse_version("5.10+"), Some((5, 10, 0)));
        assert_eq!(parse_version("linux"), None);
        assert_eq!(parse_version(""), None);
    }

    #[test]
    fn faults_are_told_for_the_kernels_that_have_them() {
        let faults =
            |release: &str| kernel(release, "").iter().filter(|it| it.state == State::Warning).count();
        assert_eq!([faults("5.10.0"), faults("5.15.150"), faults("5.19.10")], [2, 1, 1]);
        assert_eq!([faults("6.1.83"), faults("6.1.84"), faults("6.2.0"), faults("6.7.12")], [1, 0, 1, 0]);
        assert_eq!([faults("6.9.0"), faults("6.18.44-fc"), faults("10.0")], [0, 0, 0]);
        assert_eq!(faults("nonsense"), 1);
        let debian = |version: &str| {
            let banner = format!(
                "Linux version 6.1.0-56-amd64 (gcc-12 (Debian 12.2.0-14)) #1 SMP Debian {version} (2026-10-30)\n"
            );
            kernel("6.1.0-56-amd64", &banner).iter().filter(|it| it.state == State::Warning).count()
        };
        assert_eq!([debian("6.1.192-2"), debian("6.1.76-1")], [0, 1]);
    }

    #[test]
    fn clocks_and_limits_are_judged() {
        let constant = "flags\t\t: fpu tsc constant_tsc nonstop_tsc\n";
        assert_eq!(clock("tsc", constant).state, State::Ok);
        assert_eq!(clock("hpet", constant).state, State::Warning);
        assert_eq!(clock("tsc", "flags\t\t: fpu tsc\n").state, State::Warning);
        assert_eq!(open_files(1024, 4096).state, State::Ok);
        assert_eq!(open_files(64, 128).remedy, "as root: ulimit -n 1024");
        assert_eq!(processors(1).state, State::Warning);
        assert_eq!(processors(2).state, State::Ok);
    }
}
