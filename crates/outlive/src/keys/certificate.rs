//! What a certificate says.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate, X509Name};

use super::grant::Grant;

/// A certificate of a host, of an operator or of a CA, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// The host or operator that it belongs to; for a CA its name.
    pub name: String,
    /// The name of the CA that made it.
    pub ca: String,
    /// What it allows.
    pub grant: Grant,
    /// The serial number, as hexadecimal digits.
    pub serial: String,
    /// From when on it counts.
    pub from: SystemTime,
    /// Until when.
    pub until: SystemTime,
}

/// Why a certificate cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// It is none.
    #[error("it is not a certificate")]
    Malformed,
    /// It belongs to no host.
    #[error("it names no host")]
    NoHost,
}

/// The public key that a certificate is about, with its kind, as DER.
pub(super) fn public_key(der: &[u8]) -> Result<Vec<u8>, CertificateError> {
    let (_, read) = X509Certificate::from_der(der).map_err(|_| CertificateError::Malformed)?;
    Ok(read.public_key().raw.to_owned())
}

/// Whether a certificate is one of a CA.
pub(super) fn is_cas(der: &[u8]) -> bool {
    X509Certificate::from_der(der).is_ok_and(|(_, read)| read.is_ca())
}

/// A CA's name.
fn common_name(name: &X509Name<'_>) -> String {
    name.iter_common_name().find_map(|it| it.as_str().ok()).unwrap_or("a CA").to_owned()
}

impl Certificate {
    /// Reads a host's certificate. Whoever trusts what it says must have verified it.
    ///
    /// # Errors
    /// See [`CertificateError`].
    pub fn of_host(der: &[u8]) -> Result<Self, CertificateError> {
        let (_, read) = X509Certificate::from_der(der).map_err(|_| CertificateError::Malformed)?;
        let names = read.subject_alternative_name().map_err(|_| CertificateError::Malformed)?;
        let names = names.map_or(&[][..], |names| &names.value.general_names);
        let host = names.iter().find_map(|name| match name {
            GeneralName::DNSName(host) => Some((*host).to_owned()),
            _ => None,
        });
        let uris = names.iter().filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
        Ok(Self::read(&read, host.ok_or(CertificateError::NoHost)?, Grant::from_names(uris)))
    }

    /// Reads a CA's certificate.
    ///
    /// # Errors
    /// See [`CertificateError`].
    pub fn of_ca(der: &[u8]) -> Result<Self, CertificateError> {
        let (_, read) = X509Certificate::from_der(der).map_err(|_| CertificateError::Malformed)?;
        Ok(Self::read(&read, common_name(read.subject()), Grant::from_names([].into_iter())))
    }

    fn read(read: &X509Certificate<'_>, name: String, grant: Grant) -> Self {
        let at = |seconds: i64| UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
        let validity = read.validity();
        let serial = read.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect();
        let (from, until) = (at(validity.not_before.timestamp()), at(validity.not_after.timestamp()));
        let ca = common_name(read.issuer());
        Self { name, ca, grant, serial, from, until }
    }

    /// What is left of it; nothing once it has expired.
    pub fn left(&self, now: SystemTime) -> Duration {
        self.until.duration_since(now).unwrap_or_default()
    }

    /// The complaint about a certificate that does not count yet: this host's clock is wrong, or that of the host with the
    /// CA was.
    pub(crate) fn too_early(&self, now: SystemTime) -> Option<String> {
        let at = humantime::format_rfc3339_seconds;
        (now < self.from).then(|| {
            format!(
                "the certificate of {} counts from {} on, and this host's clock says {}: set the clock, or make new keys where \
                 the clock is right",
                self.name,
                at(self.from),
                at(now)
            )
        })
    }

    /// The complaint about a certificate that ends soon or has ended.
    pub(crate) fn complaint(&self, now: SystemTime) -> Option<String> {
        let left = self.left(now);
        let at = humantime::format_rfc3339_seconds(self.until);
        match left.as_secs() / (24 * 3600) {
            _ if left.is_zero() => Some(format!("the certificate of {} has EXPIRED at {at}", self.name)),
            days if left < super::SOON => {
                Some(format!("the certificate of {} expires in {days} days, at {at}", self.name))
            }
            _ => None,
        }
    }
}
