//! Whether the standby's host reaches the guest's clients.

use super::encoder::Encoder;
use super::error::WireError;
use super::fields::Fields;
use super::kind::SectionKind;

/// 0: it does not know; 1: it does not; 2: it does. Three bytes of zero follow.
type Payload = [u8; 4];

pub(super) const LEN: usize = size_of::<Payload>();

pub(super) fn parse(payload: &[u8]) -> Result<Option<bool>, WireError> {
    let mut fields = Fields::new(SectionKind::Reach, payload);
    let [number, zero @ ..]: &Payload = fields.fixed()?;
    let reaches = match number {
        0 => None,
        1 => Some(false),
        2 => Some(true),
        _ => return Err(fields.malformed("unknown reach", (*number).into())),
    };
    fields.reserved(zero)?;
    fields.end()?;
    Ok(reaches)
}

impl Encoder {
    /// Appends whether the standby's host reaches the guest's clients; `None` if it does not know. From
    /// version 5 of the stream on.
    pub fn reach(&mut self, out: &mut Vec<u8>, reaches: Option<bool>) {
        let number = reaches.map_or(0, |reaches| 1 + u8::from(reaches));
        let payload: Payload = [number, 0, 0, 0];
        self.section(out, SectionKind::Reach, &[], |out| out.extend_from_slice(&payload));
    }
}
