//! `outlive status`: what a running primary or standby says of itself to whoever looks.
//!
//! - `standing`: what is known, kept by those who write log and events. `answer`: what follows from it, as
//!   JSON. `shown`: the same for people.
//! - `survival`: what the loss of either host would mean.
//! - `place`: where the socket is. `server`: the thread that answers there.
//! - `command`: the other end, `outlive status`. `json`: its `--json`.
//! - `told`: the same facts as metrics have them ([`crate::metrics`]).
//! - `word`: an operator's word in the other direction, for a VM whose arbiter is a person.
//!
//! Nobody who decides, or runs the guest, waits for any of this.

mod answer;
mod command;
mod json;
mod place;
mod server;
mod shown;
mod standing;
mod survival;
mod told;
mod word;

pub use answer::{ArbiterSight, Status};
pub use command::command;
pub use survival::Survival;

pub use crate::heat::{HeatMap, HeatRange};
pub use crate::link::LinkKind;
pub(crate) use answer::span;
pub(crate) use place::{NoPlace, folders, usual};
pub(crate) use server::{Server, ServerError};
#[cfg(test)]
pub(crate) use standing::OtherSight;
pub(crate) use standing::{NO_PRIMARY, Progress, Standing};
pub(crate) use word::{give_up, go_on_alone, hand_over, take_over};
