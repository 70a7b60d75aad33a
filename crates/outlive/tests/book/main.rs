//! The documents are a book that holds together: every page is in its table of contents, every link leads somewhere, and
//! every command line in it is one that the program understands.

#![forbid(unsafe_code)]

mod alerts;
mod commands;
mod links;
mod pages;
mod shell;
