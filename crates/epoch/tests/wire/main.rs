//! The wire format, from the outside: its bytes, its refusals, and every kind of damage.

mod common;
mod damage;
mod golden;
mod granules;
mod refusals;
mod versions;
