//! Sockets in the file system, for clients on this host: those of the consoles and of `outlive status`.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, Flock, FlockArg};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{AccessFlags, faccessat};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::sandbox::{Foreign, foreign, was_made};

/// How often, and with which pauses, a folder is asked for that another process is working in.
const LOCK_TRIES: (u32, Duration) = (100, Duration::from_millis(10));

/// Who may connect to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum For {
    /// The user who made it.
    Owner,
    /// Whoever can reach its directory.
    All,
}

impl For {
    /// The rights that the file does not have: of all that there are, 0600 or 0666 remain.
    fn mask(self) -> Mode {
        Mode::from_bits_truncate(match self {
            Self::Owner => 0o177,
            Self::All => 0o111,
        })
    }
}

/// A listening socket that only its owner may use, unless it was made for all. Dropping it removes the file.
#[derive(Debug)]
pub(crate) struct Listener {
    pub(crate) socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, so that a file that someone else has put there since is not removed.
    file: (u64, u64),
    /// Goes after the file.
    _made: Option<MadeDirectory>,
}

/// A directory that was made for a socket. Dropping it removes it, unless somebody else uses it by then.
#[derive(Debug)]
struct MadeDirectory(PathBuf);

impl Drop for MadeDirectory {
    fn drop(&mut self) {
        // Fails if it is not empty.
        let _ = fs::remove_dir(&self.0);
    }
}

/// Why there is no socket. The caller knows which option helps.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BindError {
    /// Another process has it.
    #[error("another process listens at {}", .0.display())]
    Taken(PathBuf),
    /// Something else has the name.
    #[error("{} is in the way and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// The kernel's limit is 107 bytes.
    #[error("{} is too long for a socket", .0.display())]
    TooLong(PathBuf),
    /// There is no such directory, and none can be made.
    #[error("cannot make the directory {}: {error}", .path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Its directory is somebody else's.
    #[error(
        "cannot make a socket in {}: it belongs to the user {owner}, and this process runs as {user}{}; if nobody else \
         uses it, `chown {user}: {}` makes it that user's", .path.display(), without(user), .path.display()
    )]
    NotOurs {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        owner: String,
        /// Who this process is.
        user: String,
    },
    /// The operating system does not make it.
    #[error("cannot make the socket {}: {error}", .path.display())]
    Refused {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// Root has no rights in the sandbox, which is not what its name says.
fn without(user: &str) -> &'static str {
    if user == "root" { " without its rights" } else { "" }
}

/// Whether this process may make a socket in this directory.
///
/// # Errors
/// See [`BindError`].
pub(crate) fn may_bind_in(directory: &Path) -> Result<(), BindError> {
    match faccessat(AT_FDCWD, directory, AccessFlags::W_OK | AccessFlags::X_OK, AtFlags::AT_EACCESS) {
        Ok(()) => Ok(()),
        Err(Errno::EACCES) => Err(not_ours(directory)),
        Err(error) => Err(BindError::Refused { path: directory.to_owned(), error: error.into() }),
    }
}

fn not_ours(directory: &Path) -> BindError {
    let Foreign { owner, user } = foreign(directory);
    BindError::NotOurs { path: directory.to_owned(), owner, user }
}

impl Listener {
    /// Listens at `path`, whose directory is made if it is missing. A socket on which nobody listens any more
    /// is replaced.
    ///
    /// # Errors
    /// See [`BindError`].
    pub(crate) fn bind(path: &Path) -> Result<Self, BindError> {
        Self::bind_for(For::Owner, path)
    }

    /// The same for every user of this host who can reach the directory. Nothing may be heard there.
    ///
    /// # Errors
    /// See [`BindError`].
    pub(crate) fn bind_for_all(path: &Path) -> Result<Self, BindError> {
        Self::bind_for(For::All, path)
    }

    fn bind_for(whom: For, path: &Path) -> Result<Self, BindError> {
        match Self::try_bind(whom, path) {
            // The process that made the directory has just removed it.
            Err(BindError::Refused { error, .. }) if error.kind() == ErrorKind::NotFound => {
                Self::try_bind(whom, path)
            }
            bound => bound,
        }
    }

    fn try_bind(whom: For, path: &Path) -> Result<Self, BindError> {
        let refused = |error: io::Error| BindError::Refused { path: path.to_owned(), error };
        let address = SockAddr::unix(path).map_err(|_| BindError::TooLong(path.to_owned()))?;
        let (made, _lock) = make_directory(path)?;
        // What the system would say later names neither owner nor remedy.
        let directory = folder(path);
        if let Err(foreign @ BindError::NotOurs { .. }) = may_bind_in(directory) {
            return Err(foreign);
        }
        make_room(path, &address)?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(refused)?;
        bind_with_mode(whom, &socket, &address).map_err(refused)?;
        let file = identity(path).map_err(refused)?;
        let listener = Self {
            socket: UnixListener::from(OwnedFd::from(socket)),
            path: path.to_owned(),
            file,
            _made: made,
        };
        listener.listen(whom).map_err(refused)?;
        Ok(listener)
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn listen(&self, whom: For) -> io::Result<()> {
        // Where everybody may come, some may come to be in the way.
        let waiting = if whom == For::All { 256 } else { 8 };
        socket2::SockRef::from(&self.socket).listen(waiting)?;
        self.socket.set_nonblocking(true)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            // If it is gone already, that is fine.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Connects without waiting: a process that stands still does not hold this one up
/// ([`ErrorKind::WouldBlock`]).
///
/// # Errors
/// The operating system's.
pub(crate) fn connect(path: &Path) -> io::Result<UnixStream> {
    connect_to(&SockAddr::unix(path)?)
}

fn connect_to(address: &SockAddr) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    socket.connect(address)?;
    socket.set_nonblocking(false)?;
    Ok(UnixStream::from(OwnedFd::from(socket)))
}

/// Binds, so that the file has its mode from the first moment on. A thread that could change the mode of a file later could
/// change that of each file of its user, so in the sandbox none may: the mask says it.
///
/// A mask is the whole process's, and other threads make files meanwhile. So a thread with a mask of its own does it.
fn bind_with_mode(whom: For, socket: &Socket, address: &SockAddr) -> io::Result<()> {
    let bind = || {
        match unshare(CloneFlags::CLONE_FS) {
            Ok(()) => {
                umask(whom.mask());
                socket.bind(address)
            }
            // Where that is forbidden (a container's filter), others may get files that are closed to all but their owner for
            // that moment, and none that is open to more.
            Err(_) if whom == For::Owner => {
                let before = umask(Mode::S_IRWXG | Mode::S_IRWXO);
                let bound = socket.bind(address);
                umask(before);
                bound
            }
            Err(error) => Err(error.into()),
        }
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("bind".into()).spawn_scoped(scope, bind)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that binds has panicked")))
    })
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(directory) if directory.as_os_str().is_empty() => Path::new("."),
        Some(directory) => directory,
        None => path,
    }
}

/// Makes the directory, which goes with the socket, but not those above it: a mistyped path leaves nothing behind.
/// Locks it, so that two processes do not replace the same old socket and one of them loses its new one. A lock that
/// does not come, or that the file system does not have, is done without.
fn make_directory(path: &Path) -> Result<(Option<MadeDirectory>, Option<Flock<File>>), BindError> {
    let directory = folder(path);
    let made = match fs::DirBuilder::new().mode(0o700).create(directory) {
        Err(_) if directory.is_dir() => was_made(directory).then(|| MadeDirectory(directory.to_owned())),
        Err(error) => return Err(BindError::Directory { path: directory.to_owned(), error }),
        Ok(()) => Some(MadeDirectory(directory.to_owned())),
    };
    let Ok(mut file) = File::open(directory) else { return Ok((made, None)) };
    for _ in 0..LOCK_TRIES.0 {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok((made, Some(lock))),
            Err((again, Errno::EWOULDBLOCK)) => file = again,
            Err(_) => return Ok((made, None)),
        }
        thread::sleep(LOCK_TRIES.1);
    }
    Ok((made, None))
}

/// Removes a socket on which nobody listens.
fn make_room(path: &Path, address: &SockAddr) -> Result<(), BindError> {
    let refused = |error: io::Error| BindError::Refused { path: path.to_owned(), error };
    match fs::symlink_metadata(path) {
        Ok(file) if file.file_type().is_socket() => {}
        Ok(_) => return Err(BindError::NotASocket(path.to_owned())),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(refused(error)),
    }
    match connect_to(address) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(refused),
        // Whoever it is: it is there, or cannot be known not to be.
        _ => Err(BindError::Taken(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// Whatever the mask of the process is. (The sandbox lets nobody change a mode later.)
    #[test]
    fn a_socket_has_its_mode_from_the_first_moment_on() {
        let there = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let (own, all) = (there.path().join("own"), there.path().join("all"));
        let _own = Listener::bind(&own).unwrap();
        let _all = Listener::bind_for_all(&all).unwrap();
        assert_eq!((mode(&own), mode(&all)), (0o600, 0o666));
    }

    #[test]
    fn a_directory_that_was_made_for_a_socket_goes_with_it() {
        let there = tempfile::tempdir().unwrap();
        let (made, path) = (there.path().join("typo"), there.path().join("typo/socket"));
        drop(Listener::bind(&path).unwrap());
        assert!(!made.exists());
        // Neither one that somebody else uses, nor one that was there before.
        let first = Listener::bind(&path).unwrap();
        let second = Listener::bind(&made.join("other")).unwrap();
        drop(first);
        assert!(second.path().exists());
        drop(second);
        assert!(made.exists());
        drop(Listener::bind(&path).unwrap());
        assert!(made.exists());
        // Nor does a failure leave one.
        let long = there.path().join("long").join("x".repeat(80)).join("x".repeat(80));
        assert!(Listener::bind(&long).is_err() && !there.path().join("long").exists());
    }
}
