//! The transport register by register.
