//! Whether the other end's certificate counts.
//!
//! The other end learns only that it does not: the reason is for this host's log.

use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme,
};

use crate::keys::{Certificate, Loaded, Revoked};

/// Why a certificate does not count. Each message has the remedy.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Refused {
    /// Anybody can make one.
    #[error(
        "its certificate is of another CA: give both ends keys of one CA (`outlive keys issue`, or `outlive keys \
         operator`)"
    )]
    OtherCa,
    /// It is over.
    #[error(
        "its certificate has expired: renew it with `outlive keys rotate`, `outlive keys issue` or `outlive keys operator`"
    )]
    Expired,
    /// It has not begun.
    #[error("its certificate does not count yet: set the clocks of both hosts")]
    TooEarly,
    /// It is on the list.
    #[error(
        "the certificate {serial} of {host} is revoked: give it a new one with `outlive keys issue` or `outlive keys \
         operator`"
    )]
    Revoked { host: String, serial: String },
    /// Anything else.
    #[error("its certificate does not count: {0}")]
    Other(String),
}

/// Judges one certificate, of either end; see the module.
#[derive(Debug)]
pub(super) struct Verifier {
    provider: Arc<CryptoProvider>,
    cas: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
    revoked: Revoked,
    verdict: Mutex<Option<Result<Certificate, Refused>>>,
}

impl Verifier {
    /// Of one connection.
    ///
    /// # Errors
    /// A CA's certificate is none.
    pub(super) fn new(keys: &Loaded) -> Result<Arc<Self>, Box<dyn std::error::Error + Send + Sync>> {
        let provider = Arc::new(ring::default_provider());
        let mut cas = RootCertStore::empty();
        for ca in &keys.cas {
            cas.add(ca.clone())?;
        }
        let cas = Arc::new(cas);
        let clients = WebPkiClientVerifier::builder_with_provider(cas.clone(), provider.clone())
            // Nothing that a stranger could learn from.
            .clear_root_hint_subjects()
            .build()?;
        let (revoked, verdict) = (keys.revoked.clone(), Mutex::default());
        Ok(Arc::new(Self { provider, cas, clients, revoked, verdict }))
    }

    /// The algorithms.
    pub(super) fn provider(&self) -> Arc<CryptoProvider> {
        self.provider.clone()
    }

    /// What was found; `None` if the other end has shown nothing.
    pub(super) fn verdict(&self) -> Option<Result<Certificate, Refused>> {
        self.verdict.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether what a client has shown before counts now.
    pub(super) fn counts(&self, shown: &[CertificateDer<'_>]) -> Option<Refused> {
        let (first, others) = shown.split_first()?;
        self.verify_client_cert(first, others, UnixTime::now()).err()?;
        self.verdict()?.err()
    }

    fn judge(&self, certificate: &CertificateDer<'_>, chain: Result<(), Error>) -> Result<(), Error> {
        let verdict = chain.map_err(refused).and_then(|()| {
            let read = Certificate::of_host(certificate).map_err(|why| Refused::Other(why.to_string()))?;
            let Certificate { name, serial, .. } = &read;
            if self.revoked.has(serial) {
                return Err(Refused::Revoked { host: name.clone(), serial: serial.clone() });
            }
            Ok(read)
        });
        let counts = verdict.is_ok();
        *self.verdict.lock().unwrap_or_else(PoisonError::into_inner) = Some(verdict);
        // The alert for this is access_denied.
        let no = Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure);
        if counts { Ok(()) } else { Err(no) }
    }
}

fn refused(error: Error) -> Refused {
    match error {
        Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            Refused::OtherCa
        }
        Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            Refused::Expired
        }
        Error::InvalidCertificate(
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
        ) => Refused::TooEarly,
        other => Refused::Other(other.to_string()),
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let algorithms = self.provider.signature_verification_algorithms.all;
        let chain = ParsedCertificate::try_from(end_entity).and_then(|parsed| {
            verify_server_cert_signed_by_trust_anchor(&parsed, &self.cas, intermediates, now, algorithms)
        });
        self.judge(end_entity, chain).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.clients.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.clients.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.clients.supported_verify_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.clients.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let chain = self.clients.verify_client_cert(end_entity, intermediates, now).map(drop);
        self.judge(end_entity, chain).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.clients.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.clients.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.clients.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime, UNIX_EPOCH};

    use super::*;
    use crate::keys::{self, Grant, Order};

    /// A certificate counts from an hour before its making on, and until its end.
    #[test]
    fn a_certificate_counts_between_its_two_times_at_both_ends() {
        const HOUR: u64 = 3600;
        let dir = tempfile::tempdir().unwrap();
        let keys = dir.path().join("keys");
        let order = Order { host: "hosta".into(), grant: Grant::ALL, life: Duration::from_secs(HOUR) };
        keys::init(&keys, &order).unwrap();
        let keys = keys::load(&keys).unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let name = ServerName::try_from("standby").unwrap();
        for (at, verdict) in [
            (now - 2 * HOUR, "its certificate does not count yet: set the clocks"),
            (now, ""),
            (now + 2 * HOUR, "its certificate has expired"),
        ] {
            let at = UnixTime::since_unix_epoch(Duration::from_secs(at));
            let judged = |it: &Verifier| match it.verdict().unwrap() {
                Ok(_) => String::new(),
                Err(why) => why.to_string(),
            };
            let verifier = Verifier::new(&keys).unwrap();
            let client = verifier.verify_client_cert(&keys.chain[0], &[], at);
            assert!(judged(&verifier).starts_with(verdict) && client.is_ok() == verdict.is_empty());
            let verifier = Verifier::new(&keys).unwrap();
            let server = verifier.verify_server_cert(&keys.chain[0], &[], &name, &[], at);
            assert!(judged(&verifier).starts_with(verdict) && server.is_ok() == verdict.is_empty());
        }
    }
}
