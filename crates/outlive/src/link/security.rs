//! What the links of this process are protected with.

use std::net::{IpAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use outlive_epoch::VmId;
use serde::{Deserialize, Serialize};

use crate::keys::{self, Certificate, LoadError, Loaded, Right, Vms};

/// The variable that allows `--insecure` on networks, for tests that have one to themselves.
const INSECURE_NETWORK: &str = "OUTLIVE_INSECURE_NETWORK";

/// What protects a link, for people and programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LinkKind {
    /// TLS 1.3 with certificates of both ends.
    #[serde(rename = "tls1.3")]
    Tls13,
    /// Nothing: whoever reaches the port can read and write everything.
    #[serde(rename = "plain")]
    Plain,
}

/// What links are made with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Security {
    /// Nothing protects them.
    Open,
    /// TLS, with the keys in this directory.
    Keys(PathBuf),
}

/// Why links cannot be made as the options say.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SecurityError {
    /// The keys cannot be used.
    #[error(transparent)]
    Keys(#[from] LoadError),
    /// They are over.
    #[error("{0}: no host would accept it; renew it with `outlive keys rotate` or `outlive keys issue`")]
    Expired(String),
    /// They are on this host's list of those that count no longer.
    #[error(
        "the certificate {serial} of {host} is revoked, by the list in {}: no host would accept it; make new keys with \
         `outlive keys issue --host {host}` on the host with the CA, and copy them there", .keys.display()
    )]
    Revoked {
        /// The host's name.
        host: String,
        /// The certificate's serial number.
        serial: String,
        /// The directory of keys.
        keys: PathBuf,
    },
    /// They give no right to hold what is to be held.
    #[error(
        "the certificate of host {host} {grant}, so this host can be no standby of {what}: make other keys for it with \
         `outlive keys issue --host {host}{option}`, on the host with the CA"
    )]
    HoldsNothing {
        /// Its name.
        host: String,
        /// What it may do.
        grant: String,
        /// What it may not hold.
        what: String,
        /// What the remedy needs.
        option: String,
    },
    /// An open link on a network.
    #[error(
        "--insecure would open the VM to everybody who reaches {0}: it is for addresses of this host alone; \
         `outlive keys init` makes keys"
    )]
    Network(String),
}

impl Security {
    /// By the options `--keys` and `--insecure`.
    pub(crate) fn of(keys: Option<&Path>, insecure: bool) -> Self {
        if insecure {
            return Self::Open;
        }
        Self::Keys(keys.unwrap_or(Path::new(keys::USUAL)).to_owned())
    }

    /// What it is, for people and programs.
    pub(crate) fn kind(&self) -> LinkKind {
        match self {
            Self::Open => LinkKind::Plain,
            Self::Keys(_) => LinkKind::Tls13,
        }
    }

    /// Checks that this host may hold copies of VMs, and of the one that it is kept for if that is named by its id.
    /// Of a VM's name no certificate knows anything.
    ///
    /// # Errors
    /// See [`SecurityError`].
    pub(crate) fn may_hold(&self, kept_for: Option<&str>) -> Result<(), SecurityError> {
        let Self::Keys(directory) = self else { return Ok(()) };
        let own = keys::load(directory)?.host;
        let vm: Option<VmId> = kept_for.and_then(|vm| vm.parse().ok());
        let denied = match vm {
            Some(vm) => !own.grant.allows(Right::Hold, &vm),
            None => own.grant.hold == Vms::NONE,
        };
        if !denied {
            return Ok(());
        }
        Err(SecurityError::HoldsNothing {
            host: own.name,
            grant: own.grant.to_string(),
            what: vm.map_or_else(|| "any VM".to_owned(), |vm| format!("VM {vm}")),
            option: vm.map_or_else(String::new, |vm| format!(" --vm {vm}")),
        })
    }

    /// Checks at the start of a process what the first link would find: that the keys can be used, or that links
    /// without keys do not leave this host.
    ///
    /// # Errors
    /// See [`SecurityError`].
    pub(crate) fn check<'a>(
        &self,
        mut addresses: impl Iterator<Item = &'a str>,
    ) -> Result<(), SecurityError> {
        match self {
            Self::Keys(directory) => {
                usable(directory)?;
                if let Some(complaint) = keys::misplaced(directory) {
                    tracing::warn!("{complaint}");
                }
            }
            Self::Open => {
                if let Some(address) = addresses.find(|address| !may_be_open(address)) {
                    return Err(SecurityError::Network(address.to_owned()));
                }
                tracing::warn!(
                    "INSECURE: the link is neither encrypted nor authenticated; whoever reaches it can read the VM's \
                     memory and run it elsewhere"
                );
            }
        }
        Ok(())
    }
}

/// Reads the keys in a directory, unless they are over or do not fit together.
///
/// # Errors
/// See [`SecurityError`].
pub(crate) fn usable(directory: &Path) -> Result<Loaded, SecurityError> {
    let keys = keys::fitting(directory)?;
    keys::loose(directory).iter().for_each(|complaint| tracing::warn!("{complaint}"));
    let now = SystemTime::now();
    if keys.revoked.has(&keys.host.serial) {
        let Certificate { name, serial, .. } = keys.host;
        return Err(SecurityError::Revoked { host: name, serial, keys: directory.to_owned() });
    }
    if let Some(complaint) = keys.host.complaint(now).filter(|_| keys.host.left(now).is_zero()) {
        return Err(SecurityError::Expired(complaint));
    }
    complain(&keys);
    Ok(keys)
}

/// Complains once a day about a certificate that is about to end.
pub(super) fn complain(keys: &Loaded) {
    static LAST: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now();
    // A clock may be set by a service that starts later, so nobody is refused for it.
    let early = keys.host.too_early(now).map(|it| format!("{it}; no link is made until then"));
    let ends = || {
        let complaint = keys.host.complaint(now)?;
        Some(format!("{complaint}: no new link is made then; renew it with `outlive keys rotate`"))
    };
    let Some(complaint) = early.or_else(ends) else { return };
    let day = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() / (24 * 3600);
    if LAST.swap(day, Ordering::Relaxed) != day {
        tracing::warn!("{complaint}");
    }
}

/// Whether what is said at an address (HOST:PORT) may go without keys: it does not leave this host, or a test has the
/// network to itself.
pub(crate) fn may_be_open(address: &str) -> bool {
    std::env::var_os(INSECURE_NETWORK).is_some_and(|it| it == "1") || stays_here(address)
}

/// Whether an address (HOST:PORT) can be reached from this host alone.
fn stays_here(address: &str) -> bool {
    let loopback = |ip: IpAddr| ip.to_canonical().is_loopback();
    address.to_socket_addrs().is_ok_and(|all| {
        let all: Vec<_> = all.collect();
        !all.is_empty() && all.iter().all(|it| loopback(it.ip()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_link_does_not_leave_the_host() {
        for here in ["127.0.0.1:7000", "[::1]:7000", "localhost:7000", "127.1.2.3:1"] {
            assert!(stays_here(here), "{here}");
        }
        for away in ["0.0.0.0:7000", "[::]:7000", "10.0.0.1:7000", "192.0.2.1:1", "no.such.host.invalid:7000"]
        {
            assert!(!stays_here(away), "{away}");
        }
    }
}
