//! What can go wrong when the network is changed.

use std::io;

/// Why a change of the network failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket to the kernel could not be opened.
    #[error("cannot open a netlink socket to the kernel: {0}")]
    Open(#[source] io::Error),
    /// The socket failed in the middle of a request.
    #[error("cannot {what}: the netlink socket failed: {source}")]
    Socket {
        /// What was being done.
        what: String,
        /// What the socket said.
        source: io::Error,
    },
    /// The text cannot be the name of an interface.
    #[error(
        "'{name}' cannot be an interface name: 1 to 15 bytes, without '/', ':' and spaces, and not '.' or '..'"
    )]
    BadName {
        /// The name that was given.
        name: String,
    },
    /// There is no such interface in this network namespace.
    #[error(
        "no interface named {name}: cannot {what} (interfaces here: {}); make it first, or name another one",
        listed(.present)
    )]
    NoInterface {
        /// The name that was asked for.
        name: String,
        /// What was being done.
        what: String,
        /// The names that exist and could be meant.
        present: Vec<String>,
    },
    /// The interface exists already.
    #[error("cannot {what}: an interface of this name already exists; delete it or choose another name")]
    Exists {
        /// What was being done.
        what: String,
    },
    /// The process may not administer this network namespace.
    #[error("cannot {what}: no permission; run as root or with CAP_NET_ADMIN in this network namespace")]
    Permission {
        /// What was being done.
        what: String,
    },
    /// The kernel lacks the kind of interface that was asked for.
    #[error("cannot {what}: this kernel has no '{kind}' interfaces; load its module (modprobe {kind})")]
    NoSuchKind {
        /// What was being done.
        what: String,
        /// `bridge` or `veth`.
        kind: &'static str,
    },
    /// The named interface is no bridge where one is needed.
    #[error("cannot {what}: {name} is no bridge; make one (ip link add br0 type bridge) or name another one")]
    NotBridge {
        /// What was being done.
        what: String,
        /// The name that was given for the bridge.
        name: String,
    },
    /// The kernel refused for another reason.
    #[error("cannot {what}: {source}{}", detail(.message))]
    Refused {
        /// What was being done.
        what: String,
        /// The kernel's error number.
        source: io::Error,
        /// The kernel's explanation, often empty.
        message: String,
    },
    /// The kernel's answer is invalid.
    #[error("cannot {what}: the kernel's answer is invalid ({problem})")]
    Answer {
        /// What was being done.
        what: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

impl NetlinkError {
    /// The same without an interface that cannot be the one that was meant.
    pub(super) fn without(mut self, name: &str) -> Self {
        if let Self::NoInterface { present, .. } = &mut self {
            present.retain(|other| other != name);
        }
        self
    }
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { "none".to_string() } else { names.join(", ") }
}

fn detail(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" ({message})") }
}
