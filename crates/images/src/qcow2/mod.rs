//! QEMU's format: two levels of tables, of which the second is read as it is needed.

mod header;
mod table;

pub(crate) use header::Linked;
pub(crate) use table::Qcow2;
