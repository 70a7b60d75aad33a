//! The third place: a directory of this machine that all hosts see, as if from a file server. It has the
//! arbiter, and the output of programs in hosts stays there after the host has lost its power.
//!
//! It is virtiofs, because Debian's cloud kernels have no 9p. No host caches any of it, so files made with
//! `link(2)`, O_EXCL and rename are made exactly once, and the other hosts see them at once.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{io, thread};

use crate::packages;
use crate::run::Workspace;

/// Debian's path: with QEMU until 12, then a package of its own, with other options.
const OLD: &str = "usr/lib/qemu/virtiofsd";
const NEW: &str = "usr/libexec/virtiofsd";
const START: Duration = Duration::from_secs(20);
/// Name of the share for the host's `mount -t virtiofs`.
pub(crate) const TAG: &str = "share";

/// Why hosts have no share.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShareError {
    /// There is no file server.
    #[error(
        "no virtiofsd here; to get it: apt-get install virtiofsd (Debian 12 has it in qemu-system-common)"
    )]
    Missing,
    /// It does not start.
    #[error("cannot start {program}: {source}")]
    Start {
        /// Which.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It has ended, or does not listen.
    #[error("{program} does not serve {directory}: {log}")]
    Failed {
        /// Which.
        program: PathBuf,
        /// What it should serve.
        directory: PathBuf,
        /// Its output.
        log: String,
    },
}

/// The file server's program.
pub(crate) struct ShareServer {
    program: PathBuf,
}

impl ShareServer {
    /// Finds it, and fetches it first if it is missing.
    pub(crate) fn get(workspace: &Workspace, fetch: bool) -> Result<ShareServer, ShareError> {
        let unpacked = packages::unpacked(workspace);
        let find = || {
            let roots = [Path::new("/"), &unpacked];
            let places = roots.iter().flat_map(|root| [root.join(OLD), root.join(NEW)]);
            places.into_iter().find(|path| path.is_file())
        };
        if let Some(program) = find() {
            return Ok(ShareServer { program });
        }
        packages::provide(workspace, &[packages::VIRTIOFSD], fetch);
        find().map(|program| ShareServer { program }).ok_or(ShareError::Missing)
    }

    /// Serves a directory to one host, which connects to the socket.
    pub(crate) fn serve(&self, directory: &Path, socket: &Path, log: &Path) -> Result<Share, ShareError> {
        let failed = |source| ShareError::Start { program: self.program.clone(), source };
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(&self.program);
        let errors = File::create(log).map_err(failed)?;
        let started = command
            .args(self.arguments(directory, socket))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn();
        let mut share = Share { server: started.map_err(failed)? };
        let start = Instant::now();
        while !socket.exists() {
            let ended = share.server.try_wait().is_ok_and(|it| it.is_some());
            if ended || start.elapsed() > START {
                return Err(ShareError::Failed {
                    program: self.program.clone(),
                    directory: directory.to_path_buf(),
                    log: fs::read_to_string(log).unwrap_or_default(),
                });
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(share)
    }

    fn arguments(&self, directory: &Path, socket: &Path) -> Vec<String> {
        let (directory, socket) = (directory.display(), socket.display());
        if self.program.ends_with(OLD) {
            let options = format!("source={directory},cache=none,sandbox=chroot");
            vec![format!("--socket-path={socket}"), "-o".to_string(), options]
        } else {
            let options = ["--cache=never", "--sandbox=none"].map(str::to_string);
            [vec![format!("--socket-path={socket}"), format!("--shared-dir={directory}")], options.to_vec()]
                .concat()
        }
    }
}

/// A share served to a host. Serving ends when this is dropped.
pub(crate) struct Share {
    server: Child,
}

impl Drop for Share {
    fn drop(&mut self) {
        // It ends by itself when its host ends.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_share_is_cached() {
        let arguments = |program: &str| {
            let server = ShareServer { program: program.into() };
            server.arguments(Path::new("/dir"), Path::new("/socket")).join(" ")
        };
        let old = arguments("/usr/lib/qemu/virtiofsd");
        assert_eq!(old, "--socket-path=/socket -o source=/dir,cache=none,sandbox=chroot");
        let new = arguments("/unpacked/usr/libexec/virtiofsd");
        assert_eq!(new, "--socket-path=/socket --shared-dir=/dir --cache=never --sandbox=none");
    }
}
