//! Stock Debian kernels, fetched as packages and unpacked below the target directory; nothing is installed.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::initramfs::{Initramfs, InitramfsError, read};
use crate::packages::{apt_get, debs, to_install};
use crate::run::{StepError, Workspace, output, step};

const MIRROR: &str = "http://deb.debian.org/debian";
const SECURITY: &str = "http://deb.debian.org/debian-security";
/// Where suites go when their time is over.
const ARCHIVE: &str = "http://archive.debian.org/debian";
const ARCHIVED_SECURITY: &str = "http://archive.debian.org/debian-security";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// The packages that are asked for. The cloud flavour is the smaller one and has KVM, too.
const ASKED: [&str; 2] = ["linux-image-cloud-amd64", "busybox-static"];
/// Those of a plan that are unpacked: the rest is what an installed kernel needs, and ours is not.
const UNPACKED: [&str; 4] = ["linux-image-", "linux-binary-", "linux-modules-", "busybox-static"];
/// Written last.
const COMPLETE: &str = "complete";

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KernelError {
    /// It is not there and was not to be fetched.
    #[error("kernel {kernel} has not been fetched; without --no-fetch it is")]
    NotFetched {
        /// Its name.
        kernel: &'static str,
    },
    /// apt-get has no key to check Debian's packages with.
    #[error(
        "no {KEYRING} here, to check the kernel's packages with; to get it: apt-get install debian-archive-keyring"
    )]
    NoKeyring,
    /// apt-get or dpkg-deb failed, and has said why.
    #[error("cannot fetch kernel {kernel}: {source}; this needs apt-get, dpkg-deb and a way to {MIRROR}")]
    Fetch {
        /// Its name.
        kernel: &'static str,
        /// What failed.
        source: StepError,
    },
    /// The packages are not as they used to be.
    #[error("the packages of kernel {kernel} have no {what}; to fetch them again: rm -r {directory}")]
    Lacks {
        /// Its name.
        kernel: &'static str,
        /// What is not in them.
        what: String,
        /// Where they are unpacked.
        directory: PathBuf,
    },
    /// A module cannot be unpacked.
    #[error("cannot unpack {module} with {program}: {reason}")]
    Unpack {
        /// Which.
        module: PathBuf,
        /// What was to do it.
        program: PathBuf,
        /// Why.
        reason: String,
    },
    /// A file could not be used.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A module could not be put into the initramfs.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
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
    /// What Debian unstable has
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

    fn suite(self) -> &'static str {
        match self {
            Series::Bullseye => "bullseye",
            Series::Bookworm => "bookworm",
            Series::Trixie => "trixie",
            Series::Sid => "sid",
        }
    }

    /// Lists of sources, one of which has the suite.
    fn sources(self) -> Vec<String> {
        let suite = self.suite();
        let line = |mirror: &str, suite: &str| format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n");
        let stable = |mirror: &str, security: &str| {
            line(mirror, suite) + &line(security, &format!("{suite}-security"))
        };
        match self {
            Series::Sid => vec![line(MIRROR, suite)],
            // An old suite is on the mirrors for as long as its security updates are, or longer.
            Series::Bullseye => vec![
                stable(MIRROR, SECURITY),
                stable(ARCHIVE, ARCHIVED_SECURITY),
                line(ARCHIVE, suite),
                line(MIRROR, suite),
            ],
            Series::Bookworm | Series::Trixie => vec![stable(MIRROR, SECURITY), line(MIRROR, suite)],
        }
    }
}

/// A kernel that is unpacked.
pub(crate) struct Kernel {
    series: Series,
    root: PathBuf,
    /// As `uname -r` gives it.
    pub(crate) release: String,
    /// The bzImage.
    pub(crate) image: PathBuf,
    /// A shell and the usual programs, statically linked.
    pub(crate) busybox: PathBuf,
}

impl Kernel {
    /// The kernel, fetched if it is not there.
    pub(crate) fn get(workspace: &Workspace, series: Series, fetch: bool) -> Result<Kernel, KernelError> {
        let directory = workspace.target.join("nested").join(format!("kernel-{}", series.name()));
        if !directory.join(COMPLETE).exists() {
            if !fetch {
                return Err(KernelError::NotFetched { kernel: series.name() });
            }
            if !Path::new(KEYRING).exists() {
                return Err(KernelError::NoKeyring);
            }
            fetch_to(&directory, series)?;
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
        Ok(Kernel { series, root: directory.join("root"), release, image, busybox })
    }

    /// Puts modules and what they depend on into an initramfs, with their order in `/modules/order`.
    pub(crate) fn add_modules(&self, names: &[&str], to: &mut Initramfs) -> Result<(), KernelError> {
        let files = self.module_files()?;
        let mut order = Vec::new();
        for name in names {
            self.add_module(name, &files, to, &mut order)?;
        }
        let order: String = order.iter().map(|name| format!("{name}.ko\n")).collect();
        Ok(to.file("/modules/order", order.as_bytes())?)
    }

    fn add_module(
        &self,
        name: &str,
        files: &BTreeMap<String, PathBuf>,
        to: &mut Initramfs,
        order: &mut Vec<String>,
    ) -> Result<(), KernelError> {
        if order.iter().any(|known| known == name) {
            return Ok(());
        }
        let Some(file) = files.get(name) else {
            return Err(KernelError::Lacks {
                kernel: self.series.name(),
                what: format!("module {name}"),
                directory: self.root.parent().expect("a directory in a directory").to_path_buf(),
            });
        };
        let module = self.unpack(file)?;
        for needed in depends(&module) {
            self.add_module(&needed, files, to, order)?;
        }
        to.file(&format!("/modules/{name}.ko"), &module)?;
        order.push(name.to_string());
        Ok(())
    }

    /// Every module's file, by the name that the kernel knows it by.
    fn module_files(&self) -> Result<BTreeMap<String, PathBuf>, KernelError> {
        let mut files = BTreeMap::new();
        let of_release = Path::new("lib/modules").join(&self.release).join("kernel");
        let mut directories = vec![self.root.join(&of_release), self.root.join("usr").join(of_release)];
        directories.retain(|directory| directory.is_dir());
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(&directory).map_err(file_error(&directory))? {
                let path = entry.map_err(file_error(&directory))?.path();
                if path.is_dir() {
                    directories.push(path);
                } else if let Some(name) = module_name(&path) {
                    files.insert(name, path);
                }
            }
        }
        Ok(files)
    }

    fn unpack(&self, module: &Path) -> Result<Vec<u8>, KernelError> {
        let (program, arguments): (&Path, &[&str]) = match module.extension().and_then(|it| it.to_str()) {
            // Not every machine has xz.
            Some("xz") => (&self.busybox, &["xzcat"]),
            Some("zst") => (Path::new("zstd"), &["--decompress", "--stdout"]),
            _ => return Ok(read(module)?),
        };
        let failed = |reason: &str| KernelError::Unpack {
            module: module.to_path_buf(),
            program: program.to_path_buf(),
            reason: reason.trim().to_string(),
        };
        let file = fs::File::open(module).map_err(file_error(module))?;
        let done = Command::new(program).args(arguments).stdin(file).output();
        let done = done.map_err(|error| failed(&error.to_string()))?;
        if done.status.success() {
            Ok(done.stdout)
        } else {
            Err(failed(&String::from_utf8_lossy(&done.stderr)))
        }
    }
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> KernelError {
    move |source| KernelError::File { path: path.to_path_buf(), source }
}

/// The first name in a directory: of the one release that was unpacked.
fn first_name(directory: &Path) -> Option<String> {
    let entry = fs::read_dir(directory).ok()?.next()?.ok()?;
    entry.file_name().into_string().ok()
}

/// `kvm_amd` for `.../kvm-amd.ko.xz`.
fn module_name(path: &Path) -> Option<String> {
    let (name, end) = path.file_name()?.to_str()?.split_once(".ko")?;
    matches!(end, "" | ".xz" | ".zst").then(|| name.replace('-', "_"))
}

/// What a module says in its section `.modinfo` that it depends on.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = &module[at + KEY.len()..];
    let value = &value[..value.iter().position(|&byte| byte == 0).unwrap_or(value.len())];
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

/// Fetches a kernel as a whole: what is half done stays beside it and is thrown away the next time.
fn fetch_to(directory: &Path, series: Series) -> Result<(), KernelError> {
    let mut new = directory.as_os_str().to_owned();
    new.push("-new");
    let new = PathBuf::from(new);
    if new.exists() {
        fs::remove_dir_all(&new).map_err(file_error(&new))?;
    }
    for part in ["lists/partial", "archives/partial", "debs", "root"] {
        make_directory(&new.join(part))?;
    }
    write(&new.join("status"), "")?;
    let mut fetched = Ok(());
    for sources in series.sources() {
        write(&new.join("sources.list"), &sources)?;
        fetched = download(&new, series);
        if fetched.is_ok() {
            break;
        }
    }
    fetched.map_err(|source| KernelError::Fetch { kernel: series.name(), source })?;
    for part in ["lists", "archives", "debs"] {
        fs::remove_dir_all(new.join(part)).map_err(file_error(&new))?;
    }
    write(&new.join(COMPLETE), "")?;
    if directory.exists() {
        fs::remove_dir_all(directory).map_err(file_error(directory))?;
    }
    fs::rename(&new, directory).map_err(file_error(directory))
}

fn download(new: &Path, series: Series) -> Result<(), StepError> {
    eprintln!("==> fetching kernel {} from Debian's {}", series.name(), series.suite());
    step(apt(new).arg("--quiet").arg("update"))?;
    let mut simulate = apt(new);
    simulate.args(["--simulate", "install", "--no-install-recommends"]).args(ASKED);
    let plan = output(&mut simulate).ok_or_else(|| StepError::Failed("apt-get --simulate".to_string()))?;
    let unpacked =
        |name: &&str| UNPACKED.iter().any(|start| name.starts_with(start)) && !ASKED[..1].contains(name);
    let names: Vec<&str> = to_install(&plan).into_iter().filter(unpacked).collect();
    let downloaded = new.join("debs");
    step(apt(new).arg("--quiet").arg("download").args(names).current_dir(&downloaded))?;
    for deb in debs(&downloaded)? {
        step(Command::new("dpkg-deb").arg("-x").arg(deb).arg(new.join("root")))?;
    }
    Ok(())
}

/// apt-get with sources, lists and packages of its own: the machine's stay as they are.
fn apt(new: &Path) -> Command {
    let mut command = apt_get(&[]);
    let paths = [
        ("Dir::Etc::SourceList", "sources.list"),
        ("Dir::Etc::SourceParts", "none"),
        ("Dir::Etc::Preferences", "none"),
        ("Dir::Etc::PreferencesParts", "none"),
        ("Dir::State", ""),
        ("Dir::State::Lists", "lists"),
        ("Dir::State::Status", "status"),
        ("Dir::Cache", ""),
        ("Dir::Cache::Archives", "archives"),
    ];
    for (option, path) in paths {
        command.arg("-o").arg(format!("{option}={}", new.join(path).display()));
    }
    let settings = [
        "APT::Architecture=amd64",
        "APT::Architectures=amd64",
        "APT::Sandbox::User=root",
        "Acquire::Languages=none",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
        // Archived suites are not signed any more.
        "Acquire::Check-Valid-Until=false",
    ];
    for setting in settings {
        command.args(["-o", setting]);
    }
    command
}

fn make_directory(path: &Path) -> Result<(), KernelError> {
    fs::create_dir_all(path).map_err(file_error(path))
}

fn write(path: &Path, text: &str) -> Result<(), KernelError> {
    fs::write(path, text).map_err(file_error(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_modules() {
        let name = |path| module_name(Path::new(path));
        assert_eq!(name("/x/kvm-amd.ko").as_deref(), Some("kvm_amd"));
        assert_eq!(name("/x/kvm.ko.xz").as_deref(), Some("kvm"));
        assert_eq!(name("/x/tun.ko.zst").as_deref(), Some("tun"));
        assert_eq!(name("/x/modules.builtin"), None);
        assert_eq!(name("/x/a.ko.unknown"), None);
    }

    #[test]
    fn what_a_module_depends_on() {
        let module =
            |depends: &str| [b"ELF license=GPL\0depends=", depends.as_bytes(), b"\0intree=Y\0"].concat();
        assert_eq!(depends(&module("kvm,crypto-core")), ["kvm", "crypto_core"]);
        assert!(depends(&module("")).is_empty());
        assert!(depends(b"").is_empty());
        assert_eq!(depends(b"\0depends=cut"), ["cut"]);
    }

    #[test]
    fn every_kernel_has_a_name_and_signed_sources() {
        for series in Series::ALL {
            assert_eq!(<Series as clap::ValueEnum>::from_str(series.name(), false), Ok(series));
            for list in series.sources() {
                let signed = format!("deb [signed-by={KEYRING}] http://");
                assert!(
                    list.lines().all(|line| line.starts_with(&signed) && line.ends_with(" main")),
                    "{list}"
                );
            }
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

    /// On what has been fetched here.
    #[test]
    fn modules_come_after_what_they_depend_on() {
        let workspace = Workspace::find();
        let kernels: Vec<_> =
            Series::ALL.iter().filter_map(|&series| Kernel::get(&workspace, series, false).ok()).collect();
        if kernels.is_empty() {
            println!("skipped: no kernel has been fetched for nested hosts");
        }
        for kernel in kernels {
            let mut order = Vec::new();
            let files = kernel.module_files().unwrap();
            kernel.add_module("kvm_amd", &files, &mut Initramfs::new(), &mut order).unwrap();
            let place = |name| order.iter().position(|it| it == name);
            assert!(place("kvm").is_some() && place("kvm") < place("kvm_amd"), "{order:?}");
        }
    }
}
