//! The thread that reads a standby's messages to its primary.

use std::io::ErrorKind;
use std::time::Duration;

use outlive_epoch::{
    ArbiterSight, Audited, DiskAudited, DiskWant, Message, Peer, ProtocolVersion, ReadError, SectionKind,
    SectionReader, StrayKey, WireError,
};
use outlive_pair::{Link, LossReason, PrimaryEvent};

use super::Reader;

/// What a standby sends.
pub(crate) enum Heard {
    /// Its preface: it introduces itself in this version.
    Introduction(ProtocolVersion),
    /// It has accepted. Comes before the event.
    Agreed(Agreed),
    /// An event for the state machine.
    Event(PrimaryEvent),
    /// Its request for chunks of a disk: to the state machine only a sign of life.
    Want(DiskWant),
    /// How far it is with comparing pages: to the state machine only a sign of life.
    Audited(Audited),
    /// Whether it sees the arbiter: likewise, because it is for people.
    Sees(ArbiterSight),
    /// The same of disks.
    DiskAudited(DiskAudited),
}

/// What both sides have agreed on.
pub(crate) struct Agreed {
    /// The version of the stream that both use from now on.
    pub(crate) version: ProtocolVersion,
    /// Whether the standby holds the memory that was named to it.
    pub(crate) holds: bool,
    /// With what it takes strays.
    pub(crate) strays: Option<StrayKey>,
}

/// Reads the link until it ends and turns every message into what was heard. Runs on its own thread. It calls
/// `tell` after the message has arrived, so the time that `tell` reads is later than the arrival.
pub(crate) fn receive(mut from: Reader, link: Link, tell: impl Fn(Heard)) {
    let mut reader = SectionReader::new(Peer::Standby);
    let mut error = reader.read_preface(&mut from).map(|version| tell(Heard::Introduction(version))).err();
    let mut agreed = None;
    while error.is_none() {
        match next(&mut reader, &mut from, link, &mut agreed, &tell) {
            Ok(event) => tell(Heard::Event(event)),
            Err(stop) => error = Some(stop),
        }
    }
    let why = match error {
        Some(ReadError::Closed) | None => LossReason::Closed,
        Some(ReadError::Truncated { .. }) => LossReason::Closed,
        Some(ReadError::Io(error)) if error.kind() == ErrorKind::InvalidData => {
            LossReason::Protocol(error.to_string())
        }
        Some(ReadError::Io(error)) => LossReason::Error(error.to_string()),
        Some(error @ ReadError::Wire(_)) => LossReason::Protocol(error.to_string()),
    };
    tell(Heard::Event(PrimaryEvent::LinkLost { link, why }));
}

fn next(
    reader: &mut SectionReader,
    from: &mut Reader,
    link: Link,
    agreed: &mut Option<ProtocolVersion>,
    tell: &impl Fn(Heard),
) -> Result<PrimaryEvent, ReadError> {
    let section = reader.read_section(from)?;
    Ok(match Message::parse(&section)? {
        Message::Accept(accept) => {
            let version = accept.version;
            if agreed.replace(version).is_some() {
                let (kind, what) = (SectionKind::Accept, "an acceptance after the first, of version");
                return Err(WireError::Malformed { kind, what, value: version as u64 }.into());
            }
            reader.agree(version);
            tell(Heard::Agreed(Agreed { version, holds: accept.holds, strays: accept.strays }));
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
            tell(Heard::Want(wanted));
            PrimaryEvent::Heard { link }
        }
        Message::Audited(audited) => {
            tell(Heard::Audited(audited));
            PrimaryEvent::Heard { link }
        }
        Message::ArbiterSight(sight) => {
            tell(Heard::Sees(sight));
            PrimaryEvent::Heard { link }
        }
        Message::DiskAudited(audited) => {
            tell(Heard::DiskAudited(audited));
            PrimaryEvent::Heard { link }
        }
        Message::Reach(reaches) => PrimaryEvent::StandbyReaches { link, reaches },
        Message::Leave(reason) => PrimaryEvent::Leave { link, reason },
        // The reader refuses messages that a standby never sends.
        _ => PrimaryEvent::Heard { link },
    })
}
