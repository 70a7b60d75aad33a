//! Bodies of fuzz targets: hostile disks.

use crate::{Limits, read};

/// Where a fuzzer's bytes go: the first kilobytes of a file system decide, and its data may be anywhere.
const BYTES: usize = 1 << 20;

/// A disk with any contents. `data` is a list of patches to a disk of zeroes: three bytes of offset, in units of 16
/// bytes, one of length, and the bytes; so a short input reaches every place that matters.
pub fn disk(data: &[u8]) {
    let mut bytes = vec![0; BYTES];
    patch(&mut bytes, data);
    look(bytes);
}

/// A file system with any changes, in the same form.
pub fn changed(file_system: &[u8], data: &[u8]) {
    let mut bytes = file_system.to_vec();
    patch(&mut bytes, data);
    look(bytes);
}

fn patch(bytes: &mut [u8], mut data: &[u8]) {
    while let [a, b, c, length, rest @ ..] = data {
        let at = (usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c)) * 16;
        let (new, after) = rest.split_at(rest.len().min(usize::from(*length) + 1));
        if let Some(place) = bytes.get_mut(at..at + new.len()) {
            place.copy_from_slice(new);
        }
        data = after;
    }
}

/// A disk as it is.
pub fn look(bytes: Vec<u8>) {
    let limits =
        Limits { kernel: 1 << 20, initrd: 1 << 20, rest: 16 << 20, memory: 8 << 20, ..Limits::default() };
    let length = bytes.len();
    match read(Box::new(bytes), &limits) {
        Ok(boot) => assert!(boot.kernel.len() <= 1 << 20 && boot.initrd.len() <= 1 << 20),
        Err(error) => assert!(error.to_string().len() < 100_000 + length),
    }
}

/// A configuration of GRUB, entries of the Boot Loader Specification and environment blocks, without a disk around.
pub fn text(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    crate::grub::fuzz(&text);
    crate::bls::Bls::parse("a+1-2.conf", &text);
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Each input that was interesting once, and each beginning of it.
    #[test]
    fn what_fuzzers_have_found_is_survived() {
        let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
        for (name, target) in [("disk", disk as fn(&[u8])), ("grub", text)] {
            let mut inputs = 0;
            for entry in std::fs::read_dir(corpora.join(name)).unwrap() {
                let input = std::fs::read(entry.unwrap().path()).unwrap();
                (0..=input.len()).rev().step_by(97).for_each(|length| target(&input[..length]));
                inputs += 1;
            }
            assert!(inputs > 2, "{name}");
        }
    }
}
