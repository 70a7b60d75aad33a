//! On which host an arbiter is. One that is lost together with a host of the VM cannot say then who goes on.

use crate::network::here;

/// Where the servers of an arbiter are, as the option names them: no name server is asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Site {
    /// `HOST:PORT` of each; none for an arbiter without servers.
    servers: Vec<String>,
    is_here: bool,
}

impl Site {
    /// That of an `--arbiter` option. Call it before the process is confined to the system calls of its role.
    pub(crate) fn of(arbiter: &str) -> Self {
        let servers = super::registry::servers(arbiter);
        let is_here = needs(&servers, servers.iter().filter(|server| here::is_here(server)).count());
        Self { servers, is_here }
    }

    /// Whether the arbiter is lost with this host.
    pub(crate) fn is_here(&self) -> bool {
        self.is_here
    }

    /// Whether it is lost with the host that another process of ours reaches at `HOST:PORT`.
    pub(crate) fn is_at(&self, other: &str) -> bool {
        let Some((other, _)) = here::split(other) else { return false };
        if here::address(other).is_some_and(|address| address.is_loopback()) {
            // It may be a tunnel's.
            return false;
        }
        let same = |server: &String| {
            here::split(server).is_some_and(|(server, _)| server.eq_ignore_ascii_case(other))
        };
        needs(&self.servers, self.servers.iter().filter(|server| same(server)).count())
    }
}

/// Whether an arbiter with these servers does not answer without so many of them: it takes more than half of those that
/// the option names. (A cluster may have others, but then the option should name them.)
fn needs(servers: &[String], lost: usize) -> bool {
    !servers.is_empty() && (servers.len() - lost) * 2 <= servers.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process;

    #[test]
    fn an_arbiter_is_on_a_host_if_it_has_no_majority_without_it() {
        let own = process::host_name();
        assert!(Site::of(&format!("outlive:{own}:7010?keys=/k")).is_here());
        assert!(Site::of(&format!("etcd:http://{own}:2379,http://{own}:2381/vms")).is_here());
        let members = |members: &[&str]| Site::of(&format!("etcd:{}", members.join(","))).is_here();
        let (here, there, third) =
            (format!("http://{own}:2379"), "http://192.0.2.9:2379", "http://192.0.2.8:2379");
        assert!(members(&[&here, there]), "one of two is no majority");
        assert!(!members(&[&here, there, third]));
        assert!(members(&[&here, &format!("http://{own}:2381"), third]));
        for elsewhere in ["outlive:192.0.2.9:7010", "file:/srv/arbiter", "manual", "outlive:127.0.0.1:7010"] {
            assert!(!Site::of(elsewhere).is_here(), "{elsewhere}");
        }
        assert!(Site::of("outlive:192.0.2.9:7010").is_at("192.0.2.9:40000"));
        assert!(Site::of("outlive:[2001:db8::9]:7010").is_at("[2001:db8::9]:40000"));
        assert!(Site::of("etcd:https://hostb:2379?ca=/ca").is_at("HostB:7000"));
        assert!(Site::of("etcd:https://hostb:2379,https://hostc:2379?ca=/ca").is_at("hostb:7000"));
        let three = Site::of("etcd:https://hosta:2379,https://hostb:2379,https://hostc:2379?ca=/ca");
        assert!(!three.is_at("hostb:7000"));
        for elsewhere in ["file:/srv/arbiter", "manual", "outlive:192.0.2.8:7010", "outlive:127.0.0.1:7010"] {
            assert!(!Site::of(elsewhere).is_at("192.0.2.9:1"), "{elsewhere}");
            assert!(!Site::of(elsewhere).is_at("127.0.0.1:1"), "{elsewhere}");
        }
    }
}
