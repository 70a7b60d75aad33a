//! Entries of the Boot Loader Specification (UAPI.1): `/loader/entries/*.conf`, as Fedora and RHEL have them for GRUB
//! and others for systemd-boot.

use std::cmp::Ordering;

use crate::files::Files;
use crate::versions;
use crate::volumes::{BootDirectory, Place, Volumes};
use crate::{Entry, ReadError};

/// Longest entry.
const ENTRY: u64 = 64 << 10;
/// Most entries.
const ENTRIES: usize = 256;
/// What a word or a line of an entry costs in bytes beside its letters.
const LINE: usize = 64;
/// Where entries are, from the root of a file system.
const DIRECTORIES: [&str; 2] = ["/loader/entries", "/boot/loader/entries"];

/// An entry as it is written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bls {
    /// Its file's name without `.conf`.
    pub(crate) id: String,
    pub(crate) title: String,
    version: String,
    machine: String,
    sort_key: String,
    linux: String,
    initrds: Vec<String>,
    options: Vec<String>,
    /// Its tries are used up.
    failed: bool,
}

impl Bls {
    /// Of a file of this name. `None` for entries that start no Linux on this processor.
    pub(crate) fn parse(name: &str, text: &str) -> Option<Self> {
        let name = name.strip_suffix(".conf")?;
        // `NAME+LEFT-DONE`: how often it may still be tried.
        let (id, tries) = name.rsplit_once('+').unwrap_or((name, ""));
        let counts = !tries.is_empty() && tries.bytes().all(|it| it.is_ascii_digit() || it == b'-');
        let (id, left) = if counts { (id, tries.split('-').next()) } else { (name, None) };
        let failed = left.is_some_and(|left| left.parse() == Ok(0u32));
        let mut entry = Self { id: id.to_owned(), failed, ..Self::default() };
        for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
            let (key, value) = line.split_once([' ', '\t']).unwrap_or((line, ""));
            let value = value.trim().to_owned();
            match key {
                "title" => entry.title = value,
                "version" => entry.version = value,
                "machine-id" => entry.machine = value,
                "sort-key" => entry.sort_key = value,
                "linux" => entry.linux = value,
                "initrd" => entry.initrds.extend(value.split_whitespace().map(str::to_owned)),
                "options" => entry.options.push(value),
                "architecture" if !matches!(value.as_str(), "x64" | "X64") => return None,
                _ => {}
            }
        }
        if entry.title.is_empty() {
            entry.title.clone_from(&entry.id);
        }
        (!entry.linux.is_empty()).then_some(entry)
    }

    /// What it takes in bytes.
    fn cost(&self) -> usize {
        let lines = self.initrds.iter().chain(&self.options);
        let kept = [&self.id, &self.title, &self.version, &self.machine, &self.sort_key, &self.linux];
        lines.chain(kept).map(|text| LINE + 2 * text.len()).sum()
    }

    /// The order of a menu: what comes first is booted by default.
    fn order(&self, other: &Self) -> Ordering {
        let failed = self.failed.cmp(&other.failed);
        let keys = match (self.sort_key.is_empty(), other.sort_key.is_empty()) {
            (false, false) => self
                .sort_key
                .cmp(&other.sort_key)
                .then_with(|| self.machine.cmp(&other.machine))
                .then_with(|| versions::compare(&other.version, &self.version)),
            (with, without) => with.cmp(&without),
        };
        failed.then(keys).then_with(|| versions::compare(&other.id, &self.id))
    }

    /// What it boots. `expand` puts GRUB's variables in.
    pub(crate) fn entry(
        &self,
        volumes: &Volumes,
        volume: usize,
        expand: &dyn Fn(&str) -> Result<String, ReadError>,
    ) -> Result<Entry, ReadError> {
        let place = |path: &str| place(volumes, volume, path);
        let mut initrds = Vec::new();
        for path in &self.initrds {
            for path in expand(path)?.split_whitespace() {
                volumes.source().think(LINE + path.len())?;
                initrds.push(path.to_owned());
            }
        }
        let options = self.options.iter().map(|it| expand(it)).collect::<Result<Vec<_>, _>>()?;
        Ok(Entry {
            title: self.title.clone(),
            kernel: Some(place(&expand(&self.linux)?)?),
            initrds: initrds.iter().map(|path| place(path)).collect::<Result<_, _>>()?,
            command_line: options.join(" ").split_whitespace().collect::<Vec<_>>().join(" "),
        })
    }
}

/// Paths are from the root of the entry's file system; some tools write them from its `/boot`.
fn place(volumes: &Volumes, volume: usize, path: &str) -> Result<Place, ReadError> {
    let from_boot = format!("/boot/{}", path.trim_start_matches('/'));
    let files = volumes.files(volume);
    let is_there = |path: &str| files.map_or(Ok(false), |files| files.is_file(path));
    let moved = !is_there(path)? && is_there(&from_boot)?;
    Ok(Place { volume, path: if moved { from_boot } else { path.to_owned() } })
}

/// The entries of a volume in the order of the menu.
pub(crate) fn entries(files: &Files) -> Result<Vec<Bls>, ReadError> {
    for directory in DIRECTORIES {
        let mut found = Vec::new();
        let names = files.names(directory)?;
        for name in names.iter().filter(|name| name.ends_with(".conf")).take(ENTRIES) {
            let text = files.read(&format!("{directory}/{name}"), ENTRY)?.unwrap_or_default();
            if let Some(entry) = Bls::parse(name, &String::from_utf8_lossy(&text)) {
                files.source().think(entry.cost())?;
                found.push(entry);
            }
        }
        if !found.is_empty() {
            found.sort_by(Bls::order);
            return Ok(found);
        }
    }
    Ok(Vec::new())
}

/// The default entry of a disk without a `grub.cfg`: what `loader.conf` names, else the first one.
pub(crate) fn choose(volumes: &Volumes) -> Result<Option<Entry>, ReadError> {
    for BootDirectory { volume, .. } in volumes.boot_directories()? {
        let Some(files) = volumes.files(volume) else { continue };
        let entries = entries(files)?;
        let wanted = default_pattern(files)?;
        let named = entries.iter().find(|it| wanted.as_deref().is_some_and(|wanted| matches(wanted, &it.id)));
        if let Some(entry) = named.or(entries.first()) {
            // Variables are GRUB's, and nobody has set any.
            let expand = |text: &str| {
                let words = text.split_whitespace().filter(|word| !word.starts_with('$'));
                Ok(words.collect::<Vec<_>>().join(" "))
            };
            return entry.entry(volumes, volume, &expand).map(Some);
        }
    }
    Ok(None)
}

fn default_pattern(files: &Files) -> Result<Option<String>, ReadError> {
    for path in ["/loader/loader.conf", "/boot/loader/loader.conf"] {
        let text = files.read(path, ENTRY)?.unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let value =
            text.lines().find_map(|line| line.trim().strip_prefix("default")?.split_whitespace().next());
        if let Some(value) = value {
            return Ok(Some(value.trim_end_matches(".conf").to_owned()));
        }
    }
    Ok(None)
}

/// Whether a name fits a pattern with `*`.
fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else { return false };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else { return rest.is_empty() };
    for part in middle {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(entries: &[(&str, &str)]) -> Vec<String> {
        let mut entries: Vec<Bls> =
            entries.iter().filter_map(|(name, text)| Bls::parse(name, text)).collect();
        entries.sort_by(Bls::order);
        entries.into_iter().map(|it| it.id).collect()
    }

    #[test]
    fn fedoras_newest_kernel_comes_first_and_its_rescue_kernel_last() {
        let text = "title Fedora Linux\nlinux /vmlinuz\n";
        let names = ["m-0-rescue.conf", "m-6.5.6-300.fc39.x86_64.conf", "m-6.12.6-200.fc39.x86_64.conf"];
        let sorted = ids(&names.map(|name| (name, text)));
        assert_eq!(sorted, ["m-6.12.6-200.fc39.x86_64", "m-6.5.6-300.fc39.x86_64", "m-0-rescue"]);
    }

    #[test]
    fn sort_keys_come_before_names_and_failed_tries_last() {
        let sorted = ids(&[
            ("z.conf", "linux /z"),
            ("b+0-3.conf", "linux /b\nsort-key a\nversion 9"),
            ("c.conf", "linux /c\nsort-key debian\nversion 6.1.0-9"),
            ("d+3.conf", "linux /d\nsort-key debian\nversion 6.1.0-13"),
            ("efi.conf", "efi /shell.efi"),
            ("arm.conf", "linux /arm\narchitecture aa64"),
        ]);
        assert_eq!(sorted, ["d", "c", "z", "b"]);
    }

    #[test]
    fn patterns_of_loader_conf_fit() {
        for (pattern, name, fits) in [
            ("debian-*", "debian-6.1", true),
            ("*-6.1", "debian-6.1", true),
            ("d*6*", "debian-6.1", true),
            ("debian", "debian-6.1", false),
            ("*x*", "debian", false),
            ("a*a", "a", false),
        ] {
            assert_eq!(matches(pattern, name), fits, "{pattern} {name}");
        }
    }
}
