//! Clients and nodes of other hosts: how they know each other is the program's, which has the keys and judges
//! certificates; what a certificate lets somebody do here is this crate's.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::{ClientConfig, ServerConfig};

/// The port of the API where none is said.
pub const PORT: u16 = 7020;

/// Opens the keys in a directory, or in the usual one. Nothing is read before they are used.
pub type OpenKeys = fn(Option<&Path>) -> Arc<dyn Keys>;

/// Keys of this host or of an operator, and the judgement of what others show. Each call reads the files anew, so new keys and
/// revocations count at once, and may wait for the disk. Each error is a line with its remedy.
pub trait Keys: fmt::Debug + Send + Sync {
    /// Why a node with these keys lets nobody in, or soon will not.
    fn complaint(&self) -> Option<String>;

    /// Prepares the next connection of a client to a node.
    ///
    /// # Errors
    /// The keys cannot be used.
    fn serve(&self) -> Result<Serve, String>;

    /// Whether what a client has shown still counts.
    ///
    /// # Errors
    /// It does not; where that cannot be said, it does.
    fn counts(&self, shown: &[CertificateDer<'static>]) -> Result<(), String>;

    /// Prepares the next connection to a node.
    ///
    /// # Errors
    /// The keys cannot be used.
    fn dial(&self) -> Result<Dial, String>;
}

/// Is told how a handshake has ended, and says who the other end is, or why it is refused.
pub type Judge<T> = Box<dyn FnOnce(io::Result<()>) -> Result<T, String> + Send>;

/// The node's end of one connection.
pub struct Serve {
    /// TLS.
    pub config: Arc<ServerConfig>,
    /// Who comes.
    pub judge: Judge<Visitor>,
}

/// The client's end of one connection.
pub struct Dial {
    /// TLS.
    pub config: Arc<ClientConfig>,
    /// Who is there.
    pub judge: Judge<Peer>,
}

/// What somebody may do at the API. Each includes the ones before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Nothing.
    Nothing,
    /// Look at everything.
    Read,
    /// Have a VM moved to its standby.
    HandOver,
    /// Everything.
    Everything,
}

impl Access {
    /// For people: what somebody with it may do.
    pub(crate) fn allows(self) -> &'static str {
        match self {
            Self::Nothing => "nothing at a node",
            Self::Read => "look at a node, and no more",
            Self::HandOver => "look at a node and hand VMs over, and no more",
            Self::Everything => "everything at a node",
        }
    }
}

/// A client that has shown a certificate that counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Visitor {
    /// For people: `host hostb`, `operator alice`.
    pub name: String,
    /// What it may do.
    pub access: Access,
}

/// A node that has shown a certificate that counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The name in the certificate.
    pub name: String,
    /// It is a host of VMs, and no arbiter or operator.
    pub is_host: bool,
}
