//! The first file system of a host: an archive of the kind `newc` (Documentation/driver-api/early-userspace/
//! buffer-format.rst of the kernel), with programs and the libraries that they need.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::output;

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_644;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;
/// /dev/console, which the kernel opens for the first process.
const CONSOLE: (u32, u32) = (5, 1);
const END: &str = "TRAILER!!!";

/// Why the archive could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitramfsError {
    /// A file to be put into it could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The libraries of a program could not be determined.
    #[error("cannot find the libraries of {0} with ldd, which is in the Debian package libc-bin")]
    Libraries(PathBuf),
    /// A library of a program is not on this machine.
    #[error("{program} needs {library}, which is not on this machine")]
    Missing {
        /// Which.
        program: PathBuf,
        /// The library that it needs.
        library: String,
    },
    /// A file of 4 GiB or more cannot be in such an archive.
    #[error("{0} is too large for an initramfs")]
    TooLarge(String),
}

/// The archive under construction. It adds directories by itself.
pub(crate) struct Initramfs {
    bytes: Vec<u8>,
    /// Its contents, by their path without the first `/`.
    names: BTreeSet<String>,
}

impl Initramfs {
    pub(crate) fn new() -> Initramfs {
        let mut archive = Initramfs { bytes: Vec::new(), names: BTreeSet::new() };
        archive.directory("dev");
        archive.entry("dev/console", CHARACTER_DEVICE, CONSOLE, &[]);
        archive
    }

    /// Adds an empty directory, unless it is there.
    pub(crate) fn directory(&mut self, path: &str) {
        let path = path.trim_start_matches('/');
        if self.names.contains(path) {
            return;
        }
        self.parents(path);
        self.entry(path, DIRECTORY, (0, 0), &[]);
    }

    /// Adds a file that the host reads.
    pub(crate) fn file(&mut self, path: &str, contents: &[u8]) -> Result<(), InitramfsError> {
        self.put(path, FILE, contents)
    }

    /// Adds a file that the host runs.
    pub(crate) fn script(&mut self, path: &str, contents: &[u8]) -> Result<(), InitramfsError> {
        self.put(path, PROGRAM, contents)
    }

    /// Adds a program of this machine, with the libraries of this machine that it needs, which keep their
    /// paths.
    pub(crate) fn program(&mut self, path: &str, local: &Path) -> Result<(), InitramfsError> {
        let listed = output(Command::new("ldd").arg(local).env("LC_ALL", "C"));
        let listed = listed.ok_or_else(|| InitramfsError::Libraries(local.to_path_buf()))?;
        for library in libraries(&listed) {
            let missing = |library: &str| InitramfsError::Missing {
                program: local.to_path_buf(),
                library: library.to_string(),
            };
            let library = library.map_err(missing)?;
            self.script(library, &read(Path::new(library))?)?;
        }
        self.script(path, &read(local)?)
    }

    /// The archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry(END, 0, (0, 0), &[]);
        self.bytes
    }

    /// If two files have the same name, the first one stays.
    fn put(&mut self, path: &str, mode: u32, contents: &[u8]) -> Result<(), InitramfsError> {
        let path = path.trim_start_matches('/');
        if u32::try_from(contents.len()).is_err() {
            return Err(InitramfsError::TooLarge(path.to_string()));
        }
        if !self.names.contains(path) {
            self.parents(path);
            self.entry(path, mode, (0, 0), contents);
        }
        Ok(())
    }

    fn parents(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
    }

    /// A header of 13 numbers of 8 digits, the name with a zero, the contents; both padded to 4 bytes.
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), contents: &[u8]) {
        self.names.insert(name.to_string());
        let (number, links, length) = (self.names.len(), 1, contents.len());
        let (major, minor) = device;
        let head = format!(
            "070701{number:08x}{mode:08x}{:016x}{links:08x}{:08x}{length:08x}{:016x}{major:08x}{minor:08x}{:08x}{:08x}",
            0, // owner and group
            0, // time
            0, // the device that it is on, major and minor
            name.len() + 1,
            0, // a check sum, of another kind of archive
        );
        self.bytes.extend(head.as_bytes());
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.fill();
        self.bytes.extend(contents);
        self.fill();
    }

    fn fill(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, InitramfsError> {
    fs::read(path).map_err(|source| InitramfsError::Read { path: path.to_path_buf(), source })
}

/// The paths in the output of ldd, or the name of a library that it has not found.
fn libraries(listed: &str) -> impl Iterator<Item = Result<&str, &str>> {
    listed.lines().filter_map(|line| {
        let (name, path) = match line.trim().split_once(" => ") {
            Some((name, path)) => (name, path),
            None => (line.trim(), line.trim()),
        };
        if path.starts_with("not found") {
            return Some(Err(name));
        }
        // The kernel's own library, and "statically linked", have no path.
        path.starts_with('/').then(|| Ok(path.split(' ').next().unwrap_or(path)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Entry {
        name: String,
        mode: u32,
        device: (u32, u32),
        contents: Vec<u8>,
    }

    /// The contents of an archive; checks everything that a reader relies on.
    fn entries(bytes: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            assert_eq!(at % 4, 0);
            assert_eq!(&bytes[at..at + 6], b"070701");
            let digits = std::str::from_utf8(&bytes[at + 6..at + 110]).unwrap();
            let field: Vec<_> =
                (0..13).map(|index| u32::from_str_radix(&digits[index * 8..][..8], 16).unwrap()).collect();
            let (length, name_length) = (field[6] as usize, field[11] as usize);
            let name = &bytes[at + 110..at + 110 + name_length];
            assert_eq!(name.last(), Some(&0));
            let start = (at + 110 + name_length).next_multiple_of(4);
            at = (start + length).next_multiple_of(4);
            let name = String::from_utf8(name[..name_length - 1].to_vec()).unwrap();
            let contents = bytes[start..start + length].to_vec();
            entries.push(Entry { name, mode: field[1], device: (field[9], field[10]), contents });
        }
        assert_eq!(at, bytes.len());
        entries
    }

    #[test]
    fn a_reader_finds_what_was_put_in() {
        let mut archive = Initramfs::new();
        archive.script("/init", b"#!/bin/sh\n").unwrap();
        archive.file("/lib/deep/down", b"12345").unwrap();
        archive.directory("/lib/deep");
        archive.file("lib/deep/down", b"again").unwrap();
        archive.file("/empty", b"").unwrap();
        let entries = entries(&archive.finish());
        let names: Vec<_> = entries.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names, ["dev", "dev/console", "init", "lib", "lib/deep", "lib/deep/down", "empty", END]);
        let modes: Vec<_> = entries.iter().map(|entry| entry.mode).collect();
        assert_eq!(modes[..6], [0o40755, 0o20600, 0o100755, 0o40755, 0o40755, 0o100644]);
        assert_eq!(entries[1].device, (5, 1));
        assert_eq!(
            (&entries[2].contents[..], &entries[5].contents[..]),
            (&b"#!/bin/sh\n"[..], &b"12345"[..])
        );
    }

    #[test]
    fn an_entry_byte_by_byte() {
        let mut archive = Initramfs { bytes: Vec::new(), names: BTreeSet::new() };
        archive.file("/a", b"hello").unwrap();
        let head = "070701\
                    00000001\
                    000081a4\
                    00000000\
                    00000000\
                    00000001\
                    00000000\
                    00000005\
                    00000000\
                    00000000\
                    00000000\
                    00000000\
                    00000002\
                    00000000";
        assert_eq!(archive.bytes, [head.as_bytes(), b"a\0", b"hello\0\0\0"].concat());
    }

    #[test]
    fn what_ldd_says() {
        let listed = "\tlinux-vdso.so.1 (0x00007ffd)\n\
                      \tlibgcc_s.so.1 => /lib/x86_64-linux-gnu/libgcc_s.so.1 (0x00007fa6)\n\
                      \t/lib64/ld-linux-x86-64.so.2 (0x00007fa6)\n\
                      \tlibgone.so.7 => not found\n";
        let found: Vec<_> = libraries(listed).collect();
        let expected = [
            Ok("/lib/x86_64-linux-gnu/libgcc_s.so.1"),
            Ok("/lib64/ld-linux-x86-64.so.2"),
            Err("libgone.so.7"),
        ];
        assert_eq!(found, expected);
        assert_eq!(libraries("\tstatically linked\n").count(), 0);
    }

    #[test]
    fn this_program_comes_with_its_libraries() {
        let mut archive = Initramfs::new();
        archive.program("/bin/tests", &std::env::current_exe().unwrap()).unwrap();
        let has = |part: &str| archive.names.iter().any(|name| name.contains(part));
        assert!(has("bin/tests") && has("libc.so") && has("ld-linux"), "{:?}", archive.names);
        let error = archive.program("/bin/x", Path::new("/nowhere/x")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/x"), "{error}");
    }
}
