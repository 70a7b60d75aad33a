//! Which host a command asks: `[NAME@]HOST[:PORT]`.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use crate::remote::PORT;

/// A host with a node. Its certificate must say the host's name: `NAME`, or `HOST` if that is no address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    name: Option<String>,
    host: String,
    port: u16,
}

impl Host {
    /// Where it is, for the system.
    pub(crate) fn address(&self) -> (&str, u16) {
        (&self.host, self.port)
    }

    /// Its port.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Whether the host of this name is meant. An address says nothing of a name; a short name and a long one may be those
    /// of one host.
    pub(crate) fn is(&self, name: &str) -> bool {
        let first = |name: &str| name.split('.').next().unwrap_or_default().to_ascii_lowercase();
        let is_short = |name: &str| !name.contains('.');
        let meant = match &self.name {
            Some(name) => name,
            None if self.host.parse::<IpAddr>().is_ok() => return true,
            None => &self.host,
        };
        let meant = meant.trim_end_matches('.');
        let alike = (is_short(meant) || is_short(name)) && first(meant) == first(name);
        alike || meant.eq_ignore_ascii_case(name)
    }
}

impl FromStr for Host {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!("'{text}' is no host: give a name or an address, and perhaps a port, as in hosta:{PORT}")
        };
        let (name, place) = match text.split_once('@') {
            Some((name, place)) => (Some(name.to_owned()), place),
            None => (None, text),
        };
        let (host, port) = match place.strip_prefix('[').map(|rest| rest.split_once(']')) {
            Some(Some((host, port))) if host.parse::<Ipv6Addr>().is_ok() => (host, port),
            Some(_) => return Err(wrong()),
            None if place.matches(':').count() > 1 => {
                return Err(format!("'{text}': write an IPv6 address in brackets, as in [::1]:{PORT}"));
            }
            None => place.split_at(place.find(':').unwrap_or(place.len())),
        };
        let port = match port.strip_prefix(':').map(str::parse) {
            None if port.is_empty() => PORT,
            Some(Ok(port @ 1..)) => port,
            _ => return Err(wrong()),
        };
        let empty = host.is_empty() || name.as_ref().is_some_and(String::is_empty);
        if empty || host.contains(|it: char| it.is_whitespace() || it.is_control() || "/@[]".contains(it)) {
            return Err(wrong());
        }
        Ok(Self { name, host: host.to_owned(), port })
    }
}

/// As it is given to `--host`, without the name of its certificate.
impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port, .. } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

/// Checks an address to listen at, as far as that is possible without asking anybody.
pub(crate) fn parse_listen(text: &str) -> Result<String, String> {
    let port =
        text.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port.parse::<u16>());
    match port {
        Some(Ok(_)) => Ok(text.to_owned()),
        _ => Err(format!("give ADDR:PORT, for example 0.0.0.0:{PORT}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_read_and_written() {
        for (text, shown) in [
            ("hosta", "hosta:7020"),
            ("hosta:1", "hosta:1"),
            ("10.0.0.1", "10.0.0.1:7020"),
            ("[::1]", "[::1]:7020"),
            ("[fe80::1]:65535", "[fe80::1]:65535"),
            ("hosta@10.0.0.1:7021", "10.0.0.1:7021"),
        ] {
            assert_eq!(text.parse::<Host>().unwrap().to_string(), shown, "{text}");
        }
        for bad in [
            "",
            ":7020",
            "hosta:",
            "hosta:0",
            "hosta:70000",
            "hosta:x",
            "::1",
            "[::1",
            "[hosta]:1",
            "[::1]7",
            "@hosta",
            "a@",
            "a@b@c",
            "host a",
            "https://hosta",
        ] {
            let why = bad.parse::<Host>().expect_err(bad);
            assert!(!why.contains('\n'), "{why}");
        }
        for good in ["0.0.0.0:7020", "[::]:7020", "hosta:0"] {
            parse_listen(good).unwrap();
        }
        for bad in ["7020", ":7020", "hosta", "hosta:", "hosta:70000"] {
            parse_listen(bad).expect_err(bad);
        }
    }

    #[test]
    fn only_the_host_that_is_meant_is_asked() {
        let is = |said: &str, name: &str| said.parse::<Host>().unwrap().is(name);
        for (said, name) in [
            ("hosta", "hosta"),
            ("HostA:1", "hosta"),
            ("hosta.example.org", "hosta"),
            ("hosta", "hosta.example.org"),
            ("hosta.example.org.", "hosta.example.org"),
            ("10.0.0.1", "hosta"),
            ("[::1]:1", "hosta"),
            ("hosta@10.0.0.1", "hosta"),
            ("hosta@tunnel.example.org", "hosta"),
        ] {
            assert!(is(said, name), "{said} {name}");
        }
        for (said, name) in [
            ("hosta", "hostb"),
            ("hosta", "host"),
            ("hosta.example.org", "hosta.example.com"),
            ("localhost", "hosta"),
            ("hosta@10.0.0.1", "hostb"),
            ("hosta@hostb", "hostb"),
        ] {
            assert!(!is(said, name), "{said} {name}");
        }
    }
}
