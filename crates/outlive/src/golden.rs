//! Files with the text or bytes of a format as a release wrote them first. Each stays as long as its version is read.

use std::path::{Path, PathBuf};
use std::{env, fs};

/// What to do when a test of a golden file fails.
pub(crate) const REMEDY: &str = "the release before could not read this, and a host that goes back to it neither. Give the \
    new text a new version, which is written once the release before reads it, make its file with \
    OUTLIVE_WRITE_GOLDEN=1, and keep the old file with its reader (docs/upgrade.md)";

fn place(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// The text of a file.
pub(crate) fn text(name: &str) -> String {
    fs::read_to_string(place(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Compares what is written now with the file. Returns the file's text, for its reader.
pub(crate) fn keeps(name: &str, written: &str) -> String {
    // A file that is there is never changed.
    if env::var_os("OUTLIVE_WRITE_GOLDEN").is_some() && !place(name).exists() {
        fs::write(place(name), written).unwrap();
    }
    let golden = text(name);
    assert!(golden == written, "{name} would now be written as\n{written}\n{REMEDY}");
    golden
}
