//! The sender lives.

use zerocopy::IntoBytes;
use zerocopy::little_endian::U64;

use super::encoder::Encoder;
use super::error::WireError;
use super::fields::Fields;
use super::kind::SectionKind;

/// The stamp, in microseconds of the primary's clock.
type Payload = U64;

pub(super) const LEN: usize = size_of::<Payload>();

pub(super) fn parse(payload: &[u8]) -> Result<u64, WireError> {
    let mut fields = Fields::new(SectionKind::Heartbeat, payload);
    let stamp: &Payload = fields.fixed()?;
    fields.end()?;
    Ok(stamp.get())
}

impl Encoder {
    /// Appends a heartbeat. It is allowed at any time after the introduction, also inside a checkpoint.
    pub fn heartbeat(&mut self, out: &mut Vec<u8>, stamp_us: u64) {
        let payload = Payload::new(stamp_us);
        self.section(out, SectionKind::Heartbeat, &[], |out| out.extend_from_slice(payload.as_bytes()));
    }
}
