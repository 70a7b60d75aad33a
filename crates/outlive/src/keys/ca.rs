//! Where the CA's own files are: beside the directory of keys and not in it, because a process that runs a VM may read
//! that directory and everything below.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::CA_KEY;

/// The directory for the CA of a directory of keys: `/etc/outlive/keys-ca` beside `/etc/outlive/keys`.
pub(super) fn place(keys: &Path) -> PathBuf {
    // A link to the keys is no other CA.
    let whole = fs::canonicalize(keys).or_else(|_| std::path::absolute(keys));
    let whole = whole.unwrap_or_else(|_| keys.to_owned());
    let mut name = whole.file_name().unwrap_or_default().to_owned();
    name.push("-ca");
    whole.with_file_name(name)
}

/// The private key of the CA of a directory of keys, where this release keeps it.
pub(crate) fn key(keys: &Path) -> PathBuf {
    place(keys).join(CA_KEY)
}

/// The directory where the CA's key is, or should be. Release 0.2.0 has it among the keys.
pub(super) fn found(keys: &Path) -> PathBuf {
    let place = place(keys);
    if !may_be_at(&place.join(CA_KEY)) && may_be_at(&keys.join(CA_KEY)) { keys.to_owned() } else { place }
}

/// Whether there is a file, or nobody may know.
pub(super) fn may_be_at(file: &Path) -> bool {
    !fs::metadata(file)
        .is_err_and(|error| matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory))
}

/// The complaint about a CA's key that is among the keys, with the remedy.
pub(crate) fn misplaced(keys: &Path) -> Option<String> {
    let file = keys.join(CA_KEY);
    if !fs::exists(&file).unwrap_or(false) {
        return None;
    }
    let (keys, place) = (keys.display(), place(keys));
    let place = place.display();
    Some(format!(
        "the CA's private key is among the keys, which a process that runs a VM may read: mkdir -p -m 700 {place} && \
         mv {keys}/ca.pem {keys}/issued {place}/"
    ))
}
