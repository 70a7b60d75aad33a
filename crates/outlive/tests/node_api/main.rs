//! The API of a node as other hosts and operators use it: a real node on loopback, the commands as its clients, and
//! those who have no business there.

#![forbid(unsafe_code)]

mod clients;
mod doctor;
mod keys;
mod strangers;
mod support;
