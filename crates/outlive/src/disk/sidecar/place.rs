//! Where the files that go with an image are.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

/// Where the sidecars and journals of block devices are kept: `/dev` does not survive a reboot.
pub(crate) const STATE_DIR: &str = "/var/lib/outlive";
/// How many characters of a block device's name go into that of its sidecar.
const LONGEST_NAME: usize = 150;

/// The file that goes with an image: beside it, or for a block device in a directory of its own.
pub(crate) fn beside(image: &Path, suffix: &str) -> PathBuf {
    let whole = fs::canonicalize(image).unwrap_or_else(|_| image.to_path_buf());
    if let Ok(data) = fs::metadata(&whole)
        && data.file_type().is_block_device()
    {
        let name = lasting_name(&sysfs(data.rdev())).unwrap_or_else(|| whole.to_string_lossy().into_owned());
        return Path::new(STATE_DIR).join(format!("{}.{suffix}", file_name(&name)));
    }
    let mut name = whole.into_os_string();
    name.push(".");
    name.push(suffix);
    name.into()
}

/// What the kernel says of a block device (Documentation/ABI/stable/sysfs-block and testing/sysfs-block-dm).
fn sysfs(device: u64) -> PathBuf {
    let number = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    fs::canonicalize(&number).unwrap_or_else(|_| number.into())
}

/// A name that a block device keeps over reboots. `/dev/sdb` and `/dev/dm-3` may be another device next time,
/// and a sidecar that is not found lets a torn image start. `None` if it has none; then its current name has
/// to do.
fn lasting_name(sysfs: &Path) -> Option<String> {
    let word = |file: &str| {
        let text = fs::read_to_string(sysfs.join(file)).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    };
    if let Some(number) = word("partition") {
        return Some(format!("{}-part{number}", lasting_name(sysfs.parent()?)?));
    }
    let names = ["dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "device/serial", "loop/backing_file"];
    names.into_iter().find_map(|file| Some(format!("{}-{}", file.replace('/', "-"), word(file)?)))
}

/// Makes any text the name of a file.
fn file_name(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    let text: String = name.trim_start_matches('/').chars().map(plain).collect();
    // Two different names may have become the same.
    if text == name || name.starts_with("/dev/") && text.len() < LONGEST_NAME {
        return text;
    }
    let start: String = text.chars().take(LONGEST_NAME).collect();
    format!("{start}-{:08x}", crc32fast::hash(name.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_devices_have_theirs_elsewhere() {
        // Any block device of this machine will do; without one there is nothing to test.
        let device =
            fs::read_dir("/dev").into_iter().flatten().flatten().find(|entry| {
                fs::metadata(entry.path()).is_ok_and(|data| data.file_type().is_block_device())
            });
        if let Some(device) = device {
            assert!(beside(&device.path(), "outlive").starts_with(STATE_DIR));
        }
    }

    #[test]
    fn a_block_device_is_known_by_what_lasts() {
        let sys = tempfile::tempdir().unwrap();
        let put = |file: &str, text: &str| {
            let path = sys.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let name = |device: &str| lasting_name(&sys.path().join(device));
        put("dm-3/dm/uuid", "LVM-abc\n");
        put("sdb/device/wwid", "naa.5002538e\n");
        put("sdb/sdb2/partition", "2\n");
        put("vda/serial", "\n");
        assert_eq!(name("dm-3").as_deref(), Some("dm-uuid-LVM-abc"));
        assert_eq!(name("sdb").as_deref(), Some("device-wwid-naa.5002538e"));
        assert_eq!(name("sdb/sdb2").as_deref(), Some("device-wwid-naa.5002538e-part2"));
        assert_eq!(name("vda"), None, "an empty serial is none");
        assert_eq!(file_name("dm-uuid-LVM-abc"), "dm-uuid-LVM-abc");
        assert_eq!(file_name("/dev/vda"), "dev-vda");
        assert_ne!(file_name("a/b"), file_name("a-b"));
        assert!(file_name(&"x/".repeat(400)).len() < 200);
    }
}
