//! The sockets that clients attach to.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, fchmod};
use socket2::{Domain, SockAddr, Socket, Type};

/// A listening socket in the file system that only its owner may use. Dropping it removes the file.
#[derive(Debug)]
pub(crate) struct Listener {
    pub(crate) socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, so that a file that someone else has put there since is not removed.
    file: (u64, u64),
}

impl Listener {
    /// Listens at `path`. A socket that an earlier process left there is replaced.
    ///
    /// # Errors
    /// One line with the remedy.
    pub(crate) fn bind(path: &Path) -> Result<Self, String> {
        make_room(path)?;
        let failed = |error: io::Error| format!("cannot make the console socket {}: {error}", path.display());
        let address = SockAddr::unix(path).map_err(|_| {
            format!("{} is too long for a socket: give --console a shorter path", path.display())
        })?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed)?;
        // The file takes the socket's mode, so there is no moment at which others may connect.
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|error| failed(error.into()))?;
        socket.bind(&address).map_err(failed)?;
        let file = identity(path).map_err(failed)?;
        let listener =
            Self { socket: UnixListener::from(OwnedFd::from(socket)), path: path.to_owned(), file };
        listener.listen().map_err(failed)?;
        Ok(listener)
    }

    fn listen(&self) -> io::Result<()> {
        nix_listen(&self.socket)?;
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

fn nix_listen(socket: &UnixListener) -> io::Result<()> {
    socket2::SockRef::from(socket).listen(8)
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

/// Makes the directory, and removes a socket on which nobody listens.
fn make_room(path: &Path) -> Result<(), String> {
    if let Some(directory) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(|error| {
            format!("cannot make the directory {}: {error}; give --console another", directory.display())
        })?;
    }
    let kind = match fs::symlink_metadata(path) {
        Ok(file) => file.file_type(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(format!("cannot read {}: {error}", path.display())),
    };
    if !kind.is_socket() {
        return Err(format!(
            "{} is in the way and is not a socket: give --console another directory",
            path.display()
        ));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path)
            .map_err(|error| format!("cannot remove the old {}: {error}", path.display())),
        _ => {
            Err(format!("another VM has its console at {}: give --console another directory", path.display()))
        }
    }
}
