//! The orderly ends: of the VM, and of a standby.

use std::fmt;

use super::encoder::Encoder;
use super::error::WireError;
use super::fields::Fields;
use super::kind::SectionKind;
use super::version::ProtocolVersion;

/// How a VM ends in order. The standby follows it and does not take over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum EndReason {
    /// The guest powered itself off.
    PowerOff = 1,
    /// The guest asked for a reset.
    Reset = 2,
    /// The guest crashed (panic or triple fault). A takeover would only crash it again.
    Crash = 3,
    /// The operator stopped the VM.
    Stopped = 4,
}

impl EndReason {
    pub(super) fn from_wire(number: u8) -> Option<Self> {
        [Self::PowerOff, Self::Reset, Self::Crash, Self::Stopped]
            .into_iter()
            .find(|reason| *reason as u8 == number)
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PowerOff => "the guest powered off",
            Self::Reset => "the guest asked for a reset",
            Self::Crash => "the guest crashed",
            Self::Stopped => "the VM was stopped",
        })
    }
}

/// Why a standby leaves although nothing is wrong with the primary. It will not take over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum LeaveReason {
    /// The operator stopped the standby.
    Stopped = 1,
    /// Something came over the link that the standby refuses (damage, wrong order, over a limit).
    BadStream = 2,
    /// Something failed at the standby itself.
    Failed = 3,
    /// The standby followed the VM's orderly end.
    Followed = 4,
    /// The operator stopped the standby, and it has handed its right to the VM over: it never asks for the
    /// generation after this one, and what is left of its copy says so durably. A primary that does not know
    /// this reason asks the arbiter, as after any other reason.
    Released = 5,
    /// The standby's copy is not the VM: a page differs. It has thrown the copy away and waits for a new base. Only
    /// where the stream has audits, from version 7 on.
    Differs = 6,
    /// [`BadStream`](Self::BadStream), and the right is handed over as with [`Released`](Self::Released). This and the
    /// next ones come from version 8 on.
    BadStreamReleased = 7,
    /// [`Failed`](Self::Failed), and the right is handed over.
    FailedReleased = 8,
    /// [`Differs`](Self::Differs), and the right is handed over.
    DiffersReleased = 9,
    /// The primary has dismissed this standby, which has handed its right over.
    Dismissed = 10,
}

impl LeaveReason {
    pub(super) fn from_wire(number: u8) -> Option<Self> {
        [
            Self::Stopped,
            Self::BadStream,
            Self::Failed,
            Self::Followed,
            Self::Released,
            Self::Differs,
            Self::BadStreamReleased,
            Self::FailedReleased,
            Self::DiffersReleased,
            Self::Dismissed,
        ]
        .into_iter()
        .find(|reason| *reason as u8 == number)
    }

    /// Whether the standby hands its right to the VM over: it never asks for the generation after this one, and what is
    /// left of its copy says so durably.
    pub fn hands_over(self) -> bool {
        matches!(
            self,
            Self::Released
                | Self::BadStreamReleased
                | Self::FailedReleased
                | Self::DiffersReleased
                | Self::Dismissed
        )
    }

    /// The same in a stream that is older than the reasons for which a right is handed over: only that it is.
    fn in_stream(self, stream: ProtocolVersion) -> Self {
        if self.hands_over() && stream < ProtocolVersion::V8 { Self::Released } else { self }
    }
}

impl fmt::Display for LeaveReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stopped => "the standby was stopped",
            Self::BadStream => "the standby refused what came over the link",
            Self::Failed => "the standby failed",
            Self::Followed => "the standby followed the end of the VM",
            Self::Released => "the standby was stopped, and has handed its right to the VM over",
            Self::Differs => "the standby's copy differs from the VM, and was thrown away",
            Self::BadStreamReleased => {
                "the standby refused what came over the link, and has handed its right to the VM over"
            }
            Self::FailedReleased => "the standby failed, and has handed its right to the VM over",
            Self::DiffersReleased => {
                "the standby's copy differs from the VM, and was thrown away with its right to the VM"
            }
            Self::Dismissed => "the standby was told that the VM goes on without it",
        })
    }
}

/// The number of the reason, and three bytes of zero.
type Payload = [u8; 4];

pub(super) const LEN: usize = size_of::<Payload>();

pub(super) fn parse<T>(
    kind: SectionKind,
    payload: &[u8],
    from_wire: fn(u8) -> Option<T>,
) -> Result<T, WireError> {
    let mut fields = Fields::new(kind, payload);
    let [number, zero @ ..]: &Payload = fields.fixed()?;
    let reason = from_wire(*number).ok_or_else(|| fields.malformed("unknown reason", (*number).into()))?;
    fields.reserved(zero)?;
    fields.end()?;
    Ok(reason)
}

impl Encoder {
    /// Appends the orderly end of the VM.
    pub fn end(&mut self, out: &mut Vec<u8>, reason: EndReason) {
        self.reason(out, SectionKind::End, reason as u8);
    }

    /// Appends the standby's orderly leave.
    pub fn leave(&mut self, out: &mut Vec<u8>, reason: LeaveReason) {
        let reason = reason.in_stream(self.stream());
        self.reason(out, SectionKind::Leave, reason as u8);
    }

    /// Appends that the primary goes on without this standby. Only in a stream of version 8 or later.
    pub fn dismiss(&mut self, out: &mut Vec<u8>) {
        self.section(out, SectionKind::Dismiss, &[], |_| ());
    }

    fn reason(&mut self, out: &mut Vec<u8>, kind: SectionKind, number: u8) {
        let payload: Payload = [number, 0, 0, 0];
        self.section(out, kind, &[], |out| out.extend_from_slice(&payload));
    }
}
