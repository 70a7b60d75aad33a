//! What a person at a terminal sees while a VM runs. It listens to the event stream; the engine does not know
//! it.

mod progress;

pub(crate) use progress::{bytes_bar, show_progress};
