//! The file arbiter under races of threads and processes, crashes, damage and missing directories.

mod claims;
mod damage;
mod directories;
mod races;
mod support;
