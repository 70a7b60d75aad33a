//! What GRUB 2 would boot by its `grub.cfg`, without anybody at its menu.
//!
//! The configuration is a script: it is parsed and carried out with the disk's file systems to look at, as far as
//! the scripts of distributions need it. Commands that only concern screen and firmware succeed and do nothing.
//! `next_entry`, the choice for one boot, is not followed: GRUB takes it back by a write to the disk, and nothing
//! here writes.

mod commands;
mod environment;
mod menu;
mod syntax;
mod test_command;
mod words;

use crate::grub::commands::Grub;
use crate::volumes::{BootDirectory, Volumes};
use crate::{Entry, ReadError};

/// Longest configuration.
const CONFIGURATION: u64 = 1 << 20;
/// Where it is in a boot directory.
const NAMES: [&str; 2] = ["/grub/grub.cfg", "/grub2/grub.cfg"];

/// The default entry of the first configuration. `None` if there is none.
pub(crate) fn choose(volumes: &Volumes, notes: &mut Vec<String>) -> Result<Option<Entry>, ReadError> {
    for BootDirectory { volume, prefix } in volumes.boot_directories()? {
        let Some(files) = volumes.files(volume) else { continue };
        for name in NAMES {
            let path = format!("{prefix}{name}");
            let Some(text) = files.read(&path, CONFIGURATION)? else { continue };
            let understood = syntax::parse(&String::from_utf8_lossy(&text), volumes.source());
            let script = understood.map_err(|fault| fault.of(&path))?;
            let mut grub = Grub::new(volumes, volume, &path);
            grub.run(&script)?;
            let entry = grub.choose()?;
            notes.append(&mut grub.notes);
            if entry.is_some() {
                return Ok(entry);
            }
        }
    }
    Ok(None)
}

/// A script on a disk without any file.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(text: &str) {
    let limits = crate::Limits { memory: 4 << 20, ..crate::Limits::default() };
    let source = std::rc::Rc::new(crate::source::Source::new(Box::new(vec![0; 4096]), &limits));
    let Ok(volumes) = Volumes::open(&source) else { return };
    environment::parse_block(text);
    let Ok(script) = syntax::parse(text, &source) else { return };
    let mut grub = Grub::new(&volumes, 0, "/boot/grub/grub.cfg");
    if grub.run(&script).is_ok() {
        let _ = grub.choose();
    }
}
