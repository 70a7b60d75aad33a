//! The host's end of the wire: a tap interface.

// UNSAFETY: attaching to a tap interface is an ioctl that no safe wrapper of our dependencies offers.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use libc::{IFF_NO_PI, IFF_TAP, IFNAMSIZ, O_NONBLOCK, TUNSETIFF};
use thiserror::Error;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

use super::output::FrameSink;

/// Longest name of an interface in bytes; the kernel's `IFNAMSIZ` counts the terminating zero.
pub const MAX_NAME: usize = IFNAMSIZ - 1;

const DEVICE: &str = "/dev/net/tun";

/// What a network device is connected to: a tap, or a socket of a test.
///
/// The descriptor becomes readable (edge-triggered is enough) when frames wait.
pub trait FramePort: FrameSink + AsRawFd {
    /// Takes the next frame; [`io::ErrorKind::WouldBlock`] if there is none. A frame longer than `buffer` is
    /// cut.
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize>;
}

/// Why a tap interface cannot be had. Each says what to do about it.
#[derive(Debug, Error)]
pub enum TapError {
    /// The kernel would not take the name for an interface, or would take it for a pattern.
    #[error(
        "\"{0}\" cannot be the name of a tap interface: use 1 to {MAX_NAME} letters, digits, '-', '_' or '.', \
         and not only dots"
    )]
    Name(String),
    /// There is no tun driver.
    #[error(
        "{DEVICE} is missing: load the tun driver with `modprobe tun`, or, in a container, start it with \
         `--device {DEVICE}`"
    )]
    NoDriver,
    /// Opening the driver is not permitted.
    #[error("no permission to open {DEVICE}: run as root, or allow this user to read and write it")]
    NoPermission,
    /// Creating or attaching to the interface is not permitted.
    #[error(
        "no permission to create the tap interface {name}: run as root or with CAP_NET_ADMIN, or have root \
         create it for this user with `ip tuntap add dev {name} mode tap user USER`"
    )]
    NotAllowed {
        /// Name of the interface.
        name: String,
    },
    /// Another program holds the interface.
    #[error("the tap interface {name} is in use by another program: stop that one, or choose another name")]
    Busy {
        /// Name of the interface.
        name: String,
    },
    /// An interface of that name exists and is not a tap.
    #[error(
        "{name} exists and is not a tap interface: choose another name (see `ip -details link show {name}`)"
    )]
    NotATap {
        /// Name of the interface.
        name: String,
    },
    /// Anything else.
    #[error("cannot open the tap interface {name}: {source}")]
    Other {
        /// Name of the interface.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// An open tap interface. It vanishes when this is dropped, unless it was there before.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Creates the tap interface `name`, or attaches to it if it exists and no one else is attached. The
    /// interface is left as it is otherwise: whoever calls brings it up and connects it.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let mut request = request(name)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(O_NONBLOCK)
            .open(DEVICE)
            .map_err(|error| open_error(name, error))?;
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is, and keeps no pointer to it.
        let result = unsafe { ioctl_with_mut_ref(&file, TUNSETIFF, &mut request) };
        if result < 0 {
            return Err(attach_error(name, io::Error::last_os_error()));
        }
        Ok(Self { file, name: name.to_owned() })
    }

    /// Name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl FrameSink for Tap {
    fn send(&self, frame: &[u8]) -> io::Result<()> {
        // A tap takes a frame whole or not at all.
        (&self.file).write(frame).map(|_| ())
    }
}

impl FramePort for Tap {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// The request to attach to `name` as a tap without packet information.
fn request(name: &str) -> Result<libc::ifreq, TapError> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let only_dots = name.bytes().all(|byte| byte == b'.');
    if only_dots || name.len() > MAX_NAME || !name.bytes().all(good) {
        return Err(TapError::Name(name.to_owned()));
    }
    let mut ifr_name = [0; IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = (IFF_TAP | IFF_NO_PI) as libc::c_short;
    Ok(libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } })
}

pub(super) fn open_error(name: &str, error: io::Error) -> TapError {
    match error.raw_os_error() {
        // ENODEV and ENXIO: the node is there, the driver is not.
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::NoDriver,
        Some(libc::EACCES | libc::EPERM) => TapError::NoPermission,
        _ => TapError::Other { name: name.to_owned(), source: error },
    }
}

pub(super) fn attach_error(name: &str, error: io::Error) -> TapError {
    let name = name.to_owned();
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => TapError::NotAllowed { name },
        Some(libc::EBUSY) => TapError::Busy { name },
        Some(libc::EINVAL | libc::EEXIST) => TapError::NotATap { name },
        _ => TapError::Other { name, source: error },
    }
}
