//! TLS for the node's API: which keys it has, and what a certificate lets its owner do there. The connections are the
//! node's, which has a runtime for them; the judgement of certificates is that of links.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use outlive_node::remote::{Access, Dial, Keys, Peer, Serve, Visitor};
use rustls::pki_types::CertificateDer;

use super::security::complain;
use super::tls::{client_config, judged, server_config};
use super::verify::Verifier;
use crate::keys::{self, Certificate, Grant, LoadError, Loaded, Vms};

/// Keys of a host or of an operator, in the directory that is named or in the usual one.
pub(crate) fn open_keys(directory: Option<&Path>) -> Arc<dyn Keys> {
    Arc::new(Directory(directory.unwrap_or(Path::new(keys::USUAL)).to_owned()))
}

/// A directory of keys.
#[derive(Debug)]
struct Directory(PathBuf);

impl Directory {
    fn load(&self) -> Result<(Loaded, Arc<Verifier>), String> {
        let keys = keys::load(&self.0).map_err(|why| why.to_string())?;
        let verifier = Verifier::new(&keys).map_err(|why| why.to_string())?;
        Ok((keys, verifier))
    }
}

impl Keys for Directory {
    fn complaint(&self) -> Option<String> {
        let keys = match keys::fitting(&self.0) {
            Ok(keys) => keys,
            Err(why) if keys::load(&self.0).is_ok() => {
                return Some(format!("no client may trust this node: {why}"));
            }
            Err(why) => return Some(format!("nobody is let in: {why}")),
        };
        if !keys.host.grant.has_vms() {
            let Certificate { name, grant, .. } = &keys.host;
            return Some(format!(
                "no client will trust this node: the certificate of {name} {grant}, and is no host's: give it one with \
                 `outlive keys issue --host {name}`, on the machine with the CA"
            ));
        }
        if keys.revoked.has(&keys.host.serial) {
            let Certificate { name, serial, .. } = &keys.host;
            return Some(format!(
                "no client trusts this node: the certificate {serial} of {name} is revoked"
            ));
        }
        let now = SystemTime::now();
        if let Some(early) = keys.host.too_early(now) {
            return Some(format!("no client trusts this node: {early}"));
        }
        let ends = keys.host.complaint(now)?;
        Some(format!(
            "{ends}: no client trusts this node then; renew it with `outlive keys rotate` or `outlive keys issue`"
        ))
    }

    fn serve(&self) -> Result<Serve, String> {
        let (keys, verifier) = self.load()?;
        complain(&keys);
        let config = server_config(keys, &verifier).map_err(|why| why.to_string())?;
        let judge = move |end: io::Result<()>| {
            let about = judged(end, &verifier).map_err(|why| why.to_string())?;
            Ok(Visitor { name: called(&about), access: access(&about.grant) })
        };
        Ok(Serve { config: Arc::new(config), judge: Box::new(judge) })
    }

    fn counts(&self, shown: &[CertificateDer<'static>]) -> Result<(), String> {
        // While files are being replaced they may not be readable. Nobody new is let in then.
        let Ok((_, verifier)) = self.load() else { return Ok(()) };
        verifier.counts(shown).map_or(Ok(()), |why| Err(why.to_string()))
    }

    fn dial(&self) -> Result<Dial, String> {
        let keys = keys::fitting(&self.0).map_err(own)?;
        let now = SystemTime::now();
        if let Some(complaint) = keys.host.complaint(now).filter(|_| keys.host.left(now).is_zero()) {
            return Err(format!(
                "{complaint}, so no node accepts it: renew it where the CA is ({})",
                renewal(&keys.host)
            ));
        }
        let verifier = Verifier::new(&keys).map_err(|why| why.to_string())?;
        let config = client_config(keys, &verifier).map_err(|why| why.to_string())?;
        let judge = move |end: io::Result<()>| {
            let about = judged(end, &verifier).map_err(|why| why.to_string())?;
            Ok(Peer { is_host: about.grant.has_vms(), name: about.name })
        };
        Ok(Dial { config: Arc::new(config), judge: Box::new(judge) })
    }
}

/// What a certificate allows at a node. Whoever may hold every VM has their memory, and may win each of them at the
/// arbiter: looking at them and taking them over in order is no more. Hosts that were given less, and arbiters, have no
/// business there.
fn access(grant: &Grant) -> Access {
    match grant {
        Grant { operate: true, .. } => Access::Everything,
        Grant { hold: Vms::Any, .. } => Access::HandOver,
        _ => Access::Nothing,
    }
}

/// Who has a certificate, for people.
fn called(about: &Certificate) -> String {
    let what = if about.grant.is_operators() { "operator" } else { "host" };
    format!("{what} {}", about.name)
}

fn renewal(about: &Certificate) -> String {
    let name = &about.name;
    if about.grant.is_operators() {
        format!("`outlive keys operator {name}`")
    } else {
        format!("`outlive keys issue --host {name}`")
    }
}

/// Whoever asks a node need not be a host.
fn own(why: LoadError) -> String {
    match why {
        LoadError::Missing { path } | LoadError::Foreign { path } => format!(
            "{path} has no keys: `outlive keys operator NAME`, on the machine with the CA, makes a directory of them for you"
        ),
        why => why.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use outlive_epoch::VmId;

    use super::*;

    #[test]
    fn a_right_at_the_api_follows_from_what_a_certificate_allows() {
        let one = Vms::Only(vec![VmId([1; 16])]);
        for (grant, allowed) in [
            (Grant::OPERATOR, Access::Everything),
            (Grant { operate: true, ..Grant::ALL }, Access::Everything),
            (Grant::ALL, Access::HandOver),
            (Grant { hold: Vms::Any, ..Grant::NONE }, Access::HandOver),
            (Grant { send: Vms::Any, ..Grant::NONE }, Access::Nothing),
            (Grant { send: one.clone(), hold: one, ..Grant::NONE }, Access::Nothing),
            (Grant::ARBITER, Access::Nothing),
            (Grant::NONE, Access::Nothing),
        ] {
            assert_eq!(access(&grant), allowed, "{grant}");
        }
    }
}
