//! "It must survive": whole hosts, killed, frozen, cut off, lied to and shut down, while clients watch.
//!
//! Every test has two hosts and a client network of its own (see [`support`]). Random choices have a seed
//! that is printed; `OUTLIVE_SEED` repeats them. Where VMs cannot run, a test says `skipped:` and why.

#![forbid(unsafe_code)]

mod arbiters;
mod arbitration;
mod audit;
mod audit_disks;
mod broken_disks;
mod demo;
mod disks;
mod ends;
mod errors;
mod fence;
mod freeze;
mod hand_over;
mod host_faults;
mod host_network;
mod kills;
mod known;
mod link;
mod metrics;
mod node;
mod node_state;
mod output;
mod own_kernel;
mod readers;
mod recorded;
mod redis;
mod refusals;
mod rejoin;
mod renewal;
mod rewind;
mod sandbox;
mod self_check;
mod sentinel;
mod shared_disks;
mod slow_disk;
mod slow_link;
mod soak;
mod standby;
mod status;
mod strangers;
mod supervised;
mod support;
mod tail;
mod time_machine;
mod torture;
mod upgrade;
mod uplinks;
mod versions;
mod wedged;
