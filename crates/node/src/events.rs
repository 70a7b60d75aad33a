//! The place of a VM's events, where its definition names none: a directory that is the VM's alone. Its process may write to
//! all of it, so nothing of the node's, or of another VM's, is there.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, fchown};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::unistd::{User, getegid, geteuid};

/// The file, and the one that it becomes when it is full.
const ENDINGS: [&str; 2] = ["", ".1"];

/// Makes the place of the file `events` for a process of this user, or of the node's own. Files that an earlier release has
/// had at `old` come along. Call it while the VM has no process.
///
/// # Errors
/// The operating system's.
pub(crate) fn prepare(events: &Path, old: &Path, user: Option<&str>) -> io::Result<()> {
    let folder = events.parent().ok_or(ErrorKind::InvalidInput)?;
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    for ending in ENDINGS {
        let (from, to) = (with(old, ending), with(events, ending));
        if fs::symlink_metadata(&from).is_ok() && fs::symlink_metadata(&to).is_err() {
            fs::rename(from, to)?;
        }
    }
    // A user who is not there is what the process itself complains of.
    let owner = match user.map(User::from_name) {
        None => (geteuid().as_raw(), getegid().as_raw()),
        Some(Ok(Some(user))) => (user.uid.as_raw(), user.gid.as_raw()),
        Some(_) => return Ok(()),
    };
    give(folder, owner)?;
    ENDINGS.iter().try_for_each(|ending| give_file(&with(events, ending), owner))
}

fn with(path: &Path, ending: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(ending);
    path.into()
}

fn give(folder: &Path, (user, group): (u32, u32)) -> io::Result<()> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
    let folder = OpenOptions::new().read(true).custom_flags(flags.bits()).open(folder)?;
    let about = folder.metadata()?;
    if about.mode() & 0o7777 != 0o700 {
        folder.set_permissions(Permissions::from_mode(0o700))?;
    }
    if about.uid() != user {
        fchown(&folder, Some(user), Some(group))?;
    }
    Ok(())
}

/// Whoever may write to the directory may have put anything there: a link to another's file is left alone.
fn give_file(path: &Path, (user, group): (u32, u32)) -> io::Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW;
    let file = match OpenOptions::new().read(true).custom_flags(flags.bits()).open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    let about = file.metadata()?;
    if !about.is_file() || about.nlink() > 1 || about.uid() == user {
        return Ok(());
    }
    // A descriptor that only names a file changes it by this way alone.
    chown(format!("/proc/self/fd/{}", file.as_raw_fd()), Some(user), Some(group))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_vm_has_a_directory_for_its_user_and_what_was_there_before_comes_along() {
        let folder = tempfile::tempdir().unwrap();
        let events = folder.path().join("web/events");
        let old = folder.path().join("web.events");
        fs::write(&old, "the last words").unwrap();
        prepare(&events, &old, None).unwrap();
        assert_eq!(fs::read_to_string(&events).unwrap(), "the last words");
        assert!(!old.exists());
        let about = |path: &Path| fs::symlink_metadata(path).unwrap();
        assert_eq!(about(events.parent().unwrap()).mode() & 0o7777, 0o700);
        prepare(&events, &old, Some("nobody-of-this-name")).unwrap();
        if !geteuid().is_root() {
            return println!("skipped: not root");
        }
        let nobody = User::from_name("nobody").unwrap().unwrap().uid.as_raw();
        // It may write there by then.
        let (secret, whose) = (folder.path().join("secret"), || about(&folder.path().join("secret")).uid());
        fs::write(&secret, "").unwrap();
        fs::hard_link(&secret, with(&events, ".1")).unwrap();
        prepare(&events, &old, Some("nobody")).unwrap();
        assert_eq!(
            (about(&events).uid(), about(events.parent().unwrap()).uid(), whose()),
            (nobody, nobody, 0)
        );
        fs::remove_file(&events).unwrap();
        std::os::unix::fs::symlink(&secret, &events).unwrap();
        prepare(&events, &old, Some("nobody")).unwrap();
        assert_eq!(whose(), 0);
        prepare(&events, &old, None).unwrap();
        assert_eq!(about(events.parent().unwrap()).uid(), 0);
    }
}
