//! What a link and a bridge need of the kernel's settings.

use std::fs;

use super::Finding;

/// What the program asks for (`link/tcp.rs`); the kernel gives no more than its own limits.
const WANTED: u64 = 4 << 20;

pub(super) fn findings() -> Vec<Finding> {
    let read = |path: &str| fs::read_to_string(path).ok();
    buffers(read).into_iter().chain(filter(read)).collect()
}

/// A link has buffers of a fixed size, so one whose round trip takes long is as fast as they are large.
fn buffers(read: impl Fn(&str) -> Option<String>) -> Option<Finding> {
    const NAME: &str = "link buffers";
    let most = |which: &str| read(&format!("/proc/sys/net/core/{which}"))?.trim().parse::<u64>().ok();
    let least = most("rmem_max")?.min(most("wmem_max")?);
    if least >= WANTED {
        return Some(Finding::ok(NAME, format!("{} MiB each way", WANTED >> 20)));
    }
    // The kernel doubles what is asked for, and half of that is for its own book-keeping: a window is about the limit.
    let megabits = least * 8 / 1000;
    Some(Finding::warning(
        NAME,
        format!(
            "only {} KiB each way: a link with a round trip of 1 ms carries at most about {megabits} Mbit/s",
            least >> 10
        ),
        format!(
            "sysctl -w net.core.rmem_max={WANTED} net.core.wmem_max={WANTED}; lines for a file in /etc/sysctl.d keep it"
        ),
    ))
}

/// Frames of guests go through the host's packet filter: rules that are meant for the host drop them.
fn filter(read: impl Fn(&str) -> Option<String>) -> Option<Finding> {
    const NAME: &str = "bridges";
    let set = |which: &&str| {
        read(&format!("/proc/sys/net/bridge/bridge-nf-call-{which}")).is_some_and(|it| it.trim() != "0")
    };
    let through: Vec<_> = ["iptables", "ip6tables", "arptables"].into_iter().filter(set).collect();
    if through.is_empty() {
        return Some(Finding::ok(NAME, "frames of guests do not go through the host's packet filter"));
    }
    let settings: Vec<_> = through.iter().map(|it| format!("net.bridge.bridge-nf-call-{it}=0")).collect();
    Some(Finding::warning(
        NAME,
        format!(
            "frames of guests go through the host's {} (br_netfilter), which may drop them",
            through.join(", ")
        ),
        format!("sysctl -w {}, or allow the bridge in the rules", settings.join(" ")),
    ))
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn small_buffers_are_warned_of_with_the_speed_that_they_allow() {
        let with = |rmem: &'static str, wmem: &'static str| {
            buffers(move |path| Some(if path.contains("rmem") { rmem } else { wmem }.to_owned()))
        };
        assert_eq!(with("4194304\n", "16777216\n").unwrap().state, State::Ok);
        // Debian's, which are 1.7 Gbit/s at 1 ms.
        let usual = with("212992\n", "16777216\n").unwrap();
        assert_eq!(usual.state, State::Warning);
        assert!(usual.found.contains("208 KiB") && usual.found.contains("1703 Mbit/s"), "{}", usual.found);
        assert!(usual.remedy.contains("net.core.rmem_max=4194304"), "{}", usual.remedy);
        assert_eq!(buffers(|_| None), None);
    }

    #[test]
    fn a_bridge_that_is_filtered_is_warned_of() {
        assert_eq!(filter(|_| None).unwrap().state, State::Ok);
        assert_eq!(filter(|_| Some("0\n".into())).unwrap().state, State::Ok);
        let some =
            filter(|path| Some(if path.ends_with("-iptables") { "1\n" } else { "0\n" }.into())).unwrap();
        assert_eq!(some.state, State::Warning);
        assert!(
            some.remedy.starts_with("sysctl -w net.bridge.bridge-nf-call-iptables=0, "),
            "{}",
            some.remedy
        );
    }
}
