//! Words between a host and a served arbiter, with any content.

pub use super::served::fuzz::served;
