//! What the node of another host says of it, and how far away it is: half of what `outlive doctor` compares.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::client::{Client, ClientError};
use crate::host::Host;
use crate::node::NodeView;
use crate::remote::Keys;

/// How often something short is measured.
const TRIES: usize = 5;
/// How much is asked for to measure the way, and for how long it is read at most.
const BYTES: usize = 64 << 20;
const READS: Duration = Duration::from_secs(1);
/// Fewer bytes say nothing of a speed.
const LEAST: u64 = 1 << 20;

/// Why the node of another host cannot be asked: a line, with what to do.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// It does not answer, or not to these keys.
    #[error("{0}")]
    Client(String),
    /// Nothing can be asked.
    #[error("cannot ask anybody: {0}; let this user have more descriptors")]
    Runtime(#[from] std::io::Error),
}

impl From<ClientError> for PeerError {
    fn from(why: ClientError) -> Self {
        let no_route = matches!(&why, ClientError::Refused(error) if error.code == "no_route");
        let more = if no_route { "; its release does not know this question: upgrade it" } else { "" };
        Self::Client(format!("{why}{more}"))
    }
}

/// What was heard.
#[derive(Clone, Debug)]
pub struct Heard {
    /// What `outlive check --json` says there.
    pub check: Value,
    /// Its clock.
    pub clock: Option<Apart>,
    /// A round trip to it, at best.
    pub round_trip: Option<Duration>,
    /// Bytes a second that come from it, by one connection with TLS. `None`: too few came to say so.
    pub speed: Option<u64>,
}

/// How far a clock is from this host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Apart {
    /// How far it is ahead, in milliseconds.
    pub ahead_ms: i64,
    /// By how much that may be wrong.
    pub give_or_take_ms: i64,
}

impl Apart {
    /// By a clock that said `now` at some time between two looks at this host's.
    fn between(before: SystemTime, now: SystemTime, after: SystemTime) -> Option<Self> {
        let took = after.duration_since(before).ok()?;
        let middle = before + took / 2;
        let apart = match now.duration_since(middle) {
            Ok(ahead) => ahead.as_millis() as i64,
            Err(behind) => -(behind.duration().as_millis() as i64),
        };
        Some(Self { ahead_ms: apart, give_or_take_ms: took.as_millis() as i64 / 2 + 1 })
    }
}

/// Asks the node of a host. It takes some seconds.
///
/// # Errors
/// See [`PeerError`]. What cannot be measured is none.
pub fn ask(host: &Host, keys: Arc<dyn Keys>) -> Result<Heard, PeerError> {
    let client = Client::there(host, keys)?;
    // Whoever is not there or trusts nobody is known at once.
    let round_trip = client.round_trip(TRIES)?;
    let check = client.get("/v1/check")?;
    let clock = (0..TRIES).filter_map(|_| clock(&client)).min_by_key(|it| it.give_or_take_ms);
    let speed = match client.measure(&format!("/v1/check/link?bytes={BYTES}"), READS) {
        Ok((bytes, took)) if bytes >= LEAST => Some((bytes as f64 / took.as_secs_f64()) as u64),
        _ => None,
    };
    Ok(Heard { check, clock, round_trip, speed })
}

fn clock(client: &Client) -> Option<Apart> {
    let before = SystemTime::now();
    let node: NodeView = client.get("/v1/node").ok()?;
    let after = SystemTime::now();
    Apart::between(before, humantime::parse_rfc3339(&node.now).ok()?, after)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_are_compared_by_the_middle_of_a_question() {
        let at = |ms: u64| SystemTime::UNIX_EPOCH + Duration::from_millis(1_000_000 + ms);
        let apart = |now| Apart::between(at(0), at(now), at(10)).unwrap();
        assert_eq!(apart(5), Apart { ahead_ms: 0, give_or_take_ms: 6 });
        assert_eq!(apart(2005).ahead_ms, 2000);
        assert_eq!(Apart::between(at(3000), at(5), at(3010)).unwrap().ahead_ms, -3000);
        assert_eq!(Apart::between(at(10), at(0), at(9)), None, "this host's own clock was set back");
    }
}
