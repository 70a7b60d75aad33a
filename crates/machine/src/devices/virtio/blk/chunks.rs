//! Chunks: the unit in which written parts of a disk are recorded and two copies of a disk are compared.

/// Bytes of a chunk.
pub const CHUNK: u64 = 64 << 10;

/// A set of chunks of one disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChunkSet {
    words: Vec<u64>,
    chunks: u64,
    count: u64,
}

impl ChunkSet {
    /// The empty set for a disk of `bytes` bytes; the last chunk may be shorter.
    pub fn for_disk(bytes: u64) -> Self {
        let chunks = bytes.div_ceil(CHUNK);
        Self { words: vec![0; chunks.div_ceil(64) as usize], chunks, count: 0 }
    }

    /// How many chunks the disk has.
    pub fn chunks(&self) -> u64 {
        self.chunks
    }

    /// How many of them are in the set.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether `chunk` is in the set.
    pub fn contains(&self, chunk: u64) -> bool {
        chunk < self.chunks && self.words[(chunk / 64) as usize] & 1 << (chunk % 64) != 0
    }

    /// The chunks that `len` bytes from `offset` touch.
    pub(super) fn chunks_of(offset: u64, len: u64) -> impl Iterator<Item = u64> {
        let end = if len == 0 { 0 } else { offset.saturating_add(len).div_ceil(CHUNK) };
        offset / CHUNK..end
    }

    /// Adds the chunks that `len` bytes from `offset` touch; bytes past the end of the disk are left out.
    pub fn insert_bytes(&mut self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let end = offset.saturating_add(len).div_ceil(CHUNK).min(self.chunks);
        for chunk in offset / CHUNK..end {
            self.insert(chunk);
        }
    }

    /// Adds one chunk, if the disk has it.
    pub fn insert(&mut self, chunk: u64) {
        if chunk < self.chunks {
            let (word, bit) = (&mut self.words[(chunk / 64) as usize], 1 << (chunk % 64));
            self.count += u64::from(*word & bit == 0);
            *word |= bit;
        }
    }

    /// Takes one chunk out.
    pub fn remove(&mut self, chunk: u64) {
        if self.contains(chunk) {
            self.words[(chunk / 64) as usize] &= !(1 << (chunk % 64));
            self.count -= 1;
        }
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        if !self.is_empty() {
            self.words.fill(0);
            self.count = 0;
        }
    }

    /// The chunks in the set, in order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().enumerate().flat_map(|(index, &word)| {
            let mut word = word;
            std::iter::from_fn(move || {
                let bit = word.trailing_zeros();
                (word != 0).then(|| {
                    word &= word - 1;
                    index as u64 * 64 + u64::from(bit)
                })
            })
        })
    }
}
