//! What a person at a terminal sees while a VM runs. It listens to the event stream; the engine does not know
//! it.

mod progress;

use std::path::Path;

pub(crate) use progress::{bytes_bar, checkpoints_bar, show_progress};

/// A path as a shell reads it, for a command that a person copies.
pub(crate) fn shell_word(path: &Path) -> String {
    let path = path.display().to_string();
    // No path has the byte that cannot be quoted.
    shlex::try_quote(&path).map_or(path.clone(), Into::into)
}
