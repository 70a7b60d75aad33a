//! How an etcd cluster is written as an `--arbiter` option.

use std::path::PathBuf;

/// How to write it, for people.
pub(crate) const FORM: &str = "etcd:URL,...[/PREFIX][?ca=FILE&cert=FILE&key=FILE&user=NAME&password-file=FILE], for example \
                               etcd:https://10.0.0.1:2379,https://10.0.0.2:2379,https://10.0.0.3:2379?ca=/etc/outlive/etcd/ca.pem";
/// Where the keys are if nothing else is said.
const PREFIX: &str = "outlive";
/// More members than a cluster should have.
const MOST_MEMBERS: usize = 16;

/// An etcd cluster, as an option names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Spec {
    /// As it was given, for people: it has no secret in it.
    pub(super) place: String,
    /// The members' client URLs: scheme, host and port.
    pub(super) members: Vec<String>,
    /// What all keys begin with, without a slash at either end.
    pub(super) prefix: String,
    pub(super) ca: Option<PathBuf>,
    pub(super) certificate: Option<PathBuf>,
    pub(super) key: Option<PathBuf>,
    pub(super) user: Option<String>,
    pub(super) password_file: Option<PathBuf>,
}

/// Why a text names no cluster.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum EtcdFormError {
    /// There is no URL in it.
    #[error("'{0}' is no URL of an etcd member: write http://HOST:PORT or https://HOST:PORT")]
    Url(String),
    /// Nobody has so many.
    #[error("more than {MOST_MEMBERS} members: name three or five")]
    TooMany,
    /// The prefix would be confusing.
    #[error("'{0}' is no prefix for keys: write letters, digits, '-', '_', '.' and '/' between them")]
    Prefix(String),
    /// No such option.
    #[error(
        "unknown option '{0}' of an etcd arbiter: there are ca=FILE, cert=FILE, key=FILE, user=NAME and \
         password-file=FILE"
    )]
    Option(String),
    /// One without the other.
    #[error("an etcd arbiter needs {0} with {1}: give both or neither")]
    Together(&'static str, &'static str),
    /// Nobody says who may be trusted.
    #[error("https needs ca=FILE, the certificate of the authority that issued the members' certificates")]
    NoCa,
    /// They would not be used.
    #[error("ca=, cert= and key= are for https: write https:// or leave them out")]
    NotHttps,
    /// A password would be readable by everyone on the way.
    #[error("user= needs https: over http everyone on the way reads the password")]
    PlainPassword,
}

impl Spec {
    /// Reads what follows `etcd:`.
    pub(super) fn parse(text: &str) -> Result<Self, EtcdFormError> {
        let (places, options) = text.split_once('?').unwrap_or((text, ""));
        let mut spec = Self {
            place: format!("etcd:{text}"),
            members: Vec::new(),
            prefix: PREFIX.to_owned(),
            ca: None,
            certificate: None,
            key: None,
            user: None,
            password_file: None,
        };
        for place in places.split(',') {
            let (member, prefix) = member(place)?;
            spec.members.push(member);
            if let Some(prefix) = prefix {
                check_prefix(prefix)?;
                prefix.clone_into(&mut spec.prefix);
            }
        }
        if spec.members.len() > MOST_MEMBERS {
            return Err(EtcdFormError::TooMany);
        }
        for option in options.split('&').filter(|option| !option.is_empty()) {
            spec.set(option)?;
        }
        spec.check()?;
        Ok(spec)
    }

    fn set(&mut self, option: &str) -> Result<(), EtcdFormError> {
        let file = |value: &str| Some(PathBuf::from(value));
        match option.split_once('=').filter(|(_, value)| !value.is_empty()) {
            Some(("ca", value)) => self.ca = file(value),
            Some(("cert", value)) => self.certificate = file(value),
            Some(("key", value)) => self.key = file(value),
            Some(("user", value)) => self.user = Some(value.to_owned()),
            Some(("password-file", value)) => self.password_file = file(value),
            // Not the value: somebody may have written a password there.
            _ => return Err(EtcdFormError::Option(option.split('=').next().unwrap_or_default().to_owned())),
        }
        Ok(())
    }

    fn check(&self) -> Result<(), EtcdFormError> {
        let secure = self.members.iter().all(|member| member.starts_with("https://"));
        let certificates = self.ca.is_some() || self.certificate.is_some() || self.key.is_some();
        if self.user.is_some() != self.password_file.is_some() {
            return Err(EtcdFormError::Together("user=NAME", "password-file=FILE"));
        }
        if self.certificate.is_some() != self.key.is_some() {
            return Err(EtcdFormError::Together("cert=FILE", "key=FILE"));
        }
        match (secure, certificates) {
            (false, true) => Err(EtcdFormError::NotHttps),
            (false, false) if self.user.is_some() => Err(EtcdFormError::PlainPassword),
            (true, _) if self.ca.is_none() => Err(EtcdFormError::NoCa),
            _ => Ok(()),
        }
    }
}

/// A member's URL, and the prefix behind it.
fn member(place: &str) -> Result<(String, Option<&str>), EtcdFormError> {
    let wrong = || EtcdFormError::Url(place.to_owned());
    let (scheme, rest) = place.split_once("://").ok_or_else(wrong)?;
    let (host, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let port =
        host.rsplit_once(':').filter(|(name, _)| !name.is_empty()).map(|(_, port)| port.parse::<u16>());
    if !matches!(scheme, "http" | "https") || !matches!(port, Some(Ok(1..))) || host.contains('@') {
        return Err(wrong());
    }
    let prefix = prefix.trim_end_matches('/');
    Ok((format!("{scheme}://{host}"), (!prefix.is_empty()).then_some(prefix)))
}

fn check_prefix(prefix: &str) -> Result<(), EtcdFormError> {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    if prefix.chars().all(good) && !prefix.contains("//") && prefix.len() <= 200 {
        return Ok(());
    }
    Err(EtcdFormError::Prefix(prefix.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_are_read() {
        let spec = Spec::parse("http://127.0.0.1:2379,http://[::1]:2380/some/where").unwrap();
        assert_eq!(spec.members, ["http://127.0.0.1:2379", "http://[::1]:2380"]);
        assert_eq!(spec.prefix, "some/where");
        let spec = Spec::parse("https://a:1?ca=/ca&cert=/cert&key=/key&user=vm&password-file=/pw").unwrap();
        assert_eq!((spec.prefix.as_str(), spec.user.as_deref()), ("outlive", Some("vm")));
        assert_eq!(spec.password_file.as_deref(), Some(std::path::Path::new("/pw")));
    }

    #[test]
    fn nonsense_gets_a_line_with_the_remedy() {
        for (text, remedy) in [
            ("", "http://HOST:PORT"),
            ("127.0.0.1:2379", "http://HOST:PORT"),
            ("http://127.0.0.1", "http://HOST:PORT"),
            ("http://me:secret@127.0.0.1:2379", "http://HOST:PORT"),
            ("ftp://a:1", "http://HOST:PORT"),
            ("http://a:0", "http://HOST:PORT"),
            ("http://a:1/x y", "letters"),
            ("https://a:1", "ca=FILE"),
            ("http://a:1?ca=/ca", "https"),
            ("http://a:1?user=a&password-file=/f", "https"),
            ("https://a:1?ca=/ca&user=a", "password-file=FILE"),
            ("https://a:1?ca=/ca&cert=/a", "key=FILE"),
            ("https://a:1?ca=/ca&password=secret", "password-file=FILE"),
        ] {
            let error = Spec::parse(text).unwrap_err().to_string();
            assert!(error.contains(remedy) && !error.contains("=secret"), "{text}: {error}");
        }
    }
}
