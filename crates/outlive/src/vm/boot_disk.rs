//! The kernel of a guest's own disk: read at its start, and again at each restart by a thread for which nobody waits
//! longer than for a disk.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use outlive_bootdisk::{Found, Limits, ReadError};
use outlive_machine::{DiskBoot, FirmwareError, Image, LinuxBoot, Machine};

/// How long the end of the machine waits for the image: for a disk that does not answer, never for what is made of its
/// answers.
const LAST: Duration = Duration::from_secs(10);
/// Time between two looks at the thread.
const LOOK: Duration = Duration::from_millis(2);
/// The name of the thread, which says what it may do (`sandbox/roles.rs`).
const THREAD: &str = "boot-disk";

/// Why there is no kernel from a disk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootDiskError {
    /// The disk does not say.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// What it says is nothing that boots.
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
    /// It names no file system for `/`.
    #[error(
        "its kernel '{0}' comes without an entry of a boot loader, and its root file system is not known: name it with \
         --append root=..."
    )]
    NoRoot(String),
    /// The VM has no such disk any more: the guest has overwritten which one it boots.
    #[error("the VM has no disk {0}")]
    NoDisk(u16),
    /// The thread is busy with an earlier read, or there is none.
    #[error("{0}")]
    NoThread(String),
}

/// A kernel from a disk, and what people are told of it.
pub(crate) struct FromDisk {
    /// It.
    pub(crate) boot: LinuxBoot,
    /// Where it was.
    pub(crate) found: Found,
}

/// An image that can be taken away from who reads it.
#[derive(Default)]
struct Lent(Mutex<Option<Arc<Image>>>);

impl Lent {
    /// Held during a read of it.
    fn lock(&self) -> MutexGuard<'_, Option<Arc<Image>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes it back, unless it is being read.
    fn take_back(&self) -> bool {
        let lent = match self.0.try_lock() {
            Ok(lent) => Some(lent),
            Err(TryLockError::Poisoned(lent)) => Some(lent.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        lent.map(|mut lent| *lent = None).is_some()
    }
}

/// An image, as long as somebody wants what it has.
struct ImageDisk<W> {
    lent: Arc<Lent>,
    bytes: u64,
    wanted: W,
}

impl<W: Fn() -> bool> ImageDisk<W> {
    fn new(image: Arc<Image>, wanted: W) -> Self {
        Self { bytes: image.bytes(), lent: Arc::new(Lent(Mutex::new(Some(image)))), wanted }
    }
}

impl<W: Fn() -> bool> outlive_bootdisk::Disk for ImageDisk<W> {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match &*self.lent.lock() {
            Some(image) => image.read_at(buffer, offset),
            None => Err(io::Error::other("nobody waits for it any more")),
        }
    }

    fn is_wanted(&self) -> bool {
        (self.wanted)()
    }
}

/// Reads what an image boots, as long as it is `wanted`. The kernel and its initrd are not larger than the guest's
/// memory, in bytes.
///
/// # Errors
/// See [`BootDiskError`].
pub(crate) fn read_boot(
    image: Arc<Image>,
    from: &DiskBoot,
    memory: u64,
    until: Option<Instant>,
    wanted: impl Fn() -> bool + 'static,
) -> Result<FromDisk, BootDiskError> {
    read(ImageDisk::new(image, wanted), from, memory, until)
}

fn read(
    disk: ImageDisk<impl Fn() -> bool + 'static>,
    from: &DiskBoot,
    memory: u64,
    until: Option<Instant>,
) -> Result<FromDisk, BootDiskError> {
    let usual = Limits::default();
    let limits =
        Limits { kernel: usual.kernel.min(memory), initrd: usual.initrd.min(memory), until, ..usual };
    let boot = outlive_bootdisk::read(Box::new(disk), &limits)?;
    let line = outlive_bootdisk::extend(&boot.command_line, &from.append);
    if boot.command_line.is_empty() && !line.split_whitespace().any(|word| word.starts_with("root=")) {
        return Err(BootDiskError::NoRoot(boot.found.kernel));
    }
    let linux = LinuxBoot::new(boot.kernel, boot.initrd, line)?.of_disk(from.clone())?;
    Ok(FromDisk { boot: linux, found: boot.found })
}

/// Reads a disk beside the VM's life. A read at a time: one whose disk does not answer is not joined by others.
#[derive(Default)]
pub(crate) struct BootReader {
    /// Whether a thread reads. Not whether one lives: it tells what it has read before it ends, and whoever hears that
    /// may begin again at once.
    reads: Arc<AtomicBool>,
    wanted: Arc<AtomicBool>,
    lent: Arc<Lent>,
}

impl BootReader {
    /// Begins to read what the machine's guest boots, and has `tell` called with it.
    ///
    /// # Errors
    /// See [`BootDiskError`]; `tell` is not called then.
    pub(crate) fn begin(
        &mut self,
        machine: &Machine,
        from: DiskBoot,
        until: Option<Instant>,
        tell: impl FnOnce(Result<FromDisk, BootDiskError>) + Send + 'static,
    ) -> Result<(), BootDiskError> {
        if self.reads.load(Ordering::Acquire) {
            let why = "the disk has not answered an earlier read of its kernel";
            return Err(BootDiskError::NoThread(why.into()));
        }
        let disk = machine.disks().iter().find(|disk| disk.index() == from.disk);
        let image = disk.ok_or(BootDiskError::NoDisk(from.disk))?.image();
        let wanted = Arc::new(AtomicBool::new(true));
        let of_thread = wanted.clone();
        let disk = ImageDisk::new(image, move || of_thread.load(Ordering::Relaxed));
        let (lent, memory) = (disk.lent.clone(), machine.ram().bytes());
        let reads = Arc::new(AtomicBool::new(true));
        let reading = reads.clone();
        outlive_machine::spawn(THREAD, move || {
            let read = read(disk, &from, memory, until);
            reading.store(false, Ordering::Release);
            tell(read);
        })
        .map_err(|error| BootDiskError::NoThread(format!("cannot start a thread: {error}")))?;
        (self.reads, self.wanted, self.lent) = (reads, wanted, lent);
        Ok(())
    }

    /// Nobody waits for the result any more.
    pub(crate) fn give_up(&self) {
        self.wanted.store(false, Ordering::Relaxed);
    }
}

/// A process that goes on, as a standby with the same images, must find them unlocked.
impl Drop for BootReader {
    fn drop(&mut self) {
        self.give_up();
        let until = Instant::now() + LAST;
        // Not the thread: what it is at may take as long as it likes without the image.
        while !self.lent.take_back() {
            if Instant::now() >= until {
                return tracing::warn!("a disk does not end the last read of its kernel");
            }
            std::thread::sleep(LOOK);
        }
    }
}

#[cfg(test)]
mod tests;
