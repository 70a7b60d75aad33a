//! What a primary hears from its standby.

use std::time::Duration;

use outlive_epoch::{DiskWant, Message, Peer, ReadError, SectionReader};
use outlive_pair::{Link, LossReason, PrimaryEvent};

use super::Reader;

/// Reads the link until it ends and turns every message into an event. Runs on a thread of its own; `tell` is
/// called on it after the message has arrived, so that the time that it reads is later than the arrival. What
/// the standby wants of the disks is no event of the state machine, only a sign of life; `want` takes it.
pub(crate) fn receive(mut from: Reader, link: Link, tell: impl Fn(PrimaryEvent), want: impl Fn(DiskWant)) {
    let mut reader = SectionReader::new(Peer::Standby);
    let result = reader.read_preface(&mut from);
    let mut error = result.err();
    while error.is_none() {
        match next(&mut reader, &mut from, link, &want) {
            Ok(event) => tell(event),
            Err(stop) => error = Some(stop),
        }
    }
    let why = match error {
        Some(ReadError::Closed) | None => LossReason::Closed,
        Some(ReadError::Truncated { .. }) => LossReason::Closed,
        Some(ReadError::Io(error)) => LossReason::Error(error.to_string()),
        Some(error @ ReadError::Wire(_)) => LossReason::Protocol(error.to_string()),
    };
    tell(PrimaryEvent::LinkLost { link, why });
}

fn next(
    reader: &mut SectionReader,
    from: &mut Reader,
    link: Link,
    want: &impl Fn(DiskWant),
) -> Result<PrimaryEvent, ReadError> {
    let section = reader.read_section(from)?;
    Ok(match Message::parse(&section)? {
        Message::Accept(accept) => {
            PrimaryEvent::Accepted { link, dead_after: Duration::from_micros(accept.dead_after_us) }
        }
        Message::Refuse(refuse) => PrimaryEvent::Refused { link, code: refuse.code, text: refuse.text },
        Message::Ack(ack) => PrimaryEvent::Ack {
            link,
            generation: ack.generation,
            checkpoint: ack.number,
            stamp: Duration::from_micros(ack.stamp_us),
        },
        Message::Heartbeat { stamp_us } => {
            PrimaryEvent::Heartbeat { link, stamp: Duration::from_micros(stamp_us) }
        }
        Message::DiskWant(wanted) => {
            want(wanted);
            PrimaryEvent::Heard { link }
        }
        Message::Leave(reason) => PrimaryEvent::Leave { link, reason },
        // The reader refuses what a standby never sends.
        _ => PrimaryEvent::Heard { link },
    })
}
