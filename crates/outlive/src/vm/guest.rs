//! What the VM boots: the user's Linux kernel, or the built-in guest.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use outlive_guest::PAYLOAD;
use outlive_machine::{
    DiskBoot, FirmwareError, Image, ImageError, LinuxBoot, Machine, PayloadOptions, StartError,
    StartLinuxError,
};

use super::boot_disk::{BootDiskError, FromDisk, read_boot};
use super::{NoRandom, Remedied, Stops};
use crate::cli::RunOptions;
use crate::disk::Held;
use crate::process;

/// How many vCPUs the built-in guest has room for.
const PAYLOAD_VCPUS: u8 = outlive_guest::abi::MAX_VCPUS as u8;
/// How long a disk may take to say what it boots.
const READ: Duration = Duration::from_secs(120);

/// Why there is nothing to boot.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestError {
    /// The built-in guest has fewer vCPUs.
    #[error(
        "the built-in guest has 1 to {PAYLOAD_VCPUS} vCPUs, not {0}; a Linux guest (--kernel) may have more"
    )]
    Vcpus(u8),
    /// The built-in guest would have no seed.
    #[error(transparent)]
    NoRandom(#[from] NoRandom),
    /// A file cannot be read.
    #[error("cannot read {}: {source}; give {option} another file", .path.display())]
    Read { path: PathBuf, option: &'static str, source: io::Error },
    /// A directory, a device or the like.
    #[error("{} is not a regular file; give {option} another one", .path.display())]
    NotAFile { path: PathBuf, option: &'static str },
    /// A file does not fit into the guest.
    #[error(
        "{} has {} MiB and the guest's memory {} MiB: give {option} another file, or give the guest more memory \
         with --memory",
        .path.display(), .bytes >> 20, .memory >> 20
    )]
    TooLarge { path: PathBuf, option: &'static str, bytes: u64, memory: u64 },
    /// There is no disk to boot from.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The disk has no kernel that can be read.
    #[error(
        "cannot boot from the disk image {}: {source}; give the kernel with --kernel, --initrd and --append, or another \
         disk with --boot disk=N",
        .image.display()
    )]
    Disk { image: PathBuf, source: BootDiskError },
    /// The files cannot be kept for the guest's restarts.
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
}

/// Why the guest cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    /// The built-in guest.
    #[error(transparent)]
    BuiltIn(#[from] Remedied<StartError>),
    /// A Linux kernel.
    #[error(transparent)]
    Linux(#[from] Remedied<StartLinuxError>),
}

/// What the VM boots.
pub(crate) enum Guest {
    /// The built-in Redis server.
    BuiltIn(PayloadOptions),
    /// The user's kernel.
    Linux(Box<LinuxBoot>),
    /// The kernel of its own disk.
    OfDisk(Box<FromDisk>),
}

impl Guest {
    /// Reads what the options name. An order to stop ends the look at a guest's disk.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub(crate) fn read(options: &RunOptions, held: &Held, stops: &Stops) -> Result<Self, GuestError> {
        if let Some(disk) = options.boot_disk() {
            return Self::of_disk(options, held, disk, stops);
        }
        let Some(kernel) = &options.kernel else { return Self::built_in(options) };
        let memory = options.memory_bytes();
        let kernel = file(kernel, "--kernel", memory)?;
        let initrd = options.initrd.as_deref().map(|path| file(path, "--initrd", memory)).transpose()?;
        let boot = LinuxBoot::new(kernel, initrd.unwrap_or_default(), options.command_line())?;
        Ok(Self::Linux(Box::new(boot)))
    }

    fn of_disk(options: &RunOptions, held: &Held, disk: usize, stops: &Stops) -> Result<Self, GuestError> {
        let spec = &options.disks[disk];
        let image = match held.at(&spec.path) {
            Some(locked) => Image::of_locked(locked, spec.sectors)?,
            None => Image::open(&spec.path, spec.readonly, spec.shared, spec.sectors)?,
        };
        let from = DiskBoot { disk: disk as u16, append: options.append.clone().unwrap_or_default() };
        let until = Some(Instant::now() + READ);
        let stops = stops.clone();
        let wanted = move || !stops.was_used();
        let read = read_boot(Arc::new(image), &from, options.memory_bytes(), until, wanted);
        let read = read.map_err(|source| GuestError::Disk { image: spec.path.clone(), source })?;
        Ok(Self::OfDisk(Box::new(read)))
    }

    fn built_in(options: &RunOptions) -> Result<Self, GuestError> {
        if options.vcpus > PAYLOAD_VCPUS {
            return Err(GuestError::Vcpus(options.vcpus));
        }
        let random_seed = match options.seed {
            Some(seed) => std::array::from_fn(|i| (seed.rotate_left(i as u32 * 7) as u8) ^ i as u8),
            None => process::random().map_err(NoRandom)?,
        };
        Ok(Self::BuiltIn(PayloadOptions {
            ipv4: options.ip.address.octets(),
            prefix: options.ip.prefix,
            gateway: options.gateway.map_or([0; 4], |g| g.octets()),
            random_seed,
        }))
    }

    /// Whether it is a Linux kernel, which needs a console and a source of random numbers.
    pub(crate) fn is_linux(&self) -> bool {
        !matches!(self, Self::BuiltIn(_))
    }

    /// How many bytes behind the guest's memory hold what it boots from.
    pub(crate) fn firmware_bytes(&self) -> u64 {
        match self {
            Self::BuiltIn(_) => 0,
            Self::Linux(boot) => boot.firmware_bytes(),
            Self::OfDisk(read) => read.boot.firmware_bytes(),
        }
    }

    /// Loads it into the machine.
    ///
    /// # Errors
    /// See [`LoadError`].
    pub(crate) fn load(&self, machine: &mut Machine) -> Result<(), LoadError> {
        match self {
            Self::BuiltIn(options) => machine.boot_payload(PAYLOAD, options).map_err(Remedied)?,
            Self::Linux(boot) => machine.boot_linux(boot).map_err(Remedied)?,
            Self::OfDisk(read) => machine.boot_linux(&read.boot).map_err(Remedied)?,
        }
        Ok(())
    }
}

/// Reads a file that goes into the guest's memory.
fn file(path: &Path, option: &'static str, memory: u64) -> Result<Vec<u8>, GuestError> {
    let unreadable = |source| GuestError::Read { path: path.to_owned(), option, source };
    let about = std::fs::metadata(path).map_err(unreadable)?;
    // A wrong path may lead to a disk image, or to a file without an end.
    if !about.is_file() {
        return Err(GuestError::NotAFile { path: path.to_owned(), option });
    }
    let bytes = about.len();
    if bytes >= memory {
        return Err(GuestError::TooLarge { path: path.to_owned(), option, bytes, memory });
    }
    std::fs::read(path).map_err(unreadable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_cannot_be_booted_are_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("root.img");
        std::fs::File::create(&image).unwrap().set_len(1 << 40).unwrap();
        let error = file(&image, "--initrd", 64 << 20).unwrap_err().to_string();
        assert!(error.contains("has 1048576 MiB and the guest's memory 64 MiB: give --initrd"), "{error}");
        for path in ["/dev/zero", "/tmp"] {
            let error = file(Path::new(path), "--kernel", 64 << 20).unwrap_err().to_string();
            assert!(error.contains("not a regular file; give --kernel"), "{error}");
        }
    }
}
