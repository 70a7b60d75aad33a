//! A CA whose private key is here, and what it signs.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, date_time_ymd,
};

use super::certificate::{self, Certificate};
use super::load::{self, LoadError};
use super::make::{MakeError, Order};
use super::{CA_KEY, CAS, ca};
use crate::process;

/// How long a CA counts.
const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How long before its making a certificate counts: clocks of hosts differ.
const SKEW: Duration = Duration::from_secs(3600);

/// A CA whose private key is here.
pub(super) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    /// Its certificate.
    pub(super) pem: String,
}

/// A new key with a certificate.
pub(super) struct Made {
    /// The private key, as PEM.
    pub(super) key: String,
    /// The certificate, as PEM.
    pub(super) certificate: String,
    /// What it says.
    pub(super) about: Certificate,
}

impl Ca {
    /// What its certificate says.
    pub(super) fn about(&self) -> Result<Certificate, MakeError> {
        let der = load::certificates(Path::new(CA_KEY), self.pem.as_bytes())?;
        Ok(Certificate::of_ca(&der[0])?)
    }

    /// Refuses to sign at a time when it does not count: then a clock is wrong, or was.
    pub(super) fn in_time(&self, now: SystemTime) -> Result<(), MakeError> {
        let about = self.about()?;
        let told = humantime::format_rfc3339_seconds;
        if now < about.from {
            return Err(MakeError::TooEarly {
                now: told(now).to_string(),
                ca: about.name,
                from: told(about.from).to_string(),
            });
        }
        if now > about.until {
            return Err(MakeError::CaOver {
                now: told(now).to_string(),
                ca: about.name,
                until: told(about.until).to_string(),
            });
        }
        Ok(())
    }

    /// Its private key and its certificate, as PEM.
    pub(super) fn whole(&self) -> String {
        format!("{}{}", self.issuer.key().serialize_pem(), self.pem)
    }

    /// Makes a key and a certificate. Whoever orders it has looked at the name.
    pub(super) fn make(&self, order: &Order) -> Result<Made, MakeError> {
        self.in_time(SystemTime::now())?;
        let name = order.host.as_str();
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![name.to_owned()])?;
        for right in order.grant.to_names() {
            params.subject_alt_names.push(SanType::URI(right.try_into()?));
        }
        params.distinguished_name = named(name);
        params.serial_number = Some(serial()?);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // A host is a server where it waits and a client where it has the VM. Nothing answers with an operator's.
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if !order.grant.is_operators() {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        params.use_authority_key_identifier_extension = true;
        set_span(&mut params, order.life);
        let certificate = params.signed_by(&key, &self.issuer)?;
        let about = Certificate::of_host(certificate.der())?;
        Ok(Made { key: key.serialize_pem(), certificate: certificate.pem(), about })
    }
}

/// Makes a CA.
pub(super) fn new_ca(host: &str) -> Result<Ca, MakeError> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    let number = serial()?;
    let short: String = number.to_bytes().iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    params.distinguished_name = named(&format!("Outlive CA {short} of {host}"));
    params.serial_number = Some(number);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_span(&mut params, CA_LIFE);
    let certificate = params.self_signed(&key)?;
    Ok(Ca { issuer: Issuer::new(params, key), pem: certificate.pem() })
}

/// The CA whose key belongs to a directory of keys, if certificates of it count there.
pub(super) fn open_ca(directory: &Path) -> Result<Ca, MakeError> {
    let place = ca::found(directory);
    let file = place.join(CA_KEY);
    if !ca::may_be_at(&file) {
        return Err(MakeError::NoCa(file));
    }
    load::closed(&place, "700")?;
    let pem = load::secret(&file)?;
    let certificate = load::certificates(&file, &pem)?.swap_remove(0);
    let pem = String::from_utf8_lossy(&pem).into_owned();
    let key = KeyPair::from_pem(&pem).map_err(|_| LoadError::damaged(&file, "has no private key"))?;
    if certificate::public_key(&certificate).ok() != Some(key.subject_public_key_info()) {
        return Err(
            LoadError::damaged(&file, "has a private key that does not belong to its certificate").into()
        );
    }
    let counts = match load::cas(directory) {
        Ok(cas) => cas.contains(&certificate),
        // Who needs the file says what is wrong with it.
        Err(_) => true,
    };
    if !counts {
        return Err(MakeError::UnknownCa { file, cas: directory.join(CAS) });
    }
    let begins = pem.find("-----BEGIN CERTIFICATE").unwrap_or(0);
    Ok(Ca { issuer: Issuer::from_ca_cert_der(&certificate, key)?, pem: pem[begins..].to_owned() })
}

fn named(name: &str) -> DistinguishedName {
    let mut all = DistinguishedName::new();
    all.push(DnType::CommonName, name);
    all
}

/// A random number, positive and without leading zeros, so that all tools write it alike.
fn serial() -> Result<SerialNumber, MakeError> {
    let mut bytes: [u8; 16] = process::random().map_err(MakeError::Random)?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

/// Says from when on, and until when.
fn set_span(params: &mut CertificateParams, life: Duration) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = date_time_ymd(1970, 1, 1) + Duration::from_secs(now.as_secs());
    (params.not_before, params.not_after) = (now - SKEW, now + life);
}
