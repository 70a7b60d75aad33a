//! The newest kernel of a disk whose boot loader's configuration is missing.

use crate::files::Files;
use crate::versions;
use crate::volumes::{BootDirectory, Place, Volumes};
use crate::{Entry, ReadError};

/// The names that distributions give to the initrd of a kernel.
fn initrd_names(version: &str) -> [String; 4] {
    [
        format!("initrd.img-{version}"),
        format!("initramfs-{version}.img"),
        format!("initrd-{version}"),
        format!("initrd-{version}.img"),
    ]
}

/// The kernel with the greatest version, with its initrd, and `root=` of the only file system with a system on it.
pub(crate) fn choose(volumes: &Volumes) -> Result<Option<Entry>, ReadError> {
    for BootDirectory { volume, prefix } in volumes.boot_directories()? {
        let Some(files) = volumes.files(volume) else { continue };
        let Some(version) = newest(files, prefix)? else { continue };
        let place = |name: &str| Place { volume, path: format!("{prefix}/{name}") };
        let mut initrds = Vec::new();
        for name in initrd_names(&version) {
            if files.is_file(&place(&name).path)? {
                initrds.push(place(&name));
                break;
            }
        }
        let root = volumes.root()?.map(|root| format!("root=UUID={} ro", root.uuid));
        return Ok(Some(Entry {
            title: format!("Linux {version}"),
            kernel: Some(place(&format!("vmlinuz-{version}"))),
            initrds,
            command_line: root.unwrap_or_default(),
        }));
    }
    Ok(None)
}

fn newest(files: &Files, prefix: &str) -> Result<Option<String>, ReadError> {
    let names = files.names(if prefix.is_empty() { "/" } else { prefix })?;
    let versions = names.iter().filter_map(|name| name.strip_prefix("vmlinuz-"));
    // A rescue kernel is none that anybody wants by default; a saved one is what dpkg leaves of an upgrade.
    let versions =
        versions.filter(|it| !it.contains("rescue") && !it.ends_with(".dpkg-tmp") && !it.ends_with(".old"));
    Ok(versions.max_by(|a, b| versions::compare(a, b)).map(str::to_owned))
}
