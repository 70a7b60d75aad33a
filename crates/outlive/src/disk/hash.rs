//! One number for the contents of an image, so that two hosts can compare theirs (invariant 4).

use std::io;

use outlive_epoch::{DISK_CHUNK, is_zero};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::image::{ChunkReader, Store, chunks};

/// A hash of the first `bytes` bytes of an image that nobody writes: a sum over its chunks. Chunks of zeroes
/// add nothing, so holes do not change the hash. The guest's writes wait for it and nobody forges an image to
/// deceive it, so the hash is a fast one, as for memory. `go_on` is asked before each chunk; the result is
/// `None` as soon as it says no.
pub(crate) fn contents(store: &impl Store, bytes: u64, go_on: impl Fn() -> bool) -> io::Result<Option<u64>> {
    let mut reader = ChunkReader::new(store, bytes);
    let mut buffer = vec![0; DISK_CHUNK];
    let mut all = 0u64;
    for chunk in 0..chunks(bytes) {
        if !go_on() {
            return Ok(None);
        }
        if let Some(bytes) = reader.read(chunk, &mut buffer)? {
            all = all.wrapping_add(xxh3_64_with_seed(bytes, chunk));
        }
    }
    Ok(Some(all))
}

/// The hash of one chunk, for the audit; 0 if it is all zeroes.
pub(crate) fn chunk(chunk: u64, bytes: &[u8]) -> u64 {
    if is_zero(bytes) { 0 } else { xxh3_64_with_seed(bytes, chunk) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    const BYTES: u64 = 9 * DISK_CHUNK as u64 + 1024;

    fn image(data: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(BYTES).unwrap();
        data.iter().for_each(|(at, bytes)| file.write_all_at(bytes, *at).unwrap());
        file
    }

    fn hash(file: &File) -> u64 {
        contents(file, BYTES, || true).unwrap().unwrap()
    }

    #[test]
    fn images_with_the_same_contents_have_the_same_hash_and_others_do_not() {
        let (chunk, one) = (DISK_CHUNK as u64, [1; 4096]);
        let sparse = image(&[(2 * chunk, &one), (BYTES - 5, b"end")]);
        // Written zeroes, and bytes behind the disk's end.
        let full = image(&[(0, &[0; 9 * DISK_CHUNK]), (2 * chunk, &one), (BYTES - 5, b"end"), (BYTES, &one)]);
        assert_eq!(hash(&sparse), hash(&full));
        full.write_all_at(&[2], 2 * chunk + 77).unwrap();
        assert_ne!(hash(&sparse), hash(&full), "one byte");
        assert_ne!(hash(&sparse), hash(&image(&[(3 * chunk, &one), (BYTES - 5, b"end")])), "another place");
        assert_ne!(hash(&sparse), hash(&image(&[(2 * chunk, &one)])), "the end");
        assert_eq!(contents(&sparse, BYTES, || false).unwrap(), None);
    }
}
