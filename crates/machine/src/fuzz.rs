//! Entry points for fuzzers: what a guest, a peer or a file gives this crate. Whatever the bytes are, nothing
//! panics.

pub use crate::devices::virtio::blk::fuzz::fuzz as blk;
pub use crate::devices::virtio::fuzz::{console, rng};

use crate::acpi::Description;
use crate::boot::linux;
use crate::check::Hashes;
use crate::devices::serial::SerialState;
use crate::devices::virtio::blk::BlockState;
use crate::devices::virtio::console::ScreenSize;
use crate::devices::virtio::net::persist::NetState;
use crate::devices::virtio::persist::SavedState;
use crate::devices::virtio::rng::RngState;
use crate::memory::{MIN_MEMORY, Ram};
use crate::state::FieldReader;
use crate::{LinuxBoot, PAGE_SIZE};

/// The network card.
///
/// # Panics
/// If the device does something it must not do.
pub fn net(data: &[u8]) {
    crate::devices::virtio::net::fuzz::run(data);
}

/// State sections of devices, of the serial port and of a self-check. The first byte says which.
///
/// # Panics
/// If what was read is written differently.
pub fn state(data: &[u8]) {
    let Some((&kind, bytes)) = data.split_first() else { return };
    let mut again = Vec::new();
    let read = match kind % 7 {
        0 => BlockState::decode(bytes).map(|state| state.encode(&mut again)).is_ok(),
        1 => NetState::decode(bytes).map(|state| state.encode(&mut again)).is_ok(),
        2 => SavedState::<ScreenSize>::decode(bytes).map(|state| state.encode(&mut again)).is_ok(),
        3 => SavedState::<RngState>::decode(bytes).map(|state| state.encode(&mut again)).is_ok(),
        4 => SerialState::decode(bytes).map(|state| state.encode(&mut again)).is_ok(),
        5 => {
            // Its fields may stand in any order, with unknown ones between them.
            if let Ok(hashes) = Hashes::decode(bytes) {
                hashes.encode(&mut again);
                assert_eq!(Hashes::decode(&again).as_ref(), Ok(&hashes), "hashes survive the way");
            }
            return;
        }
        _ => {
            if let Ok(fields) = FieldReader::new(bytes) {
                (0..40).for_each(|field| _ = fields.get_array::<u64>(field));
            }
            return;
        }
    };
    assert!(!read || again == bytes, "a state survives the way unchanged");
}

/// A kernel with an initrd. The first two bytes are the initrd's length, of up to 64 KiB.
///
/// # Panics
/// If the loader does.
pub fn kernel(data: &[u8]) {
    let Some((len, kernel)) = data.split_first_chunk::<2>() else { return };
    let initrd = vec![1; usize::from(u16::from_le_bytes(*len))];
    let pages = (MIN_MEMORY / PAGE_SIZE as u64) as usize;
    let ram = Ram::new(MIN_MEMORY, pages).expect("memory");
    let boot = LinuxBoot::new(kernel.to_vec(), initrd, "console=ttyS0".into()).expect("a boot image");
    let description = Description { vcpus: 1, ..Default::default() };
    if let Ok(entry) = linux::load(&ram, &boot, &description) {
        assert!(entry < MIN_MEMORY, "the entry {entry:#x} is in memory");
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    type Target = fn(&[u8]);

    /// What fuzzers found to be interesting, or to break something once, is tried with every run of the tests.
    #[test]
    fn what_fuzzers_found_breaks_nothing() {
        let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
        let targets: [(&str, Target); 6] = [
            ("state", super::state),
            ("kernel", super::kernel),
            ("console", super::console),
            ("rng", super::rng),
            ("net", super::net),
            ("blk", super::blk),
        ];
        for (name, target) in targets {
            let inputs = fs::read_dir(corpora.join(name)).unwrap();
            let count = inputs.map(|input| target(&fs::read(input.unwrap().path()).unwrap())).count();
            assert!(count > 0, "no inputs of {name}");
        }
    }
}
