//! The checkpoint that an encoder has begun and not ended.

use super::error::EncodeError;
use super::version::ProtocolVersion;

/// What a checkpoint consists of.
#[derive(Clone, Copy, Default)]
pub(super) struct Totals {
    pub(super) pages: u32,
    pub(super) state_bytes: u32,
    pub(super) disk_bytes: u32,
}

/// A checkpoint that has begun and not ended: how much of it was sent.
pub(super) struct Open {
    pub(super) number: u64,
    /// In its beginning.
    announced: Totals,
    pub(super) sent: Totals,
    /// Over the headers of its sections.
    pub(super) chain: crc32fast::Hasher,
}

impl Open {
    pub(super) fn new(number: u64, announced: Totals) -> Self {
        Self { number, announced, sent: Totals::default(), chain: crc32fast::Hasher::new() }
    }

    /// Each of these adds what a section brings, and returns the checkpoint's number.
    pub(super) fn add_pages(&mut self, pages: usize) -> u64 {
        self.sent.pages = self.sent.pages.saturating_add(pages as u32);
        self.number
    }

    pub(super) fn add_state(&mut self, bytes: usize) -> u64 {
        self.sent.state_bytes = self.sent.state_bytes.saturating_add(bytes as u32);
        self.number
    }

    pub(super) fn add_disk_writes(&mut self, bytes: usize) -> u64 {
        self.sent.disk_bytes = self.sent.disk_bytes.saturating_add(bytes as u32);
        self.number
    }

    pub(super) fn check_totals(&self, stream: ProtocolVersion) -> Result<(), EncodeError> {
        let (announced, sent) = (self.announced, self.sent);
        let at_most = stream >= ProtocolVersion::V4 && sent.pages <= announced.pages;
        for (what, announced, sent) in [
            ("pages", if at_most { sent.pages } else { announced.pages }, sent.pages),
            ("bytes of state", announced.state_bytes, sent.state_bytes),
            ("bytes of disk writes", announced.disk_bytes, sent.disk_bytes),
        ] {
            if announced != sent {
                return Err(EncodeError::Totals { number: self.number, what, announced, sent });
            }
        }
        Ok(())
    }
}
