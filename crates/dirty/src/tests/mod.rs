//! Tests of the whole tracker: against a naive kernel of our own, and against the running kernel.

mod alloc;
mod enable;
mod guest;
mod hotplug;
mod kernel;
mod limits;
mod properties;
mod rates;
mod schedules;
mod stamps;
mod storms;
mod traps;
mod uffd;
