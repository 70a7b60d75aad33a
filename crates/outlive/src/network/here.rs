//! Whether an address is one of this host, as far as that can be known without asking a name server.

use std::net::{IpAddr, UdpSocket};

use crate::process;

/// Whether `HOST:PORT` is one of this host. A loopback address may be a tunnel's.
pub(crate) fn is_here(place: &str) -> bool {
    let Some((host, _)) = split(place) else { return false };
    match address(host) {
        Some(address) => !address.is_loopback() && is_of_this_host(address),
        None => host.eq_ignore_ascii_case(&process::host_name()),
    }
}

/// Host, without brackets, and port.
pub(crate) fn split(text: &str) -> Option<(&str, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let host = host.strip_prefix('[').and_then(|it| it.strip_suffix(']')).unwrap_or(host);
    Some((host, port.parse().ok()?))
}

/// The address, if the host is written as one.
pub(crate) fn address(host: &str) -> Option<IpAddr> {
    let host = if host == "localhost" { "127.0.0.1" } else { host };
    host.parse().ok()
}

/// Only an address of its own is one that a host can bind.
pub(crate) fn is_of_this_host(address: IpAddr) -> bool {
    UdpSocket::bind((address, 0)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_knows_its_own_name_and_leaves_tunnels_alone() {
        let own = process::host_name();
        assert!(is_here(&format!("{own}:7000")) && is_here(&format!("{}:1", own.to_uppercase())));
        for other in
            ["127.0.0.1:7000", "localhost:7000", "[::1]:7000", "192.0.2.1:7000", "no.such.host:7000", "x"]
        {
            assert!(!is_here(other), "{other}");
        }
    }
}
