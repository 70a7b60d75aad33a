//! Heartbeats get through, however much else is to be sent.

mod heartbeats;
mod rig;
