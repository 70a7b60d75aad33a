//! Sidecars of the previous release, which had no arbiter, no name and no ancestors.

use std::path::PathBuf;

use outlive_epoch::Lineage;

use super::{Role, Sidecar};
use crate::disk::provenance::{KnownArbiter, Provenance};

/// Whether a text is such a sidecar.
pub(super) fn is_old(text: &str) -> bool {
    text.lines().any(|line| line.trim() == "version = 1")
}

/// On an error, returns the number of the invalid line, from 1; 0 if a line is missing.
pub(super) fn parse(text: &str) -> Result<Sidecar, usize> {
    let (mut vm, mut disk, mut role) = (None, None, None);
    let (mut generation, mut checkpoint, mut whole, mut journal) = (None, None, None, None);
    for (index, line) in text.lines().enumerate() {
        if line.starts_with('#') || line.trim().is_empty() {
            continue;
        }
        let wrong = index + 1;
        let (key, value) = line.split_once('=').ok_or(wrong)?;
        let value = value.trim();
        let number = || value.parse::<u64>().map_err(|_| wrong);
        match key.trim() {
            "version" => {}
            "vm" => vm = Some(value.parse().map_err(|_| wrong)?),
            "disk" => disk = Some(value.parse().map_err(|_| wrong)?),
            "role" if value == "primary" => role = Some(Role::Primary),
            "role" if value == "replica" => role = Some(Role::Replica),
            "generation" => generation = Some(number()?),
            "checkpoint" => checkpoint = Some(number()?),
            "whole" if value == "yes" => whole = Some(true),
            "whole" if value == "no" => whole = Some(false),
            "journal" => journal = Some(PathBuf::from(value)),
            _ => return Err(wrong),
        }
    }
    let provenance = Provenance {
        vm: vm.ok_or(0usize)?,
        name: String::new(),
        arbiter: KnownArbiter::Unsaid,
        lineage: Lineage::default(),
    };
    Ok(Sidecar {
        provenance,
        generation: generation.ok_or(0usize)?,
        role: role.ok_or(0usize)?,
        whole: whole.ok_or(0usize)?,
        end: None,
        checkpoint: checkpoint.ok_or(0usize)?,
        disk: disk.ok_or(0usize)?,
        journal,
        disks: None,
        process: None,
        earlier: Vec::new(),
        accepted: Vec::new(),
    })
}
