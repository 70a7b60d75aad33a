//! `outlive top`: the picture of a node (`picture`) in a terminal.
//!
//! A thread asks the node and gives orders (`ask`), another one reads keys, and a third follows the events; all that they
//! hear comes to one place in order. `state` keeps it and says what a key means. `draw` paints the state and does nothing
//! else, so that every picture can be looked at by a test. `screen` has the terminal, and gives it back however this ends.
//!
//! - `text`: words and numbers; what a node says is cleaned there, before anything is drawn. `vm`: what is shown of a VM.
//!   `verdict`: what a failure of this host now would mean. `lanes`: the time line of a VM. `heat`: where its memory
//!   is written.

mod ask;
mod draw;
mod heat;
mod lanes;
mod screen;
mod state;
#[cfg(test)]
mod tests;
mod text;
mod verdict;
mod vm;

pub(crate) use ask::{Asker, Told, follow};
pub(crate) use draw::as_text;
pub(crate) use screen::{give_back, is_terminal, show};
pub(crate) use state::State;
pub(crate) use text::now;
