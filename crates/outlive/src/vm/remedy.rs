//! What a user can do about an error of the machine. The library says what is wrong; the program says which
//! option helps.

use std::error::Error;

use outlive_machine::{
    BootError, CreateError, KernelError, LinuxBootError, LockError, MemoryError, OutgoingError, StartError,
    StartLinuxError,
};

/// An error for which the program may know a remedy.
pub(crate) trait Remedy: Error {
    /// What the user can do.
    fn remedy(&self) -> Option<&'static str>;

    /// The error in one line, with the remedy if there is one.
    fn with_remedy(&self) -> String {
        match self.remedy() {
            Some(remedy) => format!("{self}: {remedy}"),
            None => self.to_string(),
        }
    }
}

/// An error of the machine, shown with its remedy.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.with_remedy())]
pub(crate) struct Remedied<E: Remedy + 'static>(#[source] pub(crate) E);

const MORE_MEMORY: &str = "give the VM more with --memory";

impl Remedy for MemoryError {
    fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::Size(_) => Some("give --memory such a size"),
            Self::Map { .. } => Some("give the VM less with --memory"),
            Self::Firmware(_) | Self::Regions(_) => None,
        }
    }
}

impl Remedy for CreateError {
    fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::Memory(error) => error.remedy(),
            Self::State(_) => {
                Some("use hosts with an older processor or kernel until a newer Outlive knows it")
            }
            _ => None,
        }
    }
}

impl Remedy for OutgoingError {
    fn remedy(&self) -> Option<&'static str> {
        Some("lower --max-dirty")
    }
}

impl Remedy for LockError {
    fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::Limit(_) => Some(
                "give it CAP_IPC_LOCK, which root usually has, or lift the limit (`ulimit -l unlimited`, or LimitMEMLOCK=infinity in the \
                 systemd unit), or leave out --lock-memory",
            ),
            Self::Refused(_) => Some("leave out --lock-memory"),
        }
    }
}

impl Remedy for StartError {
    fn remedy(&self) -> Option<&'static str> {
        matches!(self, Self::Boot(BootError::Memory(_))).then_some(MORE_MEMORY)
    }
}

impl Remedy for StartLinuxError {
    fn remedy(&self) -> Option<&'static str> {
        use LinuxBootError::{Initrd, Kernel, Memory};
        let Self::Boot(error) = self else { return None };
        let short = matches!(error, Initrd { .. } | Memory(_) | Kernel(KernelError::Memory(_)));
        short.then_some(MORE_MEMORY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lacks_memory_names_the_option_and_nothing_else_does() {
        let size = outlive_machine::ranges(5).unwrap_err();
        let line = "guest memory cannot have 5 bytes: it must be a multiple of 1 MiB, from 32 MiB to 64 TiB: give \
                    --memory such a size";
        assert_eq!(size.with_remedy(), line);
        let huge = outlive_machine::ranges(100 << 40).unwrap_err().to_string();
        assert!(huge.starts_with("guest memory cannot have 100 TiB: "), "{huge}");
        assert_eq!(CreateError::from(size).with_remedy(), line);
        let linux = |error: LinuxBootError| StartLinuxError::from(error).with_remedy();
        let kernel = LinuxBootError::from(KernelError::Memory(1 << 30));
        for short in [kernel, LinuxBootError::Memory(7), LinuxBootError::Initrd { initrd: 1, limit: 1 }] {
            let line = linux(short);
            assert!(line.ends_with(": give the VM more with --memory"), "{line}");
        }
        assert!(!linux(LinuxBootError::CommandLine { len: 2, limit: 1 }).contains("--"));
    }
}
