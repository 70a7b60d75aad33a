//! An entry point for fuzzers: a record whose files have been changed. Whatever they are, nothing panics, and a checkpoint
//! that is found can be played.

use std::fs;
use std::io;
use std::path::Path;

use outlive_epoch::{GfnRange, Layout, RecordBuf, StateKind, StateSection};
use outlive_epoch::{Hello, Incoming, Limits, Lineage, PAGE_SIZE, PageEntry, StateBuf, VersionRange, VmId};

use crate::base::Base;
use crate::frame::Frame;
use crate::places::{LOCK, RunPlaces};
use crate::run::write_introduction;
use crate::segment::SegmentWriter;
use crate::{At, PlayError, Record};

/// A good record of three checkpoints, and changes to its files: for each a byte that says which file, two bytes of offset,
/// one of length less one, and the bytes. A length of 256 cuts the file there.
pub fn record(data: &[u8]) {
    let Ok(directory) = tempfile::tempdir() else { return };
    let places = RunPlaces::of(directory.path(), 1);
    let Ok(log) = write(&places) else { return };
    let files = [places.introduction(), places.base(), log];
    let mut rest = data;
    while let [file, high, low, length, after @ ..] = rest {
        let path = &files[usize::from(*file) % files.len()];
        let at = usize::from(*high) << 8 | usize::from(*low);
        let (new, after) = after.split_at(after.len().min(usize::from(*length) + 1));
        rest = after;
        let Ok(mut bytes) = fs::read(path) else { return };
        if *length == u8::MAX {
            bytes.truncate(at);
        } else if let Some(place) = bytes.get_mut(at..at + new.len()) {
            place.copy_from_slice(new);
        }
        if fs::write(path, bytes).is_err() {
            return;
        }
    }
    play(directory.path());
}

/// Writes a record, and returns the path of its segment.
fn write(places: &RunPlaces) -> io::Result<std::path::PathBuf> {
    fs::create_dir(&places.directory)?;
    fs::write(places.directory.join(LOCK), "")?;
    fs::write(places.memory(), "")?;
    write_introduction(places, &hello()?)?;
    Base { from: 1, time_us: 1 }.write(&places.base())?;
    let mut segment: Option<SegmentWriter> = None;
    for number in 1..=3 {
        let mut state = StateBuf::default();
        let bytes = [number as u8; 40];
        state.push(StateSection { kind: StateKind::Vcpu, version: 1, index: 0, bytes: &bytes });
        let frame = Frame {
            generation: 1,
            number,
            time_us: number,
            entries: vec![PageEntry::raw(number), PageEntry::zero(number + 1)],
            data: vec![number as u8; PAGE_SIZE],
            state,
            hashes: Default::default(),
            writes: RecordBuf::default(),
            queued: 0,
        };
        match &mut segment {
            Some(segment) => segment.push(&frame)?,
            None => segment = Some(SegmentWriter::begin(&places.directory, &frame, &StateBuf::default())?),
        }
    }
    segment.as_mut().map_or(Ok(()), SegmentWriter::flush)?;
    Ok(crate::segment::SegmentName { first: 1, time_us: 1 }.path(&places.directory))
}

fn hello() -> io::Result<Hello> {
    Ok(Hello {
        vm: VmId([1; 16]),
        generation: 1,
        vcpus: 1,
        memory_bytes: 64 * PAGE_SIZE as u64,
        layout: Layout::new(vec![GfnRange { start: 0, pages: 64 }]).map_err(io::Error::other)?,
        firmware_bytes: 0,
        devices: Vec::new(),
        mac: None,
        limits: Limits { max_pages: 64, max_state_bytes: 4096, slots: 2, max_disk_bytes: 4096 },
        interval_us: 1000,
        dead_after_us: 100_000,
        name: String::new(),
        host: String::new(),
        tracker: String::new(),
        vendor: String::new(),
        arbiter: String::new(),
        lineage: Lineage::default(),
        versions: VersionRange::CURRENT,
        microcode: 0,
        vcpu: None,
        since: None,
    })
}

fn play(directory: &Path) {
    let Ok(record) = Record::open(directory) else { return };
    for at in [At::Newest, At::Time(std::time::SystemTime::now()), At::Checkpoint { run: None, number: 2 }] {
        let Ok(found) = record.find(&at) else { continue };
        let Ok(mut playback) = record.play(&found) else { continue };
        let mut last = 0;
        let look = |incoming: &mut Incoming| {
            last = incoming.checkpoint().map_or(0, |it| it.number());
            Ok::<_, PlayError>(())
        };
        playback
            .each(look)
            .unwrap_or_else(|error| panic!("{found:?} was found and cannot be played: {error}"));
        assert_eq!(last, found.checkpoint);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fuzzers_found_breaks_nothing() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/record");
        let inputs = fs::read_dir(corpus).unwrap();
        let count = inputs.map(|input| record(&fs::read(input.unwrap().path()).unwrap())).count();
        assert!(count > 0);
    }

    #[test]
    fn any_change_is_noticed_or_harmless() {
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..200 {
            let mut data = Vec::new();
            for _ in 0..random.usize(0..4) {
                let length = random.u8(..) / (1 + random.u8(..64));
                data.extend([random.u8(..), random.u8(..18), random.u8(..), length]);
                data.extend((0..=length).map(|_| random.u8(..)));
            }
            record(&data);
        }
    }
}
