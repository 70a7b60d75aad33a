//! Sidecars and journals with any content.

use std::cell::RefCell;
use std::io;

use outlive_epoch::{DiskOp, DiskRecord, VmId};

use super::image::Store;
use super::journal::{Identity, Journal, START};
use super::shared::Note;
use super::sidecar::Sidecar;

/// A text beside an image. One that is read is written and read as the same again.
///
/// # Panics
/// If it is not.
pub fn sidecar(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok((sidecar, stamp)) = Sidecar::parse(text) {
        let again = sidecar.text(stamp).expect("what was read can be written");
        assert!(Sidecar::parse(&again).is_ok(), "what was written can be read: {again}");
    }
    if let Ok(note) = Note::parse(text) {
        let again = note.text().expect("what was read can be written");
        assert_eq!(Note::parse(&again).as_ref(), Ok(&note), "what was written can be read: {again}");
    }
}

/// A file in memory.
struct Bytes(RefCell<Vec<u8>>);

impl Store for Bytes {
    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = self.0.borrow();
        let from = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)?.get(..to.len()));
        to.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let (mut to, offset) = (self.0.borrow_mut(), offset as usize);
        let end = offset + bytes.len();
        if to.len() < end {
            to.resize(end, 0);
        }
        to[offset..end].copy_from_slice(bytes);
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write(&vec![0; len as usize], offset)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(self.0.borrow().len() as u64)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok((offset < self.bytes()?).then_some(offset))
    }
}

/// A journal whose epochs hold any bytes, of which some are damaged afterwards. What is replayed lies inside
/// the disks.
///
/// Input: the sizes of two disks in sectors; epochs, each as length, number and so many bytes, up to one of
/// length 0; damage, each as two bytes of place and one of what is there.
///
/// # Panics
/// If something that is replayed does not lie there.
pub fn journal(data: &[u8]) {
    let Some((sizes, mut rest)) = data.split_first_chunk::<2>() else { return };
    let sizes: Vec<u64> = sizes.iter().map(|sectors| u64::from(*sectors) * 512).collect();
    let identity = Identity { vm: VmId([7; 16]), generation: 1, sizes: sizes.clone() };
    let store = Bytes(RefCell::new(Vec::new()));
    let mut journal = Journal::create(store, identity, 0).expect("memory takes everything");
    while let Some((&[length, number], after)) = rest.split_first_chunk::<2>() {
        let (records, after) = after.split_at(after.len().min(length.into()));
        rest = after;
        if length == 0 {
            break;
        }
        journal.append(number.into(), records).expect("memory takes everything");
    }
    let store = journal.into_store();
    for damage in rest.chunks_exact(3) {
        let mut bytes = store.0.borrow_mut();
        let place = usize::from(u16::from_le_bytes([damage[0], damage[1]]));
        // The header's zeroes are of no interest.
        let place = if damage[0] & 1 == 0 { place % 256 } else { START as usize + place };
        if let Some(byte) = bytes.get_mut(place) {
            *byte = damage[2];
        }
    }
    let Ok((mut journal, _)) = Journal::open(store) else { return };
    let sizes = journal.identity().sizes.clone();
    let replayed = journal.replay(|records| {
        for DiskRecord { disk, offset, op } in records.iter() {
            let len = match op {
                DiskOp::Data(bytes) => bytes.len() as u64,
                DiskOp::Zero(len) => len,
                DiskOp::Flush => continue,
            };
            assert!(offset + len <= sizes[usize::from(disk)], "a record is outside of its disk");
        }
        Ok(())
    });
    drop(replayed);
}
