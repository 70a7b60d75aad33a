//! What a VM's network needs: tap interfaces and the right to make them.

use std::fs::{self, File};
use std::io;

use super::Finding;

/// Bits of `CapEff` in `/proc/PID/status` (`linux/capability.h`).
const CAP_NET_ADMIN: u64 = 1 << 12;

pub(super) fn findings() -> Vec<Finding> {
    vec![tun(), rights()]
}

fn tun() -> Finding {
    const NAME: &str = "tap devices";
    match File::options().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Finding::ok(NAME, "/dev/net/tun opens"),
        Err(error) => {
            let (found, remedy) = match error.kind() {
                io::ErrorKind::PermissionDenied => (
                    "no permission to open /dev/net/tun".to_string(),
                    "run as root, or: chmod 666 /dev/net/tun",
                ),
                io::ErrorKind::NotFound => (
                    "/dev/net/tun does not exist".to_string(),
                    "load the module: modprobe tun; in a container pass /dev/net/tun to it",
                ),
                // The node can exist without the module.
                _ => (format!("cannot open /dev/net/tun: {error}"), "load the module: modprobe tun"),
            };
            Finding::error(NAME, found, remedy)
        }
    }
}

fn rights() -> Finding {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let may_administer = effective_capabilities(&status).is_some_and(|bits| bits & CAP_NET_ADMIN != 0);
    let forbidding = forbidding_setting(|path| fs::read_to_string(path).ok());
    judge_rights(may_administer, forbidding)
}

fn judge_rights(may_administer: bool, forbidding: Option<&'static str>) -> Finding {
    const NAME: &str = "network rights";
    match (may_administer, forbidding) {
        (true, _) => Finding::ok(NAME, "this user may make taps and bridges"),
        (false, None) => Finding::warning(
            NAME,
            "this user may not make taps and bridges in the host's network, but may make user namespaces \
             for the demo",
            "run 'outlive run' and 'outlive standby' as root or with CAP_NET_ADMIN; the demo makes its own \
             network",
        ),
        (false, Some(setting)) => Finding::error(
            NAME,
            "this user may make neither taps and bridges nor user namespaces",
            format!("run as root or with CAP_NET_ADMIN, or allow user namespaces: sysctl -w {setting}"),
        ),
    }
}

fn effective_capabilities(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// The setting that forbids users to make user namespaces, with the value that allows it.
fn forbidding_setting(read: impl Fn(&str) -> Option<String>) -> Option<&'static str> {
    let is = |path: &str, value: &str| read(path).is_some_and(|text| text.trim() == value);
    if is("/proc/sys/kernel/unprivileged_userns_clone", "0") {
        Some("kernel.unprivileged_userns_clone=1")
    } else if is("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1") {
        Some("kernel.apparmor_restrict_unprivileged_userns=0")
    } else if is("/proc/sys/user/max_user_namespaces", "0") {
        Some("user.max_user_namespaces=10000")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn capabilities_are_read_from_the_status_file() {
        let status = "Name:\toutlive\nCapPrm:\t0000000000000000\nCapEff:\t0000000000001000\nCapBnd:\tff\n";
        assert_eq!(effective_capabilities(status), Some(CAP_NET_ADMIN));
        assert_eq!(effective_capabilities(""), None);
    }

    #[test]
    fn without_any_rights_the_setting_is_named() {
        assert_eq!(judge_rights(true, Some("x=1")).state, State::Ok);
        assert_eq!(judge_rights(false, None).state, State::Warning);
        let finding =
            judge_rights(false, forbidding_setting(|path| path.ends_with("clone").then(|| "0\n".into())));
        assert_eq!(finding.state, State::Error);
        assert!(
            finding.remedy.ends_with("sysctl -w kernel.unprivileged_userns_clone=1"),
            "{}",
            finding.remedy
        );
        assert_eq!(forbidding_setting(|_| Some("1000".into())), None);
        assert_eq!(forbidding_setting(|_| None), None);
    }
}
