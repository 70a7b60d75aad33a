//! Where the members are, by name; see [`crate::names`].

use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

use crate::names;

/// As many addresses as an answer has room for.
const MOST: usize = 16;

/// The usual lookup, and the last good answer if it fails.
#[derive(Debug, Default)]
pub(super) struct Names(DefaultResolver);

impl Resolver for Names {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let found = self.0.resolve(uri, config, timeout);
        let place = uri.scheme().zip(uri.authority());
        let name = place.and_then(|(scheme, authority)| DefaultResolver::host_and_port(scheme, authority));
        let Some(name) = name else { return found };
        match found {
            Ok(found) => {
                names::found(&name, &found);
                Ok(found)
            }
            Err(error) => {
                let known = names::last(&name).ok_or(error)?;
                let mut addresses = self.empty();
                known.into_iter().take(MOST).for_each(|address| addresses.push(address));
                Ok(addresses)
            }
        }
    }
}
