//! Stock Debian kernels, fetched as packages and unpacked below the target directory; nothing is installed.

use std::fs;
use std::path::{Path, PathBuf};

use super::debian::{FetchError, Packages, Suite};
use super::modules::{ModuleError, Modules};
use crate::run::Workspace;

/// The packages to ask for. The cloud flavour is smaller and has KVM, too.
const ASKED: [&str; 2] = ["linux-image-cloud-amd64", "busybox-static"];
/// The packages of a plan to unpack: the rest is for an installed kernel, and ours is not installed.
const UNPACKED: [&str; 5] =
    ["linux-image-", "linux-binary-", "linux-modules-", "linux-base-", "busybox-static"];

/// Why a kernel is missing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KernelError {
    /// It is missing and was not to be fetched.
    #[error("kernel {kernel} has not been fetched; without --no-fetch it is")]
    NotFetched {
        /// Its name.
        kernel: &'static str,
    },
    /// Its packages could not be fetched.
    #[error("cannot fetch kernel {kernel}: {source}")]
    Fetch {
        /// Its name.
        kernel: &'static str,
        /// What failed.
        source: FetchError,
    },
    /// The packages have an unexpected layout.
    #[error("the packages of kernel {kernel} have no {what}; to fetch them again: rm -r {directory}")]
    Lacks {
        /// Its name.
        kernel: &'static str,
        /// What they lack.
        what: String,
        /// Where they are unpacked.
        directory: PathBuf,
    },
    /// Its modules could not be used.
    #[error(transparent)]
    Modules(#[from] ModuleError),
}

/// The kernels that hosts run, by the name that users know: the series, and the suite of Debian that has it.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Series {
    /// Debian 11: no dirty ring
    #[value(name = "5.10")]
    Bullseye,
    /// Debian 12
    #[value(name = "6.1")]
    Bookworm,
    /// Debian 13
    #[value(name = "6.12")]
    Trixie,
    /// The newest kernel of Debian unstable
    #[value(name = "newest")]
    Sid,
}

impl Series {
    pub(crate) const ALL: [Series; 4] = [Series::Bullseye, Series::Bookworm, Series::Trixie, Series::Sid];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Series::Bullseye => "5.10",
            Series::Bookworm => "6.1",
            Series::Trixie => "6.12",
            Series::Sid => "newest",
        }
    }

    fn suite(self) -> Suite {
        match self {
            Series::Bullseye => Suite::Old("bullseye"),
            Series::Bookworm => Suite::Stable("bookworm"),
            Series::Trixie => Suite::Stable("trixie"),
            Series::Sid => Suite::Unstable,
        }
    }
}

/// An unpacked kernel.
pub(crate) struct Kernel {
    root: PathBuf,
    /// As `uname -r` gives it.
    pub(crate) release: String,
    /// The bzImage.
    pub(crate) image: PathBuf,
    /// A shell and the usual programs, statically linked.
    pub(crate) busybox: PathBuf,
}

impl Kernel {
    /// The kernel, fetched if it is missing.
    pub(crate) fn get(workspace: &Workspace, series: Series, fetch: bool) -> Result<Kernel, KernelError> {
        let directory = workspace.target.join("nested").join(format!("kernel-{}", series.name()));
        let packages =
            Packages { suite: series.suite(), directory: &directory, asked: &ASKED, wanted: &UNPACKED };
        if !packages.are_there() {
            if !fetch {
                return Err(KernelError::NotFetched { kernel: series.name() });
            }
            eprintln!("==> fetching kernel {} from Debian's {}", series.name(), series.suite().name());
            packages.fetch().map_err(|source| KernelError::Fetch { kernel: series.name(), source })?;
        }
        Kernel::unpacked(directory, series)
    }

    fn unpacked(directory: PathBuf, series: Series) -> Result<Kernel, KernelError> {
        let lacks = |what: &str| KernelError::Lacks {
            kernel: series.name(),
            what: what.to_string(),
            directory: directory.clone(),
        };
        let root = directory.join("root");
        let busybox = [root.join("bin/busybox"), root.join("usr/bin/busybox")];
        let busybox = busybox.into_iter().find(|path| path.is_file()).ok_or_else(|| lacks("bin/busybox"))?;
        let modules = [root.join("lib/modules"), root.join("usr/lib/modules")];
        let release = modules.iter().find_map(|path| first_name(path)).ok_or_else(|| lacks("lib/modules"))?;
        let images = [
            root.join(format!("boot/vmlinuz-{release}")),
            root.join(format!("usr/lib/modules/{release}/vmlinuz")),
        ];
        let image = images.into_iter().find(|path| path.is_file()).ok_or_else(|| lacks("vmlinuz"))?;
        Ok(Kernel { root: directory.join("root"), release, image, busybox })
    }

    /// The directory of its modules.
    pub(crate) fn modules_directory(&self) -> PathBuf {
        let directory = Path::new("lib/modules").join(&self.release);
        [self.root.join(&directory), self.root.join("usr").join(&directory)]
            .into_iter()
            .find(|path| path.is_dir())
            .unwrap_or(directory)
    }

    pub(crate) fn modules(&self) -> Result<Modules, KernelError> {
        Ok(Modules::read(self.modules_directory(), &self.busybox)?)
    }
}

/// The first name in a directory: that of the only release that was unpacked.
fn first_name(directory: &Path) -> Option<String> {
    let entry = fs::read_dir(directory).ok()?.next()?.ok()?;
    entry.file_name().into_string().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nested::initramfs::Initramfs;

    #[test]
    fn every_kernel_has_a_name() {
        for series in Series::ALL {
            assert_eq!(<Series as clap::ValueEnum>::from_str(series.name(), false), Ok(series));
        }
    }

    #[test]
    fn what_is_not_there_is_said_with_what_to_do() {
        let workspace = Workspace { root: "/nowhere".into(), target: "/nowhere/target".into() };
        let error = Kernel::get(&workspace, Series::Trixie, false).err().unwrap();
        assert!(error.to_string().contains("6.12") && error.to_string().contains("--no-fetch"), "{error}");
        let error = Kernel::unpacked("/nowhere/kernel".into(), Series::Sid).err().unwrap();
        assert!(error.to_string().ends_with("rm -r /nowhere/kernel"), "{error}");
    }

    /// On kernels that have been fetched here.
    #[test]
    fn modules_come_after_what_they_depend_on() {
        let workspace = Workspace::find();
        let kernels: Vec<_> =
            Series::ALL.iter().filter_map(|&series| Kernel::get(&workspace, series, false).ok()).collect();
        if kernels.is_empty() {
            println!("skipped: no kernel has been fetched for nested hosts");
        }
        for kernel in kernels {
            let mut archive = Initramfs::new();
            kernel.modules().unwrap().add(&["kvm_amd", "ext4", "virtiofs"], &mut archive).unwrap();
            let archive = String::from_utf8_lossy(&archive.finish()).into_owned();
            let place = |name: &str| archive.find(&format!("\n{name}.ko\n"));
            assert!(place("kvm").is_some() && place("kvm") < place("kvm_amd"));
        }
    }
}
