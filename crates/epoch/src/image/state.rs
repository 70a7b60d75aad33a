//! State sections.

/// One state section: opaque bytes of the machine, named by kind, version and index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateSection<'a> {
    /// What it is (registers, LAPIC, a device ...), as the machine numbers it.
    pub kind: u16,
    /// Version of the bytes.
    pub version: u16,
    /// Which vCPU or device.
    pub index: u16,
    /// The state itself, at most [`MAX_STATE_SECTION`](super::limits::MAX_STATE_SECTION) bytes.
    pub bytes: &'a [u8],
}
