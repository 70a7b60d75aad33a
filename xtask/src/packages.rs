//! Debian packages that tests use: clients of the VM, and programs that emulate hosts. Building and running
//! Outlive does not need them.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{StepError, Workspace, output, step};

pub(crate) struct Package {
    name: &'static str,
    /// It is present if all of these are.
    programs: &'static [&'static str],
    used_for: &'static str,
    /// Installing it would start a server that nobody has asked for, so it is only unpacked.
    serves: bool,
}

const NEEDED: [Package; 8] = [
    Package {
        name: "redis-tools",
        programs: &["redis-cli", "redis-benchmark"],
        used_for: "real Redis clients for the guest's server",
        serves: false,
    },
    ETCD,
    Package {
        name: "shellcheck",
        programs: &["shellcheck"],
        used_for: "a look at the shell scripts",
        serves: false,
    },
    Package {
        name: "prometheus",
        programs: &["prometheus", "promtool"],
        used_for: "metrics and alerts as users see them",
        serves: true,
    },
    Package {
        name: "chromium",
        programs: &["chromium"],
        used_for: "the node's page in a real browser",
        serves: false,
    },
    Package {
        name: "qemu-utils",
        programs: &["qemu-img"],
        used_for: "disk images in the formats of other programs",
        serves: false,
    },
    Package {
        name: "mtools",
        programs: &["mcopy", "mdir"],
        used_for: "cloud-init's seeds as others read them",
        serves: false,
    },
    Package {
        name: "dosfstools",
        programs: &["fsck.fat"],
        used_for: "the same, in every detail",
        serves: false,
    },
];

pub(crate) const ETCD: Package = Package {
    name: "etcd-server",
    programs: &["etcd"],
    used_for: "real etcd clusters as arbiters",
    serves: false,
};

pub(crate) const QEMU: Package = Package {
    name: "qemu-system-x86",
    programs: &["qemu-system-x86_64"],
    used_for: "nested hosts, in software emulation",
    serves: false,
};

pub(crate) const VIRTIOFSD: Package = Package {
    name: "virtiofsd",
    // It is in no directory of the PATH; its users search for it.
    programs: &["virtiofsd"],
    used_for: "a directory that nested hosts share",
    serves: false,
};

pub(crate) const IPROUTE: Package =
    Package { name: "iproute2", programs: &["ip"], used_for: "the network of nested hosts", serves: false };

pub(crate) const E2FSPROGS: Package = Package {
    name: "e2fsprogs",
    programs: &["mke2fs"],
    used_for: "file systems on disk images",
    serves: false,
};

pub(crate) const FDISK: Package = Package {
    name: "fdisk",
    programs: &["sfdisk"],
    used_for: "partition tables on disk images",
    serves: false,
};

pub(crate) const BOOTSTRAP: Package = Package {
    name: "mmdebstrap",
    programs: &["mmdebstrap"],
    used_for: "a clean system to install the package on",
    serves: false,
};

pub(crate) const COMPILER: Package = Package {
    name: "g++",
    programs: &["c++"],
    used_for: "libFuzzer, which is written in C++",
    serves: false,
};

/// Where packages are unpacked when they cannot be installed.
struct Unpacked {
    debs: PathBuf,
    root: PathBuf,
}

impl Unpacked {
    fn of(workspace: &Workspace) -> Unpacked {
        let debs = workspace.target.join("debs");
        Unpacked { root: debs.join("root"), debs }
    }

    /// PATH and LD_LIBRARY_PATH with the unpacked packages in front.
    fn environment(&self) -> Vec<(&'static str, OsString)> {
        if !self.root.exists() {
            return Vec::new();
        }
        let libraries = ["usr/lib/x86_64-linux-gnu", "usr/lib"];
        vec![
            ("PATH", in_front(["usr/bin", "usr/sbin"].map(|it| self.root.join(it)).to_vec(), "PATH")),
            ("LD_LIBRARY_PATH", in_front(libraries.map(|it| self.root.join(it)).to_vec(), "LD_LIBRARY_PATH")),
        ]
    }
}

fn in_front(mut directories: Vec<PathBuf>, variable: &str) -> OsString {
    let present = std::env::var_os(variable).unwrap_or_default();
    directories.extend(std::env::split_paths(&present).filter(|it| !it.as_os_str().is_empty()));
    std::env::join_paths(directories).unwrap_or(present)
}

/// Makes sure that the clients are there, and returns the environment in which they are found.
///
/// A package that cannot be fetched is no error: this prints how to get it, and the tests that need it say
/// that they are skipped.
pub(crate) fn prepare(workspace: &Workspace, fetch: bool) -> Vec<(&'static str, OsString)> {
    provide(workspace, &NEEDED, fetch)
}

/// The same for certain packages.
pub(crate) fn provide(
    workspace: &Workspace,
    packages: &[Package],
    fetch: bool,
) -> Vec<(&'static str, OsString)> {
    let unpacked = Unpacked::of(workspace);
    let missing: Vec<&Package> = packages.iter().filter(|package| !is_there(package, &unpacked)).collect();
    if missing.is_empty() || !fetch {
        return unpacked.environment();
    }
    for package in &missing {
        eprintln!("==> fetching the Debian package {} ({})", package.name, package.used_for);
    }
    let (only_unpacked, installed): (Vec<&Package>, _) =
        missing.into_iter().partition(|package| package.serves || !is_root());
    get(&only_unpacked, |names| unpack(names, &unpacked));
    get(&installed, install);
    unpacked.environment()
}

fn get(packages: &[&Package], how: impl Fn(&[&str]) -> Result<(), StepError>) {
    let names: Vec<&str> = packages.iter().map(|package| package.name).collect();
    if names.is_empty() {
        return;
    }
    if let Err(error) = how(&names) {
        eprintln!("xtask: {error}");
        eprintln!(
            "xtask: tests that need {} are skipped; to get it: apt-get install {}",
            names.join(", "),
            names.join(" ")
        );
    }
}

/// The directory of packages that could not be installed and were unpacked.
pub(crate) fn unpacked(workspace: &Workspace) -> PathBuf {
    Unpacked::of(workspace).root
}

/// A program of an unpacked or an installed package.
pub(crate) fn find(workspace: &Workspace, program: &str) -> Option<PathBuf> {
    found(program, &Unpacked::of(workspace))
}

fn found(program: &str, unpacked: &Unpacked) -> Option<PathBuf> {
    let own = ["usr/bin", "usr/sbin", "bin", "sbin"].map(|it| unpacked.root.join(it)).to_vec();
    let path = in_front(own, "PATH");
    std::env::split_paths(&path).map(|directory| directory.join(program)).find(|program| program.is_file())
}

fn is_there(package: &Package, unpacked: &Unpacked) -> bool {
    package.programs.iter().all(|program| found(program, unpacked).is_some())
}

pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

pub(crate) fn apt_get(arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn install(names: &[&str]) -> Result<(), StepError> {
    let mut arguments = vec!["install", "--yes", "--quiet", "--no-install-recommends"];
    arguments.extend(names);
    // A fresh system has no package lists, or lists of packages that are gone.
    step(&mut apt_get(&arguments)).or_else(|_| {
        step(&mut apt_get(&["update", "--quiet"]))?;
        step(&mut apt_get(&arguments))
    })
}

/// Without root, and for servers: downloads the packages with their dependencies and unpacks them below the target
/// directory.
fn unpack(names: &[&str], unpacked: &Unpacked) -> Result<(), StepError> {
    make_directory(&unpacked.root)?;
    let mut simulate = vec!["--simulate", "install", "--no-install-recommends"];
    simulate.extend(names);
    let plan = || output(&mut apt_get(&simulate));
    let updated = || step(&mut apt_get(&["update", "--quiet"])).is_ok();
    // A fresh system has no package lists.
    let plan = plan()
        .or_else(|| (is_root() && updated()).then(plan).flatten())
        .ok_or_else(|| StepError::Failed(format!("apt-get {}", simulate.join(" "))))?;
    let wanted = to_install(&plan);
    let mut download = apt_get(&["download"]);
    step(download.args(&wanted).current_dir(&unpacked.debs))?;
    for deb in debs(&unpacked.debs)? {
        step(Command::new("dpkg").arg("-x").arg(deb).arg(&unpacked.root))?;
    }
    Ok(())
}

fn make_directory(path: &Path) -> Result<(), StepError> {
    fs::create_dir_all(path).map_err(|source| StepError::File { path: path.to_path_buf(), source })
}

/// The package names of `apt-get --simulate install`: lines such as `Inst liblua5.1-0 (5.1.5-9 Debian
/// [amd64])`.
pub(crate) fn to_install(plan: &str) -> Vec<&str> {
    plan.lines().filter_map(|line| line.strip_prefix("Inst ")?.split(' ').next()).collect()
}

pub(crate) fn debs(directory: &Path) -> Result<Vec<PathBuf>, StepError> {
    let list =
        || -> io::Result<Vec<PathBuf>> { fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect() };
    let paths = list().map_err(|source| StepError::File { path: directory.to_path_buf(), source })?;
    Ok(paths.into_iter().filter(|path| path.extension().is_some_and(|it| it == "deb")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_packages_of_a_plan_are_found() {
        let plan = "Reading package lists...\nThe following NEW packages will be installed:\n  libjemalloc2\n\
                    Inst libjemalloc2 (5.3.0-1 Debian:12 [amd64])\nInst redis-tools (7.0.15 Debian:12 [amd64])\n\
                    Conf libjemalloc2 (5.3.0-1 Debian:12 [amd64])\n";
        assert_eq!(to_install(plan), ["libjemalloc2", "redis-tools"]);
    }

    #[test]
    fn unpacked_packages_come_first_and_only_if_they_exist() {
        let nowhere = Unpacked { debs: "/no/such".into(), root: "/no/such/root".into() };
        assert!(nowhere.environment().is_empty());
        let path = in_front(vec!["/first".into()], "PATH");
        let directories: Vec<PathBuf> = std::env::split_paths(&path).collect();
        assert_eq!(directories[0], Path::new("/first"));
        assert!(directories.iter().all(|directory| !directory.as_os_str().is_empty()));
        assert_eq!(in_front(vec!["/only".into()], "OUTLIVE_NO_SUCH_VARIABLE"), "/only");
    }
}
