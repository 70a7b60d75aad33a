//! The Redis serialisation protocol, version 2: requests in, replies out.

mod parser;
mod reply;

#[cfg(test)]
mod tests;

pub use parser::{Args, Fed, MAX_BULK, ParseError, Parser, number};
pub use reply::{Reply, decimal};
