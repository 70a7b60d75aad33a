//! Builds the guest images.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{GuestKernel, ImageError};
use crate::nested::debian::{
    FetchError, KEYRING, MIRROR, Packages, Suite, file_error, make_directory, remove, write,
};
use crate::nested::initramfs::{Initramfs, read};
use crate::nested::kernel::Kernel;
use crate::nested::modules::Modules;
use crate::packages;
use crate::run::{Workspace, step};

/// The release of the guest's system.
const SUITE: Suite = Suite::Stable("bookworm");
/// Packages of its system beyond those that every system has.
const PACKAGES: [&str; 20] = [
    "systemd-sysv",
    "udev",
    "dbus",
    "kmod",
    "zstd",
    "busybox",
    "initramfs-tools",
    "iproute2",
    "iputils-ping",
    "procps",
    "e2fsprogs",
    "perl",
    "redis-server",
    "redis-tools",
    "postgresql",
    "ca-certificates",
    "linux-image-amd64",
    "linux-image-cloud-amd64",
    "grub-common",
    "grub2-common",
];
/// Files of the guest, by their names in `/outlive`.
const FILES: [(&str, &[u8]); 4] = [
    ("init", include_bytes!("../guest/init")),
    ("up", include_bytes!("../guest/up")),
    ("agent", include_bytes!("../guest/agent")),
    ("acpi-power", include_bytes!("../guest/acpi-power")),
];
const PREPARE: &str = include_str!("../guest/prepare.sh");
const INITRDS: &str = include_str!("../guest/initrds.sh");
const BUSYBOX_INIT: &[u8] = include_bytes!("../guest/busybox-init");
/// What Debian's `update-grub` writes for the first kernel of [`OWN_IMAGE`].
const GRUB_CFG: &str = include_str!("../guest/grub.cfg");
/// Drivers in the small initrd.
const DRIVERS: [&str; 10] = [
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_console",
    "ext4",
    "button",
    "evdev",
    "pvpanic_mmio",
];
/// Modules that ext4 requests by an alias, on kernels that do not have them built in.
const OPTIONAL: [&str; 1] = ["crc32c_generic"];
/// Modules that are also on the guest's disk. Debian puts the others into the initrds if needed; a disk with
/// all of them takes minutes to synchronise in emulation.
const ON_DISK: [&str; 16] = [
    "arch",
    "crypto",
    "drivers/acpi",
    "drivers/block/virtio_blk",
    "drivers/char",
    "drivers/input",
    "drivers/misc",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
    "drivers/virtio",
    "fs/autofs",
    "fs/ext4",
    "fs/jbd2",
    "fs/mbcache",
    "lib",
    "net/core",
];
const ROOT_IMAGE: &str = "root.img";
/// A whole disk that boots by itself: a partition table, and the same system with a kernel in `/boot`.
const OWN_IMAGE: &str = "own.img";
/// The kernel that it boots, and the one that waits in [`OWN_NEW`] until the guest installs it.
const OWN_KERNELS: [GuestKernel; 2] = [GuestKernel::BookwormCloud, GuestKernel::TrixieCloud];
/// A directory of the guest.
const OWN_NEW: &str = "outlive/new-kernel";
/// The UUID of its root file system.
const OWN_UUID: &str = "6f75746c-6976-4521-8f77-6e6b65726e65";
/// Where its partition begins, in bytes, and the table that says so.
const OWN_START: u64 = 1 << 20;
const OWN_TABLE: &[u8] = b"label: gpt\nstart=2048, size=2097152, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4\n";
const OWN_DISK_BYTES: u64 = (1 << 30) + 2 * OWN_START;
pub(super) const HOST_DISK: &str = "host.img";
/// A root file system of this size, as a file with holes.
const ROOT_SIZE: &str = "1G";
const HOST_DISK_SIZE: &str = "6G";

/// Changes with everything that goes into the images except the versions of packages. To rebuild them from
/// newer packages, remove them.
pub(super) fn key(kernels: &[Kernel]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (SUITE.name(), PACKAGES, FILES, PREPARE, INITRDS).hash(&mut hasher);
    (BUSYBOX_INIT, DRIVERS, ON_DISK, ROOT_SIZE, HOST_DISK_SIZE).hash(&mut hasher);
    (GRUB_CFG, OWN_UUID, OWN_TABLE).hash(&mut hasher);
    kernels.iter().for_each(|kernel| kernel.release.hash(&mut hasher));
    hasher.finish()
}

/// Builds the images in a directory of their own.
pub(super) struct Builder<'a> {
    workspace: &'a Workspace,
    directory: &'a Path,
    log: PathBuf,
}

impl<'a> Builder<'a> {
    pub(super) fn new(workspace: &'a Workspace, directory: &'a Path, log: PathBuf) -> Builder<'a> {
        Builder { workspace, directory, log }
    }

    pub(super) fn build(&self, kernels: &[Kernel]) -> Result<(), ImageError> {
        eprintln!(
            "==> building the guest images: Debian {} with Redis and PostgreSQL, some 4 minutes",
            SUITE.name()
        );
        write(&self.log, "")?;
        self.debootstrap()?;
        self.install()?;
        for kernel in kernels {
            self.add_kernel(kernel)?;
        }
        self.chroot(INITRDS, &[])?;
        let releases = self.collect()?;
        for (kernel, release) in &releases {
            self.busybox_initrd(*kernel, release, &kernels[0].busybox)?;
        }
        self.disks(&releases)
    }

    fn root(&self) -> PathBuf {
        self.directory.join("root")
    }

    /// Runs a step with its output in the log.
    fn step(&self, command: &mut Command) -> Result<(), ImageError> {
        let failed = |source| ImageError::Step { source, log: self.log.clone() };
        let log = || fs::OpenOptions::new().append(true).open(&self.log).map_err(file_error(&self.log));
        command.stdout(log()?).stderr(log()?);
        step(command).map_err(failed)
    }

    /// A program with mounts of its own, so that none remains.
    fn alone(&self, program: &str) -> Command {
        let mut command = Command::new("unshare");
        command.args([
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--propagation",
            "private",
            "--",
            program,
        ]);
        command
    }

    fn debootstrap(&self) -> Result<(), ImageError> {
        let directory = self.workspace.target.join("nested/debootstrap");
        let names = ["debootstrap"];
        let packages = Packages { suite: SUITE, directory: &directory, asked: &names, wanted: &names };
        if !packages.are_there() {
            packages.fetch()?;
        }
        let root = directory.join("root/usr");
        let mut command = self.alone("sh");
        command.env("DEBOOTSTRAP_DIR", root.join("share/debootstrap")).arg(root.join("sbin/debootstrap"));
        command.args(["--variant=minbase", &format!("--keyring={KEYRING}"), SUITE.name()]);
        self.step(command.arg(self.root()).arg(MIRROR))
    }

    /// Installs and configures the guest's system, in its own directory.
    fn install(&self) -> Result<(), ImageError> {
        let root = self.root();
        make_directory(&root.join("outlive"))?;
        for (name, contents) in FILES {
            let path = root.join("outlive").join(name);
            write(&path, contents)?;
            make_executable(&path)?;
        }
        // By now the keyring is in the system, as apt's own.
        let sources = SUITE.sources().swap_remove(0).replace(&format!("[signed-by={KEYRING}] "), "");
        write(&root.join("etc/apt/sources.list"), sources)?;
        let resolver = root.join("etc/resolv.conf");
        let _ = fs::copy("/etc/resolv.conf", &resolver);
        let done = self.chroot(PREPARE, &PACKAGES);
        let _ = fs::remove_file(&resolver);
        done
    }

    /// Runs a script in the guest's system.
    fn chroot(&self, script: &str, arguments: &[&str]) -> Result<(), ImageError> {
        let path = self.root().join("outlive/script");
        write(&path, script)?;
        let mut command = self.alone("chroot");
        command.arg(self.root()).args(["sh", "/outlive/script"]).args(arguments);
        let done = self.step(&mut command);
        fs::remove_file(&path).map_err(file_error(&path))?;
        done
    }

    /// Adds a kernel of another release, as if its packages were installed.
    fn add_kernel(&self, kernel: &Kernel) -> Result<(), ImageError> {
        let modules = self.root().join("lib/modules").join(&kernel.release);
        let boot = |name: &str| self.root().join("boot").join(format!("{name}-{}", kernel.release));
        self.step(Command::new("cp").arg("--archive").arg(kernel.modules_directory()).arg(&modules))?;
        copy(&kernel.image, &boot("vmlinuz"))?;
        // Beside the modules since 7.x, beside the kernel before. mkinitramfs reads it.
        let configs =
            [modules.join("config"), kernel.image.with_file_name(format!("config-{}", kernel.release))];
        if let Some(config) = configs.iter().find(|path| path.is_file()) {
            copy(config, &boot("config"))?;
        }
        let _ = fs::remove_file(modules.join("vmlinuz"));
        Ok(())
    }

    /// Takes kernels and initrds out of the guest's system. Returns the release of each.
    fn collect(&self) -> Result<Vec<(GuestKernel, String)>, ImageError> {
        let modules = self.root().join("lib/modules");
        let mut releases = Vec::new();
        for entry in fs::read_dir(&modules).map_err(file_error(&modules))?.flatten() {
            let release = entry.file_name().to_string_lossy().into_owned();
            let Some(kernel) = GuestKernel::ALL.into_iter().find(|it| it.is(&release)) else { continue };
            for (from, to) in [("vmlinuz", "vmlinuz"), ("initrd.img", "initrd")] {
                let from = self.root().join("boot").join(format!("{from}-{release}"));
                copy(&from, &self.directory.join(format!("{to}-{}", kernel.name())))?;
            }
            releases.push((kernel, release));
        }
        remove(&self.root().join("boot"))?;
        make_directory(&self.root().join("boot"))?;
        releases.sort();
        Ok(releases)
    }

    fn busybox_initrd(&self, kernel: GuestKernel, release: &str, busybox: &Path) -> Result<(), ImageError> {
        let mut archive = Initramfs::new();
        for directory in ["/bin", "/proc", "/sys", "/tmp", "/run", "/root", "/new"] {
            archive.directory(directory);
        }
        archive.script("/init", BUSYBOX_INIT)?;
        archive.script("/bin/busybox", &read(busybox)?)?;
        let modules = Modules::read(self.root().join("lib/modules").join(release), busybox)?;
        let wanted: Vec<&str> = OPTIONAL.into_iter().filter(|it| modules.has(it)).chain(DRIVERS).collect();
        modules.add(&wanted, &mut archive)?;
        Ok(write(&self.directory.join(format!("busybox-{}", kernel.name())), archive.finish())?)
    }

    /// The guest's disk, then a disk for a host that has it and the kernels.
    fn disks(&self, releases: &[(GuestKernel, String)]) -> Result<(), ImageError> {
        for (_, release) in releases {
            let modules = self.root().join("lib/modules").join(release).join("kernel");
            keep_only(&modules, &ON_DISK.map(|part| modules.join(part)))?;
            self.chroot(&format!("/sbin/depmod {release}\n"), &[])?;
        }
        let options = ["-L", "outlive-guest", "-E", "root_owner=0:0"];
        self.file_system(&self.root(), ROOT_IMAGE, &options, ROOT_SIZE)?;
        self.own_disk(releases)?;
        let contents = self.directory.join("host");
        make_directory(&contents)?;
        let mut names = vec![ROOT_IMAGE.to_string(), OWN_IMAGE.to_string()];
        for (kernel, _) in releases {
            names.extend(["vmlinuz", "initrd", "busybox"].map(|it| format!("{it}-{}", kernel.name())));
        }
        for name in names {
            let (from, to) = (self.directory.join(&name), contents.join(&name));
            fs::hard_link(&from, &to).map_err(file_error(&to))?;
        }
        let options = ["-L", "outlive-host", "-E", "root_owner=0:0"];
        self.file_system(&contents, HOST_DISK, &options, HOST_DISK_SIZE)?;
        Ok(remove(&contents)?)
    }

    /// The disk that boots by itself. The system's directory is as before when this returns.
    fn own_disk(&self, releases: &[(GuestKernel, String)]) -> Result<(), ImageError> {
        let root = self.root();
        let release = |kernel| releases.iter().find(|(it, _)| *it == kernel).map(|(_, release)| release);
        let [first, second] = OWN_KERNELS.map(|kernel| release(kernel).cloned().unwrap_or_default());
        let put = |kernel: GuestKernel, release: &str, to: &Path| {
            make_directory(to)?;
            for (from, name) in [("vmlinuz", "vmlinuz"), ("initrd", "initrd.img")] {
                let from = self.directory.join(format!("{from}-{}", kernel.name()));
                copy(&from, &to.join(format!("{name}-{release}")))?;
            }
            Ok::<(), ImageError>(())
        };
        put(OWN_KERNELS[0], &first, &root.join("boot"))?;
        put(OWN_KERNELS[1], &second, &root.join(OWN_NEW))?;
        make_directory(&root.join("boot/grub"))?;
        write(
            &root.join("boot/grub/grub.cfg"),
            GRUB_CFG.replace("@UUID@", OWN_UUID).replace("@RELEASE@", &first),
        )?;
        let fstab = root.join("etc/fstab");
        let usual = fs::read(&fstab).map_err(file_error(&fstab))?;
        write(&fstab, format!("UUID={OWN_UUID} / ext4 errors=remount-ro 0 1\n"))?;
        let settings = root.join("etc/default/grub");
        write(
            &settings,
            "GRUB_DEFAULT=saved\nGRUB_TIMEOUT=5\nGRUB_DISTRIBUTOR=Debian\nGRUB_CMDLINE_LINUX_DEFAULT=\n",
        )?;

        let image = self.directory.join(OWN_IMAGE);
        write(&image, "")?;
        let file = fs::OpenOptions::new().write(true).open(&image).map_err(file_error(&image))?;
        file.set_len(OWN_DISK_BYTES).map_err(file_error(&image))?;
        packages::provide(self.workspace, &[packages::FDISK], true);
        let sfdisk = packages::find(self.workspace, "sfdisk").unwrap_or_else(|| "sfdisk".into());
        let table = self.directory.join("own.table");
        write(&table, OWN_TABLE)?;
        let mut command = Command::new("sh");
        command.args(["-c", "\"$0\" --quiet --no-reread --no-tell-kernel \"$1\" <\"$2\""]);
        self.step(command.arg(sfdisk).arg(&image).arg(&table))?;
        fs::remove_file(&table).map_err(file_error(&table))?;
        let place = format!("root_owner=0:0,offset={OWN_START}");
        self.file_system(&root, OWN_IMAGE, &["-L", "outlive-own", "-U", OWN_UUID, "-E", &place], ROOT_SIZE)?;

        write(&fstab, usual)?;
        remove(&root.join(OWN_NEW))?;
        remove(&root.join("boot"))?;
        Ok(make_directory(&root.join("boot"))?)
    }

    /// An ext4 file system with the contents of a directory; this mounts nothing.
    fn file_system(
        &self,
        contents: &Path,
        name: &str,
        options: &[&str],
        size: &str,
    ) -> Result<(), ImageError> {
        packages::provide(self.workspace, &[packages::E2FSPROGS], true);
        let program = packages::find(self.workspace, "mke2fs").unwrap_or_else(|| "mke2fs".into());
        let mut command = Command::new(program);
        command.args(["-q", "-F", "-t", "ext4"]).args(options).arg("-d").arg(contents);
        self.step(command.stdin(Stdio::null()).arg(self.directory.join(name)).arg(size))
    }
}

/// Removes everything in a directory, except paths that begin with one of these.
fn keep_only(directory: &Path, kept: &[PathBuf]) -> Result<(), FetchError> {
    let begins =
        |path: &Path, with: &Path| path.as_os_str().as_bytes().starts_with(with.as_os_str().as_bytes());
    for entry in fs::read_dir(directory).map_err(file_error(directory))?.flatten() {
        let path = entry.path();
        if kept.iter().any(|kept| begins(&path, kept)) {
            continue;
        }
        if path.is_dir() && kept.iter().any(|kept| kept.starts_with(&path)) {
            keep_only(&path, kept)?;
        } else if path.is_dir() && !path.is_symlink() {
            remove(&path)?;
        } else {
            fs::remove_file(&path).map_err(file_error(&path))?;
        }
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<(), ImageError> {
    fs::copy(from, to).map_err(file_error(from))?;
    Ok(())
}

fn make_executable(path: &Path) -> Result<(), FetchError> {
    use std::os::unix::fs::PermissionsExt;
    let set =
        |path: &Path| -> io::Result<()> { fs::set_permissions(path, fs::Permissions::from_mode(0o755)) };
    set(path).map_err(file_error(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_directory_what_is_kept_stays() {
        let root = std::env::temp_dir().join(format!("outlive-keep-{}", std::process::id()));
        let files = ["fs/ext4/ext4.ko", "fs/nfs/nfs.ko", "fs/mbcache.ko.xz", "net/core/a.ko", "sound/b.ko"];
        for file in files {
            make_directory(root.join(file).parent().unwrap()).unwrap();
            write(&root.join(file), "").unwrap();
        }
        keep_only(&root, &["fs/ext4", "fs/mbcache", "net/core"].map(|it| root.join(it))).unwrap();
        assert_eq!(files.map(|file| root.join(file).exists()), [true, false, true, true, false]);
        assert!(!root.join("sound").exists() && !root.join("fs/nfs").exists());
        remove(&root).unwrap();
    }
}
