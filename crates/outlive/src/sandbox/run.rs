//! Mounts of this process' own: a `/run` that has nothing but what the process needs, and nothing of the node's state.
//!
//! Below `/run` are the sockets by which programs are given orders: those of the service manager, of D-Bus, of container
//! engines, of other VMs. Landlock has no say about a socket that has a name, and whoever listens there believes a
//! process that stayed root. A socket that is not there cannot be connected to.
//!
//! The node's state is in the directory where VMs have their things, too, and Landlock cannot take a part out of what it
//! gives: see `state.rs`.
//!
//! Everything else stays as it is for this process, and what is mounted or unmounted on the host is so here, too. That
//! takes mounts that are shared, as with systemd: otherwise a file system that was unmounted would stay in use here, and
//! both stay the host's.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

const RUN: &str = "/run";
/// Where the C library asks for the addresses of names: systemd-resolved, nscd, Avahi.
const RESOLVERS: [&str; 3] = ["/run/systemd/resolve", "/run/nscd", "/run/avahi-daemon/socket"];

/// Why `/run` stays the host's.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotHidden {
    /// Unmounting would not reach this process.
    #[error("the mounts of this host are not shared (mount --make-rshared /)")]
    NotShared,
    /// It has no directory there of its own.
    #[error("this process needs {RUN} itself: give its things a directory of their own")]
    Whole,
    /// A right is missing, or the system refuses.
    #[error("{what}: {source}")]
    System {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

fn system<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> NotHidden {
    move |source| NotHidden::System { what, source: source.into() }
}

/// Mounts of this process' own, which follow the host's.
#[derive(Debug)]
pub(super) struct Own(());

impl Own {
    /// Call it while there is one thread.
    ///
    /// # Errors
    /// See [`NotHidden`]. All mounts are the host's then.
    pub(super) fn make() -> Result<Self, NotHidden> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(system("/proc/self/mountinfo"))?;
        if !is_shared(&mounts) {
            return Err(NotHidden::NotShared);
        }
        unshare(CloneFlags::CLONE_NEWNS).map_err(system("a mount namespace"))?;
        let nothing = None::<&str>;
        let flags = MsFlags::MS_REC | MsFlags::MS_SLAVE;
        mount(nothing, "/", nothing, flags, nothing).map_err(system("mounts that follow the host's"))?;
        Ok(Self(()))
    }

    /// Leaves of `/run` only these places, the service manager's socket and the resolvers.
    ///
    /// # Errors
    /// See [`NotHidden`]. `/run` is as it was then.
    pub(super) fn hide_run(&self, needed: impl Iterator<Item = PathBuf>) -> Result<(), NotHidden> {
        let manager = std::env::var_os("NOTIFY_SOCKET").map(PathBuf::from);
        let run = Path::new(RUN);
        let kept = kept(run, needed.chain(manager).chain(RESOLVERS.map(PathBuf::from)));
        // What it needs as a whole cannot be hidden.
        if kept.contains(run) {
            return Err(NotHidden::Whole);
        }
        cover(run, kept)
    }

    /// Leaves of a directory only those of these places that are in it.
    ///
    /// # Errors
    /// See [`NotHidden`]. The directory is as it was then.
    pub(super) fn hide(
        &self,
        directory: &Path,
        needed: impl Iterator<Item = PathBuf>,
    ) -> Result<(), NotHidden> {
        let mut kept = kept(directory, needed);
        if kept.remove(directory) {
            // Nothing in it was asked for besides.
            kept.clear();
        }
        cover(directory, kept)
    }
}

/// Covers a directory with an empty file system that has these places of it, and that nobody writes to.
fn cover(directory: &Path, kept: BTreeSet<PathBuf>) -> Result<(), NotHidden> {
    let nothing = None::<&str>;
    // What is below the new file system is reached by descriptors only.
    let mut named = OpenOptions::new();
    named.read(true).custom_flags(OFlag::O_PATH.bits());
    let open = |place: PathBuf| Some((named.open(&place).ok()?, place));
    let kept: Vec<(File, PathBuf)> = kept.into_iter().filter_map(open).collect();
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("tmpfs"), directory, Some("tmpfs"), flags, Some("mode=755,size=1m"))
        .map_err(system("a file system"))?;
    let filled = kept.iter().try_for_each(|(file, place)| show(file, place));
    let closed = filled.and_then(|()| {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | flags;
        Ok(mount(nothing, directory, nothing, flags, nothing)?)
    });
    closed.map_err(|source| {
        // Better the host's than one that lacks something.
        let _ = umount2(directory, MntFlags::MNT_DETACH);
        NotHidden::System { what: "what is kept of it", source }
    })
}

/// Puts something of the host's where it was.
fn show(file: &File, place: &Path) -> io::Result<()> {
    if file.metadata()?.is_dir() {
        fs::create_dir_all(place)?;
    } else {
        place.parent().map_or(Ok(()), fs::create_dir_all)?;
        File::create(place)?;
    }
    let from = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    Ok(mount(Some(from.as_str()), place, None::<&str>, flags, None::<&str>)?)
}

/// Whether what is mounted on the host is mounted in a namespace that was made from this one.
fn is_shared(mounts: &str) -> bool {
    // Of several on top of each other, the last one is seen. Its words: id, parent, device, root, place, options, and then
    // any number of tags up to a dash.
    let mut roots = mounts.lines().filter(|line| line.split(' ').nth(4) == Some("/"));
    roots.next_back().is_some_and(|line| {
        let mut tags = line.split(' ').skip(6).take_while(|it| *it != "-");
        tags.any(|tag| tag.starts_with("shared:") || tag.starts_with("master:"))
    })
}

/// Of these places, those in this directory that are there, and none within another one.
fn kept(directory: &Path, needed: impl Iterator<Item = PathBuf>) -> BTreeSet<PathBuf> {
    let there = needed.filter_map(|place| place.canonicalize().ok());
    // In this order a directory comes before what is in it.
    let there: BTreeSet<PathBuf> = there.filter(|place| place.starts_with(directory)).collect();
    let outer = |place: &&PathBuf| !place.ancestors().skip(1).any(|above| there.contains(above));
    there.iter().filter(outer).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_shared_if_the_root_that_is_seen_is() {
        let private = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n";
        let shared = "27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n";
        let follows = "27 1 254:0 / / rw master:7 propagate_from:2 - ext4 /dev/vda rw\n";
        let other = "30 27 0:21 / /proc rw shared:5 - proc shared:9 rw\n";
        assert!(is_shared(shared) && is_shared(follows) && is_shared(&format!("{private}{other}{shared}")));
        assert!(!is_shared(private) && !is_shared(&format!("{shared}{private}{other}")) && !is_shared(""));
    }

    #[test]
    fn what_is_elsewhere_or_within_what_is_kept_needs_no_place() {
        let of = |places: &[&str]| kept(Path::new(RUN), places.iter().map(PathBuf::from));
        assert!(of(&["/etc", "/proc/self", "/run/no-such-thing"]).is_empty());
        assert_eq!(of(&["/etc", "/run/."]), BTreeSet::from([RUN.into()]));
        let folder = tempfile::tempdir_in(RUN);
        // Only root makes directories there.
        let Ok(folder) = folder else { return };
        let (outer, inner) = (folder.path().to_owned(), folder.path().join("inner"));
        fs::create_dir(&inner).unwrap();
        assert_eq!(kept(Path::new(RUN), [inner, outer.clone()].into_iter()), BTreeSet::from([outer]));
    }
}
