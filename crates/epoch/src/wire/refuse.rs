//! The standby does not accept a primary. The payload is frozen, so any two releases understand it.

use zerocopy::little_endian::U16;

use super::encoder::{Encoder, put_text};
use super::error::WireError;
use super::fields::Fields;
use super::kind::SectionKind;
use crate::image::limits::MAX_REFUSE_TEXT;

/// Why a standby does not accept a primary. The numbers are frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum RefuseCode {
    /// Another primary is attached, or the standby is just deciding a takeover.
    Busy = 1,
    /// The standby is reserved for another VM.
    WrongVm = 2,
    /// The VM has been seen in a newer generation: this primary is out of date.
    StaleGeneration = 3,
    /// The versions of the protocol do not match.
    Version = 4,
    /// Not enough memory, CPUs, or another CPU vendor.
    Resources = 5,
    /// The introduction is invalid.
    Malformed = 6,
    /// The standby is about to end.
    Leaving = 7,
    /// The standby's devices do not match: a disk is missing, of another size, or in use.
    Devices = 8,
    /// An image of the standby has data that would be overwritten and from which this VM does not descend.
    Overwrite = 9,
}

impl RefuseCode {
    /// The code with this number.
    pub fn from_wire(number: u16) -> Option<Self> {
        [
            Self::Busy,
            Self::WrongVm,
            Self::StaleGeneration,
            Self::Version,
            Self::Resources,
            Self::Malformed,
            Self::Leaving,
            Self::Devices,
            Self::Overwrite,
        ]
        .into_iter()
        .find(|code| *code as u16 == number)
    }
}

/// The standby does not accept this primary, and the connection ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refuse {
    /// The reason, or its number if this release does not know it.
    pub code: Result<RefuseCode, u16>,
    /// The reason in words, at most [`MAX_REFUSE_TEXT`] bytes.
    pub text: String,
}

impl Refuse {
    pub(crate) fn parse(payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(SectionKind::Refuse, payload);
        let number = fields.fixed::<U16>()?.get();
        let text = fields.text(MAX_REFUSE_TEXT)?;
        fields.end()?;
        Ok(Self { code: RefuseCode::from_wire(number).ok_or(number), text })
    }
}

impl Encoder {
    /// Appends a refusal. A text that is too long is cut.
    pub fn refuse(&mut self, out: &mut Vec<u8>, code: RefuseCode, text: &str) {
        let mut end = text.len().min(MAX_REFUSE_TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.section(out, SectionKind::Refuse, &[], |out| {
            out.extend_from_slice(&(code as u16).to_le_bytes());
            put_text(out, &text[..end]);
        });
    }
}
