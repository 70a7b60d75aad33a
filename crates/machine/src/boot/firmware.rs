//! What a Linux guest boots from, and where the VM keeps it. Kernel, initrd and command line are in a
//! separate region of guest-physical memory, behind the guest's memory and in no memory map. So they are part
//! of the VM: they are replicated with its base, and a reboot after a takeover needs no files.
//!
//! A guest that boots the kernel of its own disk ([`DiskBoot`]) has its last kernel there, for a restart at which the
//! disk cannot be read, and at the region's end which disk it is. An older release does not know the latter and restarts
//! the last kernel.
//!
//! The guest's kernel could find the region and write to it (it is memory), so what is read back is checked
//! like any other guest data. Such a guest hurts only itself.

use vm_memory::{Bytes, GuestAddress};

use crate::map::Range;
use crate::memory::GuestMemory;

const MAGIC: u64 = u64::from_le_bytes(*b"OUTLBOOT");
const VERSION: u64 = 1;
/// Magic, version and three lengths; the command line follows directly.
const HEADER: usize = 40;
/// The region's size is a multiple of this, so that large pages can map it.
const ALIGN: u64 = 2 << 20;
/// Kernel and initrd begin at a page.
const PAGE: u64 = 4096;
/// Longest command line that is kept; kernels take less.
const COMMAND_LINE_MAX: usize = 0xffff;
/// Largest kernel and largest initrd: with 2 GiB the initrd would not fit below the hole.
const FILE_MAX: usize = 1 << 30;

const DISK_MAGIC: u64 = u64::from_le_bytes(*b"OUTLDISK");
const DISK_VERSION: u64 = 1;
/// Magic, version, the disk, the length of its words; they follow directly.
const DISK_HEADER: usize = 32;
/// The end of the region, for a [`DiskBoot`].
const DISK_ROOM: u64 = 8192;
/// Longest words for the command line: kernels take 2047 bytes.
const APPEND_MAX: usize = 2047;

/// That a guest boots the kernel which one of its disks has, at each restart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskBoot {
    /// The disk's position among the VM's disks.
    pub disk: u16,
    /// Words behind the command line that the disk has.
    pub append: String,
}

/// A kernel with its initrd and command line.
#[derive(Clone, PartialEq, Eq)]
pub struct LinuxBoot {
    kernel: Vec<u8>,
    initrd: Vec<u8>,
    command_line: String,
    disk: Option<DiskBoot>,
}

/// Why there is nothing to boot from.
#[derive(Debug, thiserror::Error)]
pub enum FirmwareError {
    /// The command line has bytes that no kernel takes.
    #[error("the kernel's command line must be printable ASCII text on one line")]
    CommandLine,
    /// The words behind a disk's command line are too long.
    #[error("the words for the command line have {0} bytes; the limit is 2047")]
    AppendLong(usize),
    /// The command line is too long.
    #[error("the kernel's command line has {0} bytes; the limit is 65535")]
    CommandLineLong(usize),
    /// A file is too large.
    #[error("the {what} has {len} bytes, which is more than a gigabyte")]
    File {
        /// Kernel or initrd.
        what: &'static str,
        /// Its size.
        len: usize,
    },
    /// The machine was made without the region, or the region is too small.
    #[error("the VM has {has} bytes for its boot image, but the image needs {needs}")]
    Room {
        /// Bytes of the region.
        has: u64,
        /// Bytes that it should have.
        needs: u64,
    },
    /// The region does not hold what was put into it.
    #[error("the VM's boot image is damaged: the guest has overwritten it")]
    Damaged,
}

impl LinuxBoot {
    /// Checks what can be checked without a machine. An empty `initrd` means no initrd.
    ///
    /// # Errors
    /// [`FirmwareError`] for sizes and texts that no kernel takes.
    pub fn new(kernel: Vec<u8>, initrd: Vec<u8>, command_line: String) -> Result<Self, FirmwareError> {
        is_text(&command_line)?;
        if command_line.len() > COMMAND_LINE_MAX {
            return Err(FirmwareError::CommandLineLong(command_line.len()));
        }
        for (what, file) in [("kernel", &kernel), ("initrd", &initrd)] {
            if file.len() > FILE_MAX {
                return Err(FirmwareError::File { what, len: file.len() });
            }
        }
        Ok(Self { kernel, initrd, command_line, disk: None })
    }

    /// The same, read from a disk that is read again at each restart.
    ///
    /// # Errors
    /// [`FirmwareError`] for words that no kernel takes.
    pub fn of_disk(self, disk: DiskBoot) -> Result<Self, FirmwareError> {
        is_text(&disk.append)?;
        if disk.append.len() > APPEND_MAX {
            return Err(FirmwareError::AppendLong(disk.append.len()));
        }
        Ok(Self { disk: Some(disk), ..self })
    }

    /// How large a region a machine needs for this, in bytes: `Options::firmware_bytes`. Kernels grow: with a disk
    /// there is room for one that is half as large again.
    pub fn firmware_bytes(&self) -> u64 {
        let end = self.places().end;
        let bytes = if self.disk.is_some() { end + end / 2 + DISK_ROOM } else { end };
        bytes.next_multiple_of(ALIGN)
    }

    /// The kernel file.
    pub(crate) fn kernel(&self) -> &[u8] {
        &self.kernel
    }

    /// The initrd file.
    pub(crate) fn initrd(&self) -> &[u8] {
        &self.initrd
    }

    /// The disk that it comes from, if it is read again at each restart.
    pub fn disk(&self) -> Option<&DiskBoot> {
        self.disk.as_ref()
    }

    /// The command line.
    pub fn command_line(&self) -> &str {
        &self.command_line
    }

    fn places(&self) -> Places {
        Places::new(self.command_line.len() as u64, self.kernel.len() as u64, self.initrd.len() as u64)
    }

    /// Writes it into the region.
    pub(crate) fn store(&self, memory: &GuestMemory, region: Range) -> Result<(), FirmwareError> {
        let places = self.places();
        let room = FirmwareError::Room { has: region.len, needs: self.firmware_bytes() };
        let disk_room = if self.disk.is_some() { DISK_ROOM } else { 0 };
        if places.end + disk_room > region.len {
            return Err(room);
        }
        let lengths = [self.command_line.len(), self.kernel.len(), self.initrd.len()].map(|len| len as u64);
        let header: Vec<u8> =
            [MAGIC, VERSION].into_iter().chain(lengths).flat_map(|word| word.to_le_bytes()).collect();
        let put = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(region.base + at));
        put(0, &header)
            .and_then(|()| put(HEADER as u64, self.command_line.as_bytes()))
            .and_then(|()| put(places.kernel, &self.kernel))
            .and_then(|()| put(places.initrd, &self.initrd))
            .and_then(|()| match &self.disk {
                Some(disk) => put(region.len - DISK_ROOM, &disk.bytes()),
                None => Ok(()),
            })
            .map_err(|_| room)
    }

    /// Reads it back from the region.
    pub(crate) fn read(memory: &GuestMemory, region: Range) -> Result<Self, FirmwareError> {
        let get = |at: u64, len: u64| {
            let mut bytes = vec![0; len as usize];
            let read = memory.read_slice(&mut bytes, GuestAddress(region.base + at));
            read.map(|()| bytes).map_err(|_| FirmwareError::Damaged)
        };
        if region.len < HEADER as u64 {
            return Err(FirmwareError::Damaged);
        }
        let header = get(0, HEADER as u64)?;
        let (words, _) = header.as_chunks::<8>();
        let word = |index: usize| u64::from_le_bytes(words[index]);
        let (command_line, kernel, initrd) = (word(2), word(3), word(4));
        let possible = command_line <= COMMAND_LINE_MAX as u64 && kernel.max(initrd) <= FILE_MAX as u64;
        if word(0) != MAGIC || word(1) != VERSION || !possible {
            return Err(FirmwareError::Damaged);
        }
        let places = Places::new(command_line, kernel, initrd);
        if places.end > region.len {
            return Err(FirmwareError::Damaged);
        }
        let text =
            String::from_utf8(get(HEADER as u64, command_line)?).map_err(|_| FirmwareError::Damaged)?;
        let (kernel, initrd) = (get(places.kernel, kernel)?, get(places.initrd, initrd)?);
        let boot = Self::new(kernel, initrd, text).map_err(|_| FirmwareError::Damaged)?;
        Ok(Self { disk: DiskBoot::read(memory, region), ..boot })
    }
}

/// Whether kernels take these characters.
fn is_text(text: &str) -> Result<(), FirmwareError> {
    if text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        Ok(())
    } else {
        Err(FirmwareError::CommandLine)
    }
}

impl DiskBoot {
    fn bytes(&self) -> Vec<u8> {
        let words = [DISK_MAGIC, DISK_VERSION, self.disk.into(), self.append.len() as u64];
        let words = words.into_iter().flat_map(u64::to_le_bytes);
        words.chain(self.append.bytes()).collect()
    }

    /// Reads it from the region's end. `None` if the guest boots from no disk, or has overwritten which one.
    pub(crate) fn read(memory: &GuestMemory, region: Range) -> Option<Self> {
        let at = GuestAddress(region.base + region.len.checked_sub(DISK_ROOM)?);
        let mut bytes = [0; DISK_HEADER + APPEND_MAX];
        memory.read_slice(&mut bytes, at).ok()?;
        let (header, append) = bytes.split_at(DISK_HEADER);
        let (words, _) = header.as_chunks::<8>();
        let word = |index: usize| u64::from_le_bytes(words[index]);
        if (word(0), word(1)) != (DISK_MAGIC, DISK_VERSION) {
            return None;
        }
        let append = append.get(..usize::try_from(word(3)).ok()?)?.to_vec();
        let append = String::from_utf8(append).ok().filter(|text| is_text(text).is_ok())?;
        Some(Self { disk: u16::try_from(word(2)).ok()?, append })
    }
}

/// Where the parts are, from the start of the region.
struct Places {
    kernel: u64,
    initrd: u64,
    end: u64,
}

impl Places {
    fn new(command_line: u64, kernel: u64, initrd: u64) -> Self {
        let kernel_at = (HEADER as u64 + command_line).next_multiple_of(PAGE);
        let initrd_at = (kernel_at + kernel).next_multiple_of(PAGE);
        Self { kernel: kernel_at, initrd: initrd_at, end: initrd_at + initrd }
    }
}

impl std::fmt::Debug for LinuxBoot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LinuxBoot")
            .field("kernel", &self.kernel.len())
            .field("initrd", &self.initrd.len())
            .field("command_line", &self.command_line)
            .field("disk", &self.disk)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::Ram;

    const MEMORY: u64 = 32 << 20;

    fn boot() -> LinuxBoot {
        LinuxBoot::new(vec![7; 10_000], vec![8; 5], "console=ttyS0".into()).unwrap()
    }

    fn stored() -> Ram {
        let ram = Ram::with_firmware(MEMORY, boot().firmware_bytes(), 64).unwrap();
        boot().store(ram.memory(), ram.firmware().unwrap()).unwrap();
        ram
    }

    #[test]
    fn what_was_stored_comes_back() {
        let ram = stored();
        assert_eq!(LinuxBoot::read(ram.memory(), ram.firmware().unwrap()).unwrap(), boot());
        let empty = LinuxBoot::new(vec![1], Vec::new(), String::new()).unwrap();
        empty.store(ram.memory(), ram.firmware().unwrap()).unwrap();
        assert_eq!(LinuxBoot::read(ram.memory(), ram.firmware().unwrap()).unwrap(), empty);
    }

    fn of_disk(boot: LinuxBoot, append: &str) -> LinuxBoot {
        boot.of_disk(DiskBoot { disk: 3, append: append.into() }).unwrap()
    }

    #[test]
    fn the_disk_that_is_booted_from_comes_back_and_has_room_for_a_larger_kernel() {
        for append in ["", "panic=10", &"a".repeat(APPEND_MAX)] {
            let first = of_disk(boot(), append);
            let ram = Ram::with_firmware(MEMORY, first.firmware_bytes(), 64).unwrap();
            let region = ram.firmware().unwrap();
            first.store(ram.memory(), region).unwrap();
            assert_eq!(LinuxBoot::read(ram.memory(), region).unwrap(), first);
            assert_eq!(DiskBoot::read(ram.memory(), region), first.disk);
            let larger = of_disk(LinuxBoot::new(vec![1; 14_000], vec![2; 6], "b".into()).unwrap(), append);
            larger.store(ram.memory(), region).unwrap();
            assert_eq!(LinuxBoot::read(ram.memory(), region).unwrap(), larger);
            // A release that does not know of disks finds its kernel where it always was.
            let large = of_disk(LinuxBoot::new(vec![0; 3 << 20], Vec::new(), String::new()).unwrap(), append);
            assert!(matches!(large.store(ram.memory(), region), Err(FirmwareError::Room { .. })));
            assert_eq!(LinuxBoot::read(ram.memory(), region).unwrap(), larger, "nothing is half written");
        }
        assert!(DiskBoot::read(stored().memory(), stored().firmware().unwrap()).is_none());
        let long = boot().of_disk(DiskBoot { disk: 0, append: "a".repeat(APPEND_MAX + 1) });
        assert!(matches!(long, Err(FirmwareError::AppendLong(2048))));
    }

    #[test]
    fn texts_that_no_kernel_takes_are_refused() {
        for text in ["a\nb", "a\0b", "ä"] {
            let refused = LinuxBoot::new(Vec::new(), Vec::new(), text.into());
            assert!(matches!(refused, Err(FirmwareError::CommandLine)), "{text:?}");
        }
        let long = LinuxBoot::new(Vec::new(), Vec::new(), "a".repeat(65_536));
        assert!(matches!(long, Err(FirmwareError::CommandLineLong(65_536))));
    }

    #[test]
    fn a_region_that_is_too_small_is_refused() {
        let ram = Ram::with_firmware(MEMORY, 2 << 20, 64).unwrap();
        let large = LinuxBoot::new(vec![0; 2 << 20], Vec::new(), String::new()).unwrap();
        let refused = large.store(ram.memory(), ram.firmware().unwrap());
        assert!(matches!(refused, Err(FirmwareError::Room { .. })));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        /// The guest can write whatever it likes.
        #[test]
        fn a_damaged_region_is_refused_or_read_within_its_bounds(
            changes in prop::collection::vec((0u64..64, any::<u8>()), 1..12),
        ) {
            let ram = stored();
            let region = ram.firmware().unwrap();
            for (at, byte) in changes {
                ram.memory().write_obj(byte, GuestAddress(region.base + at)).unwrap();
            }
            if let Ok(boot) = LinuxBoot::read(ram.memory(), region) {
                prop_assert!(boot.firmware_bytes() <= region.len);
            }
        }

        #[test]
        fn a_damaged_disk_is_none_or_one_with_words(
            changes in prop::collection::vec((0u64..64, any::<u8>()), 1..12),
        ) {
            let boot = of_disk(boot(), "panic=10");
            let ram = Ram::with_firmware(MEMORY, boot.firmware_bytes(), 64).unwrap();
            let region = ram.firmware().unwrap();
            boot.store(ram.memory(), region).unwrap();
            for (at, byte) in changes {
                ram.memory().write_obj(byte, GuestAddress(region.base + region.len - DISK_ROOM + at)).unwrap();
            }
            if let Some(disk) = DiskBoot::read(ram.memory(), region) {
                prop_assert!(disk.append.len() <= APPEND_MAX && is_text(&disk.append).is_ok());
            }
        }
    }
}
