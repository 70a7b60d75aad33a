//! Where the sockets of `outlive status` are.

use std::path::{Path, PathBuf};

use crate::socket::{self, BindError, Listener};

/// How many processes of one name a folder has room for.
const SAME_NAME: u32 = 64;
/// How the names of sockets end.
pub(super) const ENDING: &str = "sock";

/// The folders, best first: the whole host's, the user's.
pub(crate) fn folders() -> Vec<PathBuf> {
    let of_user = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|it| it.is_absolute());
    [Some("/run/outlive".into()), of_user.map(|folder| folder.join("outlive"))]
        .into_iter()
        .flatten()
        .collect()
}

/// There can be no socket where the user says.
#[derive(Debug, thiserror::Error)]
#[error("{0}: give --status another path")]
pub(crate) struct BadPlace(#[from] BindError);

/// Listens where the user says.
///
/// # Errors
/// See [`BadPlace`].
pub(super) fn listen(path: &Path) -> Result<Listener, BadPlace> {
    Ok(Listener::bind(path)?)
}

/// Why there is no socket at a usual place.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoPlace {
    /// None is known.
    #[error("there is no folder for its socket")]
    NoFolder,
    /// The last one that was tried does not take it.
    #[error(transparent)]
    Folder(#[from] BindError),
}

/// Whether this process can have a socket at a usual place.
///
/// # Errors
/// See [`NoPlace`]; why the first of them that is there cannot be used, or else why the last one cannot.
pub(crate) fn usual() -> Result<(), NoPlace> {
    usable(&folders())
}

fn usable(folders: &[PathBuf]) -> Result<(), NoPlace> {
    let mut whys = Vec::new();
    for folder in folders {
        match socket::may_bind_in(folder) {
            Ok(()) => return Ok(()),
            Err(why) => whys.push(why),
        }
    }
    let foreign = whys.iter().position(|why| matches!(why, BindError::NotOurs { .. }));
    let why = match foreign {
        Some(at) => Some(whys.swap_remove(at)),
        None => whys.pop(),
    };
    Err(why.map_or(NoPlace::NoFolder, NoPlace::Folder))
}

/// Listens in the first of these folders that can be used, under this name.
///
/// # Errors
/// See [`NoPlace`].
pub(super) fn listen_in(folders: &[PathBuf], name: &str) -> Result<Listener, NoPlace> {
    let mut why = NoPlace::NoFolder;
    for folder in folders {
        match listen_as(folder, name) {
            Ok(listener) => return Ok(listener),
            // That a folder is somebody else's can be mended; that the next one is missing says little.
            Err(_) if matches!(why, NoPlace::Folder(BindError::NotOurs { .. })) => {}
            Err(error) => why = error.into(),
        }
    }
    Err(why)
}

/// The first name that no other living process has: NAME, NAME-2, ...
fn listen_as(folder: &Path, name: &str) -> Result<Listener, BindError> {
    let good = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    let name: String = name.chars().map(good).collect();
    let mut number = 1;
    loop {
        let file = if number == 1 { format!("{name}.{ENDING}") } else { format!("{name}-{number}.{ENDING}") };
        match Listener::bind(&folder.join(file)) {
            Err(BindError::Taken(_) | BindError::NotASocket(_)) if number < SAME_NAME => number += 1,
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn living_processes_do_not_collide_and_dead_ones_are_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let (no, yes) = (directory.path().join("file"), directory.path().join("run"));
        fs::write(&no, "").unwrap();
        let listen = || listen_in(&[no.join("outlive"), yes.clone()], "a/b").unwrap();
        let name = |it: &Listener| it.path().strip_prefix(&yes).unwrap().to_str().unwrap().to_owned();
        // Left by a process that was killed.
        fs::create_dir(&yes).unwrap();
        drop(UnixListener::bind(yes.join("a_b.sock")).unwrap());
        let (first, second) = (listen(), listen());
        assert_eq!((name(&first), name(&second)), ("a_b.sock".into(), "a_b-2.sock".into()));
        assert_eq!(fs::metadata(first.path()).unwrap().permissions().mode() & 0o777, 0o600);
        drop(first);
        assert_eq!(name(&listen()), "a_b.sock");
        drop(second);
        assert_eq!(fs::read_dir(&yes).unwrap().count(), 0);
    }

    #[test]
    fn the_place_that_a_user_names_is_that_or_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let first = super::listen(&path).unwrap();
        // Nobody answers there, and there is no more room for those who ask.
        let asking: Vec<_> = (0..100).map_while(|_| crate::socket::connect(&path).ok()).collect();
        assert!((1..100).contains(&asking.len()));
        let error = super::listen(&path).unwrap_err().to_string();
        assert!(error.contains("another process") && error.contains("--status"), "{error}");
        drop(first);
        super::listen(&path).unwrap();
    }
}
