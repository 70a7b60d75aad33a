//! Heartbeats get through, however much else is to be sent, and copies of the guest's frames in their order.

mod heartbeats;
mod rig;
mod tail;
mod tls;
