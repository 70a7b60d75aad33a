//! A file that loses its power: what was not made durable is kept or lost piece by piece, in any order.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::disk::image::Store;

/// What a disk writes or loses as a whole.
const SECTOR: usize = 512;

/// The power of all files of a test: after so many writes and syncs it is gone.
#[derive(Clone)]
pub(super) struct Power(Arc<Mutex<u64>>);

impl Power {
    pub(super) fn for_operations(count: u64) -> Self {
        Self(Arc::new(Mutex::new(count)))
    }

    pub(super) fn steady() -> Self {
        Self::for_operations(u64::MAX)
    }

    fn use_one(&self) -> io::Result<()> {
        let mut left = self.0.lock().unwrap();
        *left = left.checked_sub(1).ok_or_else(|| io::Error::other("no power"))?;
        Ok(())
    }
}

#[derive(Default)]
struct Content {
    /// What the program reads.
    seen: Vec<u8>,
    /// What a loss of power leaves, at least.
    durable: Vec<u8>,
    /// Sectors written since the last sync, with the bytes they may have.
    pending: Vec<(usize, [u8; SECTOR])>,
}

#[derive(Clone)]
pub(super) struct File {
    content: Arc<Mutex<Content>>,
    power: Power,
}

impl File {
    /// A file whose bytes are durable.
    pub(super) fn new(bytes: Vec<u8>, power: &Power) -> Self {
        let content = Content { durable: bytes.clone(), seen: bytes, pending: Vec::new() };
        Self { content: Arc::new(Mutex::new(content)), power: power.clone() }
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap()
    }

    pub(super) fn seen(&self) -> Vec<u8> {
        self.content().seen.clone()
    }

    /// What is there when the power is back: every sector that was not made durable has any of the contents
    /// it had since.
    pub(super) fn after_power_loss(&self, mut keep: impl FnMut() -> bool) -> Vec<u8> {
        let content = self.content();
        let mut bytes = content.durable.clone();
        for (sector, data) in &content.pending {
            if keep() {
                let end = (sector + 1) * SECTOR;
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[sector * SECTOR..end].copy_from_slice(data);
            }
        }
        bytes
    }

    fn change(&self, offset: u64, len: usize, write: impl FnOnce(&mut [u8])) -> io::Result<()> {
        let power = self.power.use_one();
        let mut content = self.content();
        let (start, end) = (offset as usize, offset as usize + len);
        let sectors = start / SECTOR..end.div_ceil(SECTOR);
        if content.seen.len() < sectors.end * SECTOR {
            content.seen.resize(sectors.end * SECTOR, 0);
        }
        write(&mut content.seen[start..end]);
        for sector in sectors {
            let mut data = [0; SECTOR];
            data.copy_from_slice(&content.seen[sector * SECTOR..(sector + 1) * SECTOR]);
            content.pending.push((sector, data));
        }
        // The write during which the power goes may arrive all the same.
        power
    }
}

impl Store for File {
    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        to.copy_from_slice(&self.content().seen[offset as usize..offset as usize + to.len()]);
        Ok(())
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.change(offset, bytes.len(), |range| range.copy_from_slice(bytes))
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(offset, len as usize, |range| range.fill(0))
    }

    fn sync(&self) -> io::Result<()> {
        self.power.use_one()?;
        let mut content = self.content();
        content.durable = content.seen.clone();
        content.pending.clear();
        Ok(())
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(self.content().seen.len() as u64)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok(Some(offset))
    }
}
