//! One process of a VM: started, or found alive by a later node.
//!
//! Its standard input is a file that is locked. The lock is the process's from its very start, and ends with it, so a
//! node that comes later knows for certain whether the VM has a process: there is no time between the start and the
//! lock, and no number that another process might have by now.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::files;
use crate::node::STATE_VARIABLE;

/// What a service manager tells the node, and is not meant for its children.
const OF_NODE: [&str; 6] =
    ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"];

/// A process of a VM.
#[derive(Debug)]
pub(crate) enum Process {
    /// A child of this node.
    Child(Child),
    /// It lives, and is nobody's child.
    Adopted {
        /// What only a living process has locked.
        lock: PathBuf,
        /// Which it is, once that is certain.
        known: Option<Known>,
    },
}

/// A process that has the lock for certain.
#[derive(Debug)]
pub(crate) struct Known {
    pid: u32,
    /// Of this one process for ever, also when its number is another's.
    descriptor: OwnedFd,
}

/// Whether a process has ended.
#[derive(Debug)]
pub(crate) enum Life {
    /// Not yet.
    Lives,
    /// A child has.
    Ended(ExitStatus),
    /// One that was adopted has.
    Gone,
}

impl Process {
    /// Starts a process, which learns where the node's state is. `None`: an earlier one has not let go of the lock yet.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn start(
        program: &Path,
        arguments: &[String],
        state: &Path,
        lock: &Path,
        log: File,
    ) -> io::Result<Option<Self>> {
        let Some(locked) = files::lock(lock)? else { return Ok(None) };
        let mut command = Command::new(program);
        command.arg("run").args(arguments).stdin(Stdio::from(locked));
        command.stdout(log.try_clone()?).stderr(log);
        for name in OF_NODE {
            command.env_remove(name);
        }
        command.env(STATE_VARIABLE, state);
        // What is meant for the node's terminal does not reach the VM.
        Ok(Some(Self::Child(command.process_group(0).current_dir("/").spawn()?)))
    }

    /// Finds the process that has the lock, if there is one.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn find(lock: &Path) -> io::Result<Option<Self>> {
        Ok(match files::lock(lock)? {
            Some(_free) => None,
            None => Some(Self::Adopted { lock: lock.to_owned(), known: None }),
        })
    }

    /// Its number, if it is known.
    pub(crate) fn pid(&self) -> Option<u32> {
        match self {
            Self::Child(child) => Some(child.id()),
            Self::Adopted { known, .. } => known.as_ref().map(|it| it.pid),
        }
    }

    /// Whether an earlier node has started it.
    pub(crate) fn is_adopted(&self) -> bool {
        matches!(self, Self::Adopted { .. })
    }

    /// Whether it has this number, which somebody at its socket has. A record's number is not enough: the record may be
    /// of an earlier process, and the number a stranger's by now. Nor is the socket's: others may have put theirs there.
    pub(crate) fn is(&mut self, pid: u32) -> bool {
        match self {
            Self::Child(child) => child.id() == pid,
            Self::Adopted { known: Some(known), .. } if known.pid == pid => true,
            Self::Adopted { lock, known } => match look_at(pid, lock) {
                Ok(found) => {
                    let is = found.is_some();
                    *known = found.or(known.take());
                    is
                }
                Err(error) => {
                    tracing::warn!(
                        %error, "cannot look at the process {pid}, so it is not known whether it is a VM's: run the node \
                         with CAP_SYS_PTRACE"
                    );
                    false
                }
            },
        }
    }

    /// Whether it has ended. Never waits.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn life(&mut self) -> io::Result<Life> {
        Ok(match self {
            Self::Child(child) => child.try_wait()?.map_or(Life::Lives, Life::Ended),
            Self::Adopted { lock, .. } => match files::lock(lock)? {
                Some(_free) => Life::Gone,
                None => Life::Lives,
            },
        })
    }

    /// Sends SIGTERM, which presses the guest's power button or ends a standby.
    ///
    /// # Errors
    /// The operating system's; also if the number of an adopted process is not known yet.
    pub(crate) fn terminate(&mut self) -> io::Result<()> {
        let child;
        let process = match self {
            // Nobody else has its number until this node has asked how it has ended.
            Self::Child(it) => {
                let pid = Pid::from_raw(it.id() as i32).ok_or(io::ErrorKind::NotFound)?;
                child = pidfd_open(pid, PidfdFlags::empty())?;
                &child
            }
            Self::Adopted { known, .. } => &known.as_ref().ok_or(io::ErrorKind::NotFound)?.descriptor,
        };
        Ok(pidfd_send_signal(process, Signal::TERM)?)
    }
}

/// The process of this number, if its standard input is the file of the lock.
fn look_at(pid: u32, lock: &Path) -> io::Result<Option<Known>> {
    let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
    // Before the look: should the number become another's, the descriptor is of nobody.
    let looked = pidfd_open(number, PidfdFlags::empty()).map_err(io::Error::from).and_then(|descriptor| {
        let (input, lock) = (fs::metadata(format!("/proc/{pid}/fd/0"))?, fs::symlink_metadata(lock)?);
        let is = (input.dev(), input.ino()) == (lock.dev(), lock.ino());
        Ok(is.then_some(Known { pid, descriptor }))
    });
    match looked {
        // It has ended, or has no standard input.
        Err(error) if error.kind() == io::ErrorKind::NotFound || is_gone(&error) => Ok(None),
        looked => looked,
    }
}

/// Whether a process has ended, as the kernel says it.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::errno::Errno::ESRCH as i32)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::time::Duration;

    use super::*;

    fn wait(process: &mut Process) -> Life {
        loop {
            match process.life().unwrap() {
                Life::Lives => std::thread::sleep(Duration::from_millis(5)),
                end => return end,
            }
        }
    }

    /// `sh run -c ...`: it runs the file `run` in `/`, so the arguments of a test are a script's.
    fn script(folder: &Path, text: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = folder.join("program");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn a_process_is_known_by_its_lock_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (lock, log) = (folder.path().join("lock"), folder.path().join("log"));
        let program = script(
            folder.path(),
            "echo \"$@\" \"$NOTIFY_SOCKET\"; trap 'exit 7' TERM; while :; do sleep 0.01; done",
        );
        assert!(Process::find(&lock).unwrap().is_none());
        let start = || {
            let log = crate::log::open(&log).unwrap();
            Process::start(&program, &["--name=a b".into()], folder.path(), &lock, log)
        };
        let mut child = start().unwrap().unwrap();
        assert!(start().unwrap().is_none(), "two processes");
        let mut found = Process::find(&lock).unwrap().expect("it lives");
        assert!(found.is_adopted() && matches!(found.life().unwrap(), Life::Lives));
        assert!(found.terminate().is_err(), "nobody knows its number");
        assert!(!found.is(std::process::id()) && !found.is(u32::MAX), "a stranger has the number");
        assert!(found.terminate().is_err() && found.pid().is_none());
        assert!(found.is(child.pid().unwrap()));
        while std::fs::read_to_string(&log).unwrap().is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(std::fs::read_to_string(&log).unwrap().trim(), "run --name=a b");
        // The shell may not have heard the first one yet.
        while found.terminate().is_ok() && matches!(child.life().unwrap(), Life::Lives) {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(
            matches!(wait(&mut child), Life::Ended(status) if status.code() == Some(7) || status.signal() == Some(15))
        );
        assert!(matches!(wait(&mut found), Life::Gone));
        assert!(found.terminate().is_err());
        assert!(
            start()
                .unwrap()
                .is_some_and(|mut it| it.terminate().is_ok() && matches!(wait(&mut it), Life::Ended(_)))
        );
    }
}
