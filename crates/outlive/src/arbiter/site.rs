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
        let is_here = !servers.is_empty() && servers.iter().all(|server| here::is_here(server));
        Self { servers, is_here }
    }

    /// Whether every server is on this host.
    pub(crate) fn is_here(&self) -> bool {
        self.is_here
    }

    /// Whether every server is on the host that another process of ours reaches at `HOST:PORT`.
    pub(crate) fn is_at(&self, other: &str) -> bool {
        let Some((other, _)) = here::split(other) else { return false };
        if here::address(other).is_some_and(|address| address.is_loopback()) {
            // It may be a tunnel's.
            return false;
        }
        let same = |server: &String| {
            here::split(server).is_some_and(|(server, _)| server.eq_ignore_ascii_case(other))
        };
        !self.servers.is_empty() && self.servers.iter().all(same)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process;

    #[test]
    fn an_arbiter_is_on_a_host_only_if_all_its_servers_are() {
        let own = process::host_name();
        assert!(Site::of(&format!("outlive:{own}:7010?keys=/k")).is_here());
        assert!(Site::of(&format!("etcd:http://{own}:2379,http://{own}:2381/vms")).is_here());
        assert!(!Site::of(&format!("etcd:http://{own}:2379,http://192.0.2.9:2379")).is_here());
        for elsewhere in ["outlive:192.0.2.9:7010", "file:/srv/arbiter", "manual", "outlive:127.0.0.1:7010"] {
            assert!(!Site::of(elsewhere).is_here(), "{elsewhere}");
        }
        assert!(Site::of("outlive:192.0.2.9:7010").is_at("192.0.2.9:40000"));
        assert!(Site::of("outlive:[2001:db8::9]:7010").is_at("[2001:db8::9]:40000"));
        assert!(Site::of("etcd:https://hostb:2379?ca=/ca").is_at("HostB:7000"));
        assert!(!Site::of("etcd:https://hostb:2379,https://hostc:2379?ca=/ca").is_at("hostb:7000"));
        for elsewhere in ["file:/srv/arbiter", "manual", "outlive:192.0.2.8:7010", "outlive:127.0.0.1:7010"] {
            assert!(!Site::of(elsewhere).is_at("192.0.2.9:1"), "{elsewhere}");
            assert!(!Site::of(elsewhere).is_at("127.0.0.1:1"), "{elsewhere}");
        }
    }
}
