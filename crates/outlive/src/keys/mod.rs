//! Keys of the links and of the node's API: a private CA, certificates of hosts and operators, and `outlive keys`.
//!
//! ```text
//! ca.rs            where the CA's own files are
//! certificate.rs   what a certificate says: which host or operator, until when, what it may do
//! grant.rs         those rights, and how they are written in a certificate
//! files.rs         writes files and directories: whole, durably, and for their owner alone
//! load.rs          what a link needs of a directory of keys, and who may read the directory
//! make.rs          makes directories, certificates and CAs
//! sign.rs          a CA whose private key is here, and what it signs
//! revoked.rs       the list of certificates that count no longer
//! command.rs       `outlive keys`
//! ```
//!
//! A directory of keys:
//!
//! ```text
//! ca.crt           the CAs whose certificates this host accepts; two while one replaces the other
//! host.pem         the private key of this host and its certificate: one file, so that it changes at once
//! revoked          certificates that count no longer, one serial number a line
//! revoked.local    those of them that were revoked on this host: no copy replaces it
//! ```
//!
//! A directory beside it, `keys-ca` for `keys`, only where certificates are made:
//!
//! ```text
//! ca.pem           the private key of the CA and its certificate
//! issued/          the certificates that were made here
//! ```
//!
//! Every link reads the directory anew, so new files apply to the next link and an old one goes on.

mod ca;
mod certificate;
mod command;
mod files;
#[cfg(test)]
mod golden;
mod grant;
mod load;
mod make;
#[cfg(test)]
mod mistakes;
mod revoked;
mod sign;

#[cfg(test)]
mod tests;

pub(crate) use ca::{key as ca_key, misplaced};
pub use certificate::{Certificate, CertificateError};
pub use command::command;
pub use files::WriteError;
pub use grant::{Grant, Right, Vms};
pub use load::{LoadError, Loaded, fitting, load, loose};
pub use make::{MakeError, Order, forget_old_cas, init, issue, revoke, rotate, rotate_ca};
pub use revoked::Revoked;

/// Where keys are if `--keys` does not say it.
pub const USUAL: &str = "/etc/outlive/keys";

/// The file names; see the module.
const CAS: &str = "ca.crt";
const CA_KEY: &str = "ca.pem";
const HOST: &str = "host.pem";
const REVOKED: &str = "revoked";
const REVOKED_HERE: &str = "revoked.local";
const ISSUED: &str = "issued";

/// How long before its end a certificate is complained about.
pub const SOON: std::time::Duration = std::time::Duration::from_secs(30 * 24 * 3600);
