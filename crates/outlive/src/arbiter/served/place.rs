//! Where a served arbiter is, and how it is reached: `outlive:HOST:PORT`.

use std::io;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::ServedFault;
use super::protocol::{Answer, LONGEST_ANSWER, Question, hear, say};
use super::transport::{prepare, to_arbiter};
use crate::arbiter::Needs;
use crate::keys;
use crate::link::{LinkKind, Security, lasts, may_be_open};
use crate::names;

/// How to write it, for people.
pub(in crate::arbiter) const FORM: &str =
    "outlive:HOST:PORT[?keys=DIR], where `outlive arbiter serve` listens, for example outlive:10.0.0.9:7010";
/// The word before the colon.
const SCHEME: &str = "outlive:";
/// What chooses the keys.
const KEYS: &str = "keys=";
/// What does without.
const INSECURE: &str = "insecure";
/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(1);
/// How long a question and its answer may take. The server writes to its disk meanwhile.
const PATIENCE: Duration = Duration::from_secs(2);

/// An `--arbiter` option of a process that has `--keys`: a served arbiter is asked with these, unless the option says
/// otherwise.
pub fn with_keys(text: &str, keys: Option<&Path>) -> String {
    match keys {
        Some(keys) if text.starts_with(SCHEME) && !text.contains('?') => {
            format!("{text}?{KEYS}{}", keys.display())
        }
        _ => text.to_owned(),
    }
}

/// What a process needs of its host to ask it: the keys.
pub(in crate::arbiter) fn needs(place: &str) -> Needs {
    let security = Way::parse(place).map(|way| way.security);
    let keys = security.and_then(|security| match security {
        Security::Keys(directory) => Some(directory),
        Security::Open => None,
    });
    Needs { read: keys.into_iter().collect(), ..Needs::default() }
}

/// Where it is.
pub(in crate::arbiter) fn servers(place: &str) -> Vec<String> {
    Way::parse(place).into_iter().map(|way| way.address).collect()
}

/// The way to a served arbiter.
#[derive(Clone)]
pub(super) struct Way {
    /// Host and port.
    address: String,
    security: Security,
}

impl Way {
    /// Reads what follows `outlive:`.
    pub(super) fn parse(place: &str) -> Option<Self> {
        let (address, option) = place.split_once('?').unwrap_or((place, ""));
        let (host, port) = address.rsplit_once(':')?;
        let good = !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0);
        let security = match (option, option.strip_prefix(KEYS)) {
            (INSECURE, _) => Security::Open,
            (_, Some(keys)) if !keys.is_empty() => Security::Keys(PathBuf::from(keys)),
            ("", _) if !place.ends_with('?') => Security::Keys(PathBuf::from(keys::USUAL)),
            _ => return None,
        };
        good.then(|| Self { address: address.to_owned(), security })
    }

    /// What protects it.
    pub(super) fn link(&self) -> LinkKind {
        self.security.kind()
    }

    /// Finds out whether this host's keys can be used, before anybody is bothered.
    ///
    /// # Errors
    /// [`ServedFault::Keys`].
    pub(super) fn check(&self) -> Result<(), ServedFault> {
        let Security::Keys(directory) = &self.security else { return Ok(()) };
        // Whether they fit, whoever starts has looked: a process that runs goes on while a CA is replaced.
        let checked = keys::load(directory).map(drop);
        checked.map_err(|why| self.fault(&io::Error::new(io::ErrorKind::PermissionDenied, why)))
    }

    /// Asks once. An error leaves open whether the question was heard.
    pub(super) fn ask(&self, question: &Question) -> Result<Answer, ServedFault> {
        let fault = |error| self.fault(&error);
        let mut stream = to_arbiter(self.connect()?, &self.security, PATIENCE).map_err(fault)?;
        let until = Instant::now() + PATIENCE;
        say(&mut stream, question).map_err(fault)?;
        hear(&mut stream, LONGEST_ANSWER, until).map_err(fault)
    }

    fn fault(&self, error: &io::Error) -> ServedFault {
        match &self.security {
            _ if !lasts(error) => ServedFault::Unanswered(error.to_string()),
            Security::Open => ServedFault::NotPlain,
            // Before anything was said: this host's own.
            Security::Keys(keys) if !keys.exists() => {
                ServedFault::Keys(format!("{error}; or add ?{INSECURE} for an arbiter on this machine"))
            }
            Security::Keys(_) => ServedFault::Keys(error.to_string()),
        }
    }

    fn connect(&self) -> Result<TcpStream, ServedFault> {
        let mut why = "its name has no address".to_owned();
        let addresses =
            names::resolve(&self.address).map_err(|error| ServedFault::Unanswered(error.to_string()))?;
        for address in addresses {
            if self.security == Security::Open && !may_be_open(&address.to_string()) {
                return Err(ServedFault::NotPrivate(address));
            }
            let socket = TcpStream::connect_timeout(&address, CONNECT);
            match socket.and_then(|socket| prepare(&socket, PATIENCE).map(|()| socket)) {
                Ok(socket) => return Ok(socket),
                Err(error) => why = error.to_string(),
            }
        }
        Err(ServedFault::Unanswered(why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_are_those_of_the_process_unless_the_place_says_otherwise() {
        let keys = Some(Path::new("/k"));
        assert_eq!(with_keys("outlive:a:1", keys), "outlive:a:1?keys=/k");
        for text in ["outlive:a:1?insecure", "outlive:a:1?keys=/other", "file:/x", "etcd:http://a:1"] {
            assert_eq!(with_keys(text, keys), text);
        }
        assert_eq!(with_keys("outlive:a:1", None), "outlive:a:1");
        let security = |place| Way::parse(place).map(|way| way.security);
        assert_eq!(security("a:1?keys=/k?x&y"), Some(Security::Keys("/k?x&y".into())));
        assert_eq!(security("a:1"), Some(Security::Keys(keys::USUAL.into())));
        assert_eq!(security("a:1?insecure"), Some(Security::Open));
        for wrong in ["a:1?", "a:1?keys=", "a:1?secure", "a:1?insecure&keys=/k"] {
            assert_eq!(security(wrong), None, "{wrong}");
        }
    }
}
