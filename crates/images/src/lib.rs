//! Reads disk images of other programs, and makes seeds for cloud-init.
//!
//! [`Image::open`] takes a qcow2, vmdk, vhdx, vdi or raw file and reads it from its first byte to its last, with its
//! holes. [`seed`] makes the small file system from which cloud-init configures a new server.
//!
//! **Nothing in an image is believed.** It may come from the internet. So its format is told by its first bytes and
//! never by its name; each table is bounded before anything is allocated; no table is held whole, except qcow2's first
//! (32 MiB at most); a cluster that is stored once is given once; and another file that an image names is opened only
//! if the caller allows it, because it could be any file of this host.
//!
//! Why not a library or `qemu-img`: the crate imago reads qcow2 and vmdk, but it is made for disks in use (20,000
//! lines, its own cache of clusters that it writes, 300 lines with `unsafe`) and knows neither vhdx nor vdi nor zstd;
//! `qemu-img` must be installed, and whoever gives it a hostile image has to find every name of a file in it before.
//! To read an image once, from its beginning to its end, takes a small part of either.
//!
//! ```text
//! source.rs   a file that is read                magic.rs     which format it is
//! qcow2/      header.rs, table.rs                 vmdk.rs, vhdx.rs, vdi.rs, raw.rs
//! packed.rs   compressed clusters                 layer.rs     what formats have in common
//! image.rs    an image with those that it is based on
//! seed/       fat.rs the file system; kinds.rs what user-data may be
//! ```

#![forbid(unsafe_code)]

mod bytes;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod image;
mod layer;
mod magic;
mod packed;
mod qcow2;
mod raw;
pub mod seed;
mod source;
mod vdi;
mod vhdx;
mod vmdk;

#[cfg(test)]
mod tests;

pub use error::{OpenError, ReadError};
pub use image::{Files, Image, Span};
pub use layer::Note;
pub use magic::{Format, NAMED_BY, named};
pub use source::Source;

/// The largest disk that is read: 64 TiB, as for Hyper-V's format.
pub const MAX_BYTES: u64 = 64 << 40;
