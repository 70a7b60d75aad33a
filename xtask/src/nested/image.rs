//! The kernels and disks that the guests of nested hosts boot: stock Debian kernels with initrds made by
//! Debian's own tools, and a disk image with a Debian system, Redis and PostgreSQL. They are built from
//! packages in a directory below the target directory; nothing is installed on this machine.

mod build;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use self::build::{Builder, HOST_DISK, key};
use super::debian::{FetchError, file_error, make_directory, remove};
use super::initramfs::InitramfsError;
use super::kernel::{Kernel, KernelError, Series};
use super::modules::ModuleError;
use crate::run::{StepError, Workspace};

/// Why there are no guest images.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    /// They are missing and were not to be built.
    #[error("the guest images have not been built; without --no-fetch they are")]
    NotBuilt,
    /// Making a Debian system takes a chroot.
    #[error("building the guest images needs root: run it as root, for example with sudo")]
    NotRoot,
    /// Packages are missing.
    #[error("cannot build the guest images: {0}")]
    Fetch(#[from] FetchError),
    /// A program failed, and has said why.
    #[error("cannot build the guest images: {source}; the end of {log} says why")]
    Step {
        /// What failed.
        source: StepError,
        /// Where its output is.
        log: PathBuf,
    },
    /// A kernel is missing.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The small initrd could not be made.
    #[error(transparent)]
    Modules(#[from] ModuleError),
    /// The same.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
}

/// The kernels that guests boot.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum GuestKernel {
    /// Debian 12, for virtual machines
    #[value(name = "6.1-cloud")]
    BookwormCloud,
    /// Debian 12, for all machines
    #[value(name = "6.1-generic")]
    BookwormGeneric,
    /// Debian 13, for virtual machines
    #[value(name = "6.12-cloud")]
    TrixieCloud,
    /// Debian unstable, for virtual machines
    #[value(name = "newest-cloud")]
    SidCloud,
}

impl GuestKernel {
    pub(crate) const ALL: [GuestKernel; 4] = [
        GuestKernel::BookwormCloud,
        GuestKernel::BookwormGeneric,
        GuestKernel::TrixieCloud,
        GuestKernel::SidCloud,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            GuestKernel::BookwormCloud => "6.1-cloud",
            GuestKernel::BookwormGeneric => "6.1-generic",
            GuestKernel::TrixieCloud => "6.12-cloud",
            GuestKernel::SidCloud => "newest-cloud",
        }
    }

    /// Whether a release in the guest's system is that of this kernel.
    fn is(self, release: &str) -> bool {
        let cloud = release.contains("-cloud-");
        match self {
            GuestKernel::BookwormCloud => cloud && release.starts_with("6.1."),
            GuestKernel::BookwormGeneric => !cloud && release.starts_with("6.1."),
            GuestKernel::TrixieCloud => cloud && release.starts_with("6.12."),
            GuestKernel::SidCloud => !["6.1.", "6.12."].iter().any(|it| release.starts_with(it)),
        }
    }
}

/// The images, in a directory: `vmlinuz-KERNEL`, `initrd-KERNEL` (Debian's), `busybox-KERNEL` (a small
/// initrd), `root.img`, `own.img` (a whole disk with a kernel in `/boot`), and `host.img`, a disk for a host with
/// all of them on it.
pub(crate) struct GuestImage {
    directory: PathBuf,
}

impl GuestImage {
    /// The images; building them, if they are missing, takes some minutes.
    pub(crate) fn get(workspace: &Workspace, fetch: bool) -> Result<GuestImage, ImageError> {
        let nested = workspace.target.join("nested");
        let foreign = [Series::Trixie, Series::Sid].map(|series| Kernel::get(workspace, series, fetch));
        let [trixie, sid] = foreign;
        let kernels = [trixie?, sid?];
        let directory = nested.join(format!("guest-{:016x}", key(&kernels)));
        if directory.exists() {
            return Ok(GuestImage { directory });
        }
        if !fetch {
            return Err(ImageError::NotBuilt);
        }
        if !nix::unistd::geteuid().is_root() {
            return Err(ImageError::NotRoot);
        }
        let new = nested.join("guest-new");
        remove(&new)?;
        make_directory(&new)?;
        Builder::new(workspace, &new, nested.join("guest.log")).build(&kernels)?;
        remove_others(&nested)?;
        fs::rename(&new, &directory).map_err(file_error(&directory))?;
        Ok(GuestImage { directory })
    }

    /// A file of it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The guest's system as a directory, with the clients for its servers.
    pub(crate) fn root(&self) -> PathBuf {
        self.path("root")
    }

    /// A disk for a host, with everything that a guest needs.
    pub(crate) fn copy_disk(&self, to: &Path) -> Result<(), ImageError> {
        let mut command = Command::new("cp");
        command.args(["--sparse=always", "--reflink=auto"]).arg(self.path(HOST_DISK)).arg(to);
        let failed = || StepError::Failed(format!("copying {HOST_DISK} to {}", to.display()));
        match command.status() {
            Ok(status) if status.success() => Ok(()),
            _ => Err(ImageError::Fetch(FetchError::Step(failed()))),
        }
    }
}

/// Removes images with other keys.
fn remove_others(nested: &Path) -> Result<(), FetchError> {
    for entry in fs::read_dir(nested).map_err(file_error(nested))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.strip_prefix("guest-").is_some_and(|key| key.len() == 16) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum;

    #[test]
    fn every_release_is_one_kernel() {
        let releases = [
            "6.1.0-56-cloud-amd64",
            "6.1.0-56-amd64",
            "6.12.117+deb13-cloud-amd64",
            "7.2.13+deb14-cloud-amd64",
        ];
        for (kernel, release) in GuestKernel::ALL.into_iter().zip(releases) {
            let found: Vec<_> = GuestKernel::ALL.into_iter().filter(|it| it.is(release)).collect();
            assert_eq!(found, [kernel]);
            assert_eq!(GuestKernel::from_str(kernel.name(), false), Ok(kernel));
        }
    }

    #[test]
    fn only_images_of_other_keys_are_removed() {
        let nested = std::env::temp_dir().join(format!("outlive-image-{}", std::process::id()));
        for name in ["guest-0123456789abcdef", "guest-new", "kernel-6.1", "run-1-0"] {
            make_directory(&nested.join(name)).unwrap();
        }
        remove_others(&nested).unwrap();
        let mut left: Vec<_> = fs::read_dir(&nested).unwrap().map(|it| it.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["guest-new", "kernel-6.1", "run-1-0"]);
        remove(&nested).unwrap();
    }

    #[test]
    fn what_is_not_built_is_said_with_what_to_do() {
        let workspace = Workspace { root: "/nowhere".into(), target: "/nowhere/target".into() };
        let error = GuestImage::get(&workspace, false).err().unwrap().to_string();
        assert!(error.contains("--no-fetch"), "{error}");
    }
}
