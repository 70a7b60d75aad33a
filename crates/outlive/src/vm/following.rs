//! What a copy of a VM keeps of each checkpoint, whoever makes it: a standby, commit by commit, or a rewind, which plays
//! what was recorded.

use outlive_dirty::Gfn;
use outlive_epoch::{Checkpoint, MAX_STATE_SECTIONS, PageData, StateBuf, StateKind, StateSection};
use outlive_machine::Ram;

/// Writes pages to memory. Returns the first that is outside it.
pub(crate) fn write_pages<'a>(
    ram: &Ram,
    pages: impl Iterator<Item = (u64, PageData<'a>)>,
) -> Result<(), u64> {
    for (gfn, page) in pages {
        let written = match page {
            PageData::Zero => ram.zero_page(Gfn(gfn)),
            PageData::Raw(bytes) => ram.write_page(Gfn(gfn), bytes),
            PageData::Granules(granules) => {
                granules.iter().all(|(at, bytes)| ram.write_part(Gfn(gfn), at, bytes))
            }
        };
        if !written {
            return Err(gfn);
        }
    }
    Ok(())
}

/// The state of vCPUs and devices as of the last checkpoint that came.
pub(crate) struct LastState {
    /// CPUID and TSC frequency, from the base checkpoint.
    constants: Vec<Vec<u8>>,
    kept: StateBuf,
}

impl LastState {
    /// An empty state with room for this many bytes.
    pub(crate) fn new(bytes: usize) -> Self {
        Self { constants: Vec::new(), kept: StateBuf::with_capacity(bytes, MAX_STATE_SECTIONS) }
    }

    /// Keeps a checkpoint's state instead of the last one's.
    pub(crate) fn follow(&mut self, checkpoint: &Checkpoint<'_>) {
        self.kept.clear();
        let mut constants = Vec::new();
        for section in checkpoint.state().sections() {
            match section.kind {
                StateKind::VcpuConstant => constants.push(section.bytes.to_vec()),
                StateKind::Check => {}
                _ => self.kept.push(section),
            }
        }
        if !constants.is_empty() {
            self.constants = constants;
        }
    }

    /// What a machine is restored from.
    pub(crate) fn parts(&self) -> (&[Vec<u8>], Vec<StateSection<'_>>) {
        (&self.constants, self.kept.sections().collect())
    }
}
