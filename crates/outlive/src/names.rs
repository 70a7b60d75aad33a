//! Addresses of hosts by name.
//!
//! The last good answer of each name is kept and stands in when a lookup fails: name servers are often down when hosts
//! are, and a confined process cannot read a file in `/etc` that was replaced by another one (docs/sandbox.md).

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Mutex, PoisonError};

/// More names than any process asks for.
const REMEMBERED: usize = 256;

static LAST: Mutex<Option<HashMap<String, Vec<SocketAddr>>>> = Mutex::new(None);

/// The addresses of `HOST:PORT`, now or as they were last known in this process.
///
/// # Errors
/// The lookup fails, and never succeeded.
pub(crate) fn resolve(address: &str) -> io::Result<Vec<SocketAddr>> {
    let found = address.to_socket_addrs().map(Iterator::collect::<Vec<_>>);
    remembered(address, found)
}

/// The answer of a lookup.
pub(crate) fn found(address: &str, found: &[SocketAddr]) {
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    let last = last.get_or_insert_default();
    if !found.is_empty() && (last.len() < REMEMBERED || last.contains_key(address)) {
        last.insert(address.to_owned(), found.to_vec());
    }
}

/// The last good answer.
pub(crate) fn last(address: &str) -> Option<Vec<SocketAddr>> {
    let known = LAST.lock().unwrap_or_else(PoisonError::into_inner).as_ref()?.get(address)?.clone();
    tracing::debug!(address, "the name's last addresses are used");
    Some(known)
}

fn remembered(address: &str, answer: io::Result<Vec<SocketAddr>>) -> io::Result<Vec<SocketAddr>> {
    match answer {
        Ok(addresses) if !addresses.is_empty() => {
            found(address, &addresses);
            Ok(addresses)
        }
        failed => last(address).map_or(failed, Ok),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lookup_that_fails_has_the_last_answer() {
        let failed = || Err(io::Error::other("no name server"));
        let one = vec![SocketAddr::from(([10, 0, 0, 1], 7000))];
        let two = vec![SocketAddr::from(([10, 0, 0, 2], 7000))];
        assert!(remembered("hosta.test:7000", failed()).is_err());
        assert_eq!(remembered("hosta.test:7000", Ok(one.clone())).unwrap(), one);
        assert_eq!(remembered("hosta.test:7000", failed()).unwrap(), one);
        assert_eq!(remembered("hosta.test:7000", Ok(Vec::new())).unwrap(), one);
        assert_eq!(remembered("hosta.test:7000", Ok(two.clone())).unwrap(), two);
        assert_eq!(remembered("hosta.test:7000", failed()).unwrap(), two);
        assert!(remembered("hostb.test:7000", failed()).is_err());
        assert_eq!(resolve("127.0.0.1:7000").unwrap(), [SocketAddr::from(([127, 0, 0, 1], 7000))]);
    }
}
