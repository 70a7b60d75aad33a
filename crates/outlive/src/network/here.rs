//! Whether an address is one of this host, as far as that can be known without asking a name server.

use std::net::IpAddr;

use nix::ifaddrs::getifaddrs;
use nix::sys::socket::SockaddrStorage;

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

/// Whether an interface of this host has the address. (Whether it can be bound says nothing: `ip_nonlocal_bind` lets a
/// host bind every address, and hosts with keepalived or HAProxy have that.)
pub(crate) fn is_of_this_host(address: IpAddr) -> bool {
    if address.is_loopback() {
        return true;
    }
    let ip = |socket: &SockaddrStorage| {
        let v4 = socket.as_sockaddr_in().map(|it| IpAddr::from(it.ip()));
        v4.or_else(|| socket.as_sockaddr_in6().map(|it| IpAddr::from(it.ip())))
    };
    getifaddrs()
        .is_ok_and(|all| all.filter_map(|it| it.address.as_ref().and_then(ip)).any(|own| own == address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_hosts_if_an_interface_has_it() {
        assert!(is_of_this_host("127.0.0.1".parse().unwrap()) && is_of_this_host("::1".parse().unwrap()));
        assert!(
            !is_of_this_host("192.0.2.1".parse().unwrap())
                && !is_of_this_host("2001:db8::1".parse().unwrap())
        );
        let own = getifaddrs().unwrap().find_map(|it| {
            let ip = IpAddr::from(it.address?.as_sockaddr_in()?.ip());
            (!ip.is_loopback()).then_some(ip)
        });
        // A machine without a network has none.
        assert!(own.is_none_or(is_of_this_host));
    }

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
