//! The node: one service per host that owns its VMs.
//!
//! It reads their definitions, keeps what is desired of each, starts and restarts their processes (`outlive run`), and
//! offers all of this at an API. It decides nothing about a VM that two hosts have: each of its processes does, with
//! the other host and the arbiter, as it does without a node. So a node may be killed, stopped or upgraded at any time:
//! the processes live on, and the next node adopts them.
//!
//! - [`definition`]: files in TOML, and what two VMs must not have in common. [`Program`]: the program whose processes
//!   they are, and its options.
//! - `records`: desired state and process of each VM, on disk. `process`: one process, from its start or adoption to its
//!   end. `ended`: how it ended. `log`: its output, bounded. `asking`: what it says at the socket of `outlive status`.
//!   `events`: the place of what it tells. `words`: its remedies, where a node keeps it. `short`: commands that are waited for.
//!   `bounded`: looks at files that may never come back.
//! - `keeper`: a thread for each VM. `keeper/plan.rs` decides when a process is started again.
//! - `node`: all of them, with `node/definitions.rs` and `node/orders.rs`; `drain`: maintenance; `jobs`: long work; `feed`: events.
//! - `checkup`: what `outlive check` says of this host. [`peer`]: what the node of another host says, and how far away it is.
//! - `figures`: the last minutes of each VM. `picture`: a page that shows all of this, from the API.
//! - [`api`]: REST on a socket, and over TLS for other hosts. [`remote`]: what the program says of keys and certificates.
//! - [`cli`]: `outlive node`, `outlive vm` and `outlive top`; `client`: their way to the API; `host`: which one; `sse`: its stream of events, read.
//!   `page`: the way of a browser to it, `outlive node page`. `top`: the picture in a terminal. `terminal`: texts of others, as they are printed.
//!   `printed`: standard output.
//!
//! Nothing here is waited for by a process that runs a guest, and nothing but `terminal` and `printed` runs in one.

#![forbid(unsafe_code)]

pub mod api;
mod asking;
mod bounded;
mod checkup;
pub mod cli;
mod client;
pub mod definition;
mod drain;
mod ended;
mod error;
mod events;
mod feed;
mod figures;
mod files;
mod host;
mod jobs;
mod keeper;
mod log;
mod node;
#[cfg(test)]
mod node_tests;
mod page;
pub mod peer;
mod picture;
mod printed;
mod process;
mod program;
mod records;
pub mod remote;
mod short;
mod sse;
mod terminal;
#[cfg(test)]
mod testing;
mod top;
mod view;
mod words;

pub use asking::{BEING_STARTED, UNDECIDED};
pub use error::NodeError;
pub use figures::{heat_in, point_between};
pub use host::Host;
pub use node::{Node, Places, STATE, STATE_VARIABLE, StartError};
pub use printed::{Printed, printed};
pub use program::{Judge, Program, Remark, Sense, one_line};
pub use terminal::{shown, shown_in_line};
pub use view::READ_OF_STATUS;
