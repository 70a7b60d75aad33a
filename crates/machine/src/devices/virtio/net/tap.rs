//! The host's end of the wire: a tap interface.

// UNSAFETY: attaching to a tap interface is an ioctl that no safe wrapper of our dependencies offers.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use libc::{
    IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, IFNAMSIZ,
    O_NONBLOCK, TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUNGETFEATURES, TUNSETIFF, TUNSETOFFLOAD,
    TUNSETQUEUE, TUNSETVNETHDRSZ,
};
use thiserror::Error;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use super::offload::{GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, HEADER};
use super::output::FrameSink;

/// Longest name of an interface in bytes; the kernel's `IFNAMSIZ` counts the terminating zero.
pub const MAX_NAME: usize = IFNAMSIZ - 1;

const DEVICE: &str = "/dev/net/tun";

/// What a network device is connected to: a tap, or a socket of a test. It has one queue for each queue pair
/// of the guest; those in use share the frames that come. Every frame has a header in front of it
/// ([`offload`](super::offload)).
pub trait FramePort: FrameSink {
    /// Number of queues.
    fn pairs(&self) -> usize {
        1
    }

    /// Becomes readable (edge-triggered is enough) when frames wait in a queue. Watched from the start on,
    /// when all queues are in use.
    fn fd(&self, pair: usize) -> RawFd;

    /// The tap, open once more: the same queues, so whoever reads there takes frames away from here. A port need not be a
    /// tap.
    ///
    /// # Errors
    /// The operating system's.
    fn again(&self) -> io::Result<Tap> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Takes the next frame of a queue; [`io::ErrorKind::WouldBlock`] if there is none. A frame longer than
    /// `buffer` is cut.
    fn receive(&self, pair: usize, buffer: &mut [u8]) -> io::Result<usize>;

    /// From now on frames may need this work by the guest, given as feature bits. May block.
    fn set_offloads(&self, offloads: u64) -> io::Result<()>;

    /// From now on frames come only in this many queues, the first ones. May block.
    fn set_pairs(&self, pairs: usize) -> io::Result<()>;
}

/// Why a tap interface cannot be opened. Each says what to do about it.
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
    /// The interface was made for one queue.
    #[error(
        "the tap interface {name} has only one queue: have it made with `ip tuntap add dev {name} mode tap \
         multi_queue`, or give the guest one queue"
    )]
    OneQueue {
        /// Name of the interface.
        name: String,
    },
    /// The kernel's taps cannot carry the headers that say what is left to do about a frame.
    #[error("the tun driver has no virtio headers (IFF_VNET_HDR): use a kernel of Linux 2.6.32 or later")]
    NoHeaders,
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
    /// One for each queue.
    files: Vec<File>,
    /// How many of them are in use: the first ones.
    attached: AtomicUsize,
    name: String,
}

impl Tap {
    /// Creates the tap interface `name`, or attaches to it if it exists and no one else is attached.
    /// Otherwise the interface stays as it is: the caller switches it on and connects it.
    pub fn open(name: &str) -> Result<Self, TapError> {
        Self::with_queues(name, 1)
    }

    /// The same with several queues, all in use at first. The kernel then does not tell whether someone else
    /// is attached, too.
    pub fn with_queues(name: &str, queues: u16) -> Result<Self, TapError> {
        check_name(name)?;
        let several = if queues > 1 { IFF_MULTI_QUEUE } else { 0 };
        let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | several;
        let mut files = Vec::with_capacity(queues.into());
        for _ in 0..queues {
            let file = open_driver(name)?;
            attach(&file, name, flags)?;
            prepare(&file).map_err(|source| TapError::Other { name: name.to_owned(), source })?;
            files.push(file);
        }
        Ok(Self { files, attached: AtomicUsize::new(queues.into()), name: name.to_owned() })
    }

    /// A tap whose queues were opened elsewhere by [`with_queues`](Self::with_queues), all in use.
    pub fn of_queues(name: &str, queues: Vec<OwnedFd>) -> Self {
        let attached = AtomicUsize::new(queues.len());
        Self { files: queues.into_iter().map(File::from).collect(), attached, name: name.to_owned() }
    }

    /// Its queues, for another process.
    pub fn queues(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.files.iter().map(File::as_fd)
    }

    /// Name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl FrameSink for Tap {
    fn send(&self, pair: usize, packet: &[u8]) -> io::Result<()> {
        // A pair may have gone out of use while its frames were held.
        let pair = if pair < self.attached.load(Ordering::Acquire) { pair } else { 0 };
        // A tap takes a frame whole or not at all.
        match (&self.files[pair]).write(packet) {
            Err(error) if pair > 0 && error.raw_os_error() == Some(libc::EBADFD) => {
                (&self.files[0]).write(packet)
            }
            result => result,
        }
        .map(|_| ())
    }
}

impl FramePort for Tap {
    fn pairs(&self) -> usize {
        self.files.len()
    }

    fn fd(&self, pair: usize) -> RawFd {
        self.files[pair].as_raw_fd()
    }

    fn again(&self) -> io::Result<Tap> {
        let files = self.files.iter().map(File::try_clone).collect::<io::Result<_>>()?;
        let attached = AtomicUsize::new(self.attached.load(Ordering::Acquire));
        Ok(Tap { files, attached, name: self.name.clone() })
    }

    fn receive(&self, pair: usize, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.files[pair]).read(buffer)
    }

    fn set_offloads(&self, offloads: u64) -> io::Result<()> {
        set_offloads(&self.files[0], offloads)
    }

    fn set_pairs(&self, pairs: usize) -> io::Result<()> {
        let pairs = pairs.clamp(1, self.files.len());
        let before = self.attached.load(Ordering::Acquire);
        // Out of use: first for those who send, then for the kernel.
        self.attached.fetch_min(pairs, Ordering::AcqRel);
        for file in &self.files[pairs.min(before)..before] {
            set_queue(file, IFF_DETACH_QUEUE)?;
        }
        for (index, file) in self.files[..pairs].iter().enumerate().skip(before) {
            set_queue(file, IFF_ATTACH_QUEUE)?;
            self.attached.store(index + 1, Ordering::Release);
        }
        Ok(())
    }
}

fn check_name(name: &str) -> Result<(), TapError> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let only_dots = name.bytes().all(|byte| byte == b'.');
    if only_dots || name.len() > MAX_NAME || !name.bytes().all(good) {
        return Err(TapError::Name(name.to_owned()));
    }
    Ok(())
}

fn open_driver(name: &str) -> Result<File, TapError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(O_NONBLOCK);
    let file = options.open(DEVICE).map_err(|error| open_error(name, error))?;
    let mut features: libc::c_int = 0;
    // SAFETY: TUNGETFEATURES writes one int, which `features` is.
    let result = unsafe { ioctl_with_mut_ref(&file, TUNGETFEATURES, &mut features) };
    if result < 0 {
        return Err(TapError::Other { name: name.to_owned(), source: io::Error::last_os_error() });
    }
    if features & IFF_VNET_HDR == 0 {
        return Err(TapError::NoHeaders);
    }
    Ok(file)
}

/// Makes `file` a queue of the interface.
fn attach(file: &File, name: &str, flags: libc::c_int) -> Result<(), TapError> {
    let Err(error) = set_interface(file, name, flags) else { return Ok(()) };
    // The kernel says the same if it is no tap at all, and if it was made for one queue and is asked for
    // several or the other way round.
    if error.raw_os_error() == Some(libc::EINVAL)
        && set_interface(file, name, flags ^ IFF_MULTI_QUEUE).is_ok()
    {
        let wanted_several = flags & IFF_MULTI_QUEUE != 0;
        return if wanted_several { Err(TapError::OneQueue { name: name.to_owned() }) } else { Ok(()) };
    }
    Err(attach_error(name, error))
}

fn set_interface(file: &File, name: &str, flags: libc::c_int) -> io::Result<()> {
    let mut request = request(name, flags);
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is, and keeps no pointer to it.
    check(unsafe { ioctl_with_mut_ref(file, TUNSETIFF, &mut request) })
}

/// Headers of our length, nothing left to the guest.
fn prepare(file: &File) -> io::Result<()> {
    let header = HEADER as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads one int, which `header` is.
    check(unsafe { ioctl_with_ref(file, TUNSETVNETHDRSZ, &header) })?;
    set_offloads(file, 0)
}

fn set_offloads(file: &File, offloads: u64) -> io::Result<()> {
    const NAMES: [(u64, libc::c_uint); 4] = [
        (GUEST_CSUM, TUN_F_CSUM),
        (GUEST_TSO4, TUN_F_TSO4),
        (GUEST_TSO6, TUN_F_TSO6),
        (GUEST_ECN, TUN_F_TSO_ECN),
    ];
    let bits =
        NAMES.iter().filter(|(feature, _)| offloads & feature != 0).fold(0, |bits, (_, bit)| bits | bit);
    // SAFETY: TUNSETOFFLOAD takes a number; no pointers are involved.
    check(unsafe { ioctl_with_val(file, TUNSETOFFLOAD, bits.into()) })
}

/// Takes a queue into use or out of it.
fn set_queue(file: &File, flag: libc::c_int) -> io::Result<()> {
    let request = request("", flag);
    // SAFETY: TUNSETQUEUE reads one `ifreq`, which `request` is, and keeps no pointer to it.
    check(unsafe { ioctl_with_ref(file, TUNSETQUEUE, &request) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn request(name: &str, flags: libc::c_int) -> libc::ifreq {
    let mut ifr_name = [0; IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags as libc::c_short } }
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
