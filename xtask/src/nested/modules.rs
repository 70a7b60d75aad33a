//! Puts the modules of a kernel, as a Debian package has them, into an initramfs without kmod.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::initramfs::{Initramfs, InitramfsError, read};

/// Why modules cannot be put into an initramfs.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModuleError {
    /// The kernel has no module of that name.
    #[error("the kernel's packages in {directory} have no module {name}; to fetch them again, remove them")]
    Lacks {
        /// Which module.
        name: String,
        /// Where the modules are.
        directory: PathBuf,
    },
    /// A module cannot be unpacked.
    #[error("cannot unpack {module} with {program}: {reason}")]
    Unpack {
        /// Which.
        module: PathBuf,
        /// The program that should unpack it.
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

/// The modules of one kernel release.
pub(crate) struct Modules {
    directory: PathBuf,
    /// Unpacks them.
    busybox: PathBuf,
    /// By the names that the kernel uses.
    files: BTreeMap<String, PathBuf>,
    /// Built into the kernel.
    built_in: BTreeSet<String>,
}

impl Modules {
    /// The modules in a directory such as `/lib/modules/6.1.0-56-cloud-amd64`.
    pub(crate) fn read(directory: PathBuf, busybox: &Path) -> Result<Modules, ModuleError> {
        let list = directory.join("modules.builtin");
        let list = fs::read_to_string(&list).map_err(file_error(&list))?;
        let built_in = list.lines().filter_map(|line| module_name(Path::new(line))).collect();
        let files = module_files(&directory.join("kernel"))?;
        Ok(Modules { directory, busybox: busybox.to_path_buf(), files, built_in })
    }

    /// Whether there is a module of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.files.contains_key(name)
    }

    /// Puts modules and their dependencies into an initramfs, with their order in `/modules/order`.
    pub(crate) fn add(&self, names: &[&str], to: &mut Initramfs) -> Result<(), ModuleError> {
        let mut order = Vec::new();
        for name in names {
            self.add_one(name, to, &mut order)?;
        }
        let order: String = order.iter().map(|name| format!("{name}.ko\n")).collect();
        Ok(to.file("/modules/order", order.as_bytes())?)
    }

    fn add_one(&self, name: &str, to: &mut Initramfs, order: &mut Vec<String>) -> Result<(), ModuleError> {
        if self.built_in.contains(name) || order.iter().any(|known| known == name) {
            return Ok(());
        }
        let Some(file) = self.files.get(name) else {
            return Err(ModuleError::Lacks { name: name.to_string(), directory: self.directory.clone() });
        };
        let module = self.unpack(file)?;
        for needed in depends(&module) {
            self.add_one(&needed, to, order)?;
        }
        to.file(&format!("/modules/{name}.ko"), &module)?;
        order.push(name.to_string());
        Ok(())
    }

    fn unpack(&self, module: &Path) -> Result<Vec<u8>, ModuleError> {
        let (program, arguments): (&Path, &[&str]) = match module.extension().and_then(|it| it.to_str()) {
            // Not every machine has xz.
            Some("xz") => (&self.busybox, &["xzcat"]),
            Some("zst") => (Path::new("zstd"), &["--decompress", "--stdout"]),
            _ => return Ok(read(module)?),
        };
        let failed = |reason: &str| ModuleError::Unpack {
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

fn module_files(kernel: &Path) -> Result<BTreeMap<String, PathBuf>, ModuleError> {
    let mut files = BTreeMap::new();
    let mut directories = vec![kernel.to_path_buf()];
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

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> ModuleError {
    move |source| ModuleError::File { path: path.to_path_buf(), source }
}

/// `kvm_amd` for `.../kvm-amd.ko.xz`.
fn module_name(path: &Path) -> Option<String> {
    let (name, end) = path.file_name()?.to_str()?.split_once(".ko")?;
    matches!(end, "" | ".xz" | ".zst").then(|| name.replace('-', "_"))
}

/// The dependencies that a module lists in its section `.modinfo`.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = &module[at + KEY.len()..];
    let value = &value[..value.iter().position(|&byte| byte == 0).unwrap_or(value.len())];
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
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
    fn modules_come_after_what_they_depend_on_and_those_of_the_kernel_itself_not_at_all() {
        let directory = std::env::temp_dir().join(format!("outlive-modules-{}", std::process::id()));
        fs::create_dir_all(directory.join("kernel/drivers")).unwrap();
        let module = |name: &str, depends: &str| {
            let contents = format!("\0depends={depends}\0");
            fs::write(directory.join("kernel/drivers").join(name), contents).unwrap();
        };
        module("top.ko", "under-it,in-it");
        module("under-it.ko", "");
        fs::write(directory.join("modules.builtin"), "kernel/drivers/in-it.ko\n").unwrap();
        let modules = Modules::read(directory.clone(), Path::new("/nowhere/busybox")).unwrap();
        let mut order = Vec::new();
        let mut archive = Initramfs::new();
        for name in ["in_it", "top", "under_it"] {
            modules.add_one(name, &mut archive, &mut order).unwrap();
        }
        assert_eq!(order, ["under_it", "top"]);
        let error = modules.add(&["absent"], &mut archive).unwrap_err();
        assert!(error.to_string().contains("no module absent"), "{error}");
        fs::remove_dir_all(&directory).unwrap();
    }
}
