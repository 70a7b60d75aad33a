//! Through which epoch the guest's output has left.

use zerocopy::IntoBytes;
use zerocopy::little_endian::U64;

use super::encoder::Encoder;
use super::error::{EncodeError, WireError};
use super::fields::Fields;
use super::kind::SectionKind;

/// The newest epoch of which everything has left, and of all before it.
type Payload = U64;

pub(super) const LEN: usize = size_of::<Payload>();

pub(super) fn parse(payload: &[u8]) -> Result<u64, WireError> {
    let mut fields = Fields::new(SectionKind::Released, payload);
    let through: &Payload = fields.fixed()?;
    fields.end()?;
    Ok(through.get())
}

impl Encoder {
    /// Appends through which epoch the guest's output has left the primary. Like a heartbeat, it is allowed also
    /// inside a checkpoint. From version 6 of the stream on.
    ///
    /// # Errors
    /// [`EncodeError::Order`] in an older stream.
    pub fn released(&mut self, out: &mut Vec<u8>, through: u64) -> Result<(), EncodeError> {
        let kind = SectionKind::Released;
        if self.version_of(kind) == 0 {
            return Err(EncodeError::Order("released output in a stream that does not tell of it"));
        }
        let payload = Payload::new(through);
        self.section(out, kind, &[], |out| out.extend_from_slice(payload.as_bytes()));
        Ok(())
    }
}
