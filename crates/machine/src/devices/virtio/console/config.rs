//! The configuration space: the size of the screen (virtio 1.2, 5.3.4).

/// Columns and rows of the terminal that shows the console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScreenSize {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// What every terminal has at least.
impl Default for ScreenSize {
    fn default() -> Self {
        Self { columns: 80, rows: 24 }
    }
}

impl ScreenSize {
    /// Reads the configuration space. Past the size there are max_nr_ports and emerg_wr, which belong to
    /// features that are not offered and read as zero.
    pub(super) fn read(self, offset: u64, data: &mut [u8]) {
        let [a, b] = self.columns.to_le_bytes();
        let [c, d] = self.rows.to_le_bytes();
        let space = [a, b, c, d];
        for (at, byte) in (0u64..).zip(data) {
            let at = usize::try_from(offset.saturating_add(at)).unwrap_or(usize::MAX);
            *byte = space.get(at).copied().unwrap_or(0);
        }
    }
}
