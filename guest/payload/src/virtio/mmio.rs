//! The register window (virtio 1.2, section 4.2.2).

use core::ptr;

/// Offsets of the registers used.
pub mod reg {
    /// "virt".
    pub const MAGIC: u64 = 0x000;
    /// 2 for the modern layout.
    pub const VERSION: u64 = 0x004;
    /// 1 is a network card, 2 a disk.
    pub const DEVICE_ID: u64 = 0x008;
    /// Feature bits the device offers, by [`DEVICE_FEATURES_SEL`].
    pub const DEVICE_FEATURES: u64 = 0x010;
    /// Which 32 feature bits.
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    /// Feature bits the driver accepts, by [`DRIVER_FEATURES_SEL`].
    pub const DRIVER_FEATURES: u64 = 0x020;
    /// Which 32 feature bits.
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    /// Which queue the queue registers mean.
    pub const QUEUE_SEL: u64 = 0x030;
    /// Largest size of the queue.
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    /// Size of the queue.
    pub const QUEUE_NUM: u64 = 0x038;
    /// 1: the queue is set up.
    pub const QUEUE_READY: u64 = 0x044;
    /// Write a queue index: the queue has new buffers.
    pub const QUEUE_NOTIFY: u64 = 0x050;
    /// Device status bits.
    pub const STATUS: u64 = 0x070;
    /// Descriptor table, low half; the high half follows.
    pub const QUEUE_DESC: u64 = 0x080;
    /// Available ring, low half; the high half follows.
    pub const QUEUE_DRIVER: u64 = 0x090;
    /// Used ring, low half; the high half follows.
    pub const QUEUE_DEVICE: u64 = 0x0a0;
    /// Device configuration: the MAC address, the disk's size.
    pub const CONFIG: u64 = 0x100;
}

/// Device status bits (section 2.1).
pub mod status {
    /// The driver noticed the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u32 = 2;
    /// The driver is set up.
    pub const DRIVER_OK: u32 = 4;
    /// Feature negotiation is complete.
    pub const FEATURES_OK: u32 = 8;
    /// The driver gave up.
    pub const FAILED: u32 = 128;
}

/// A register window. Each access is an exit to the VMM (about 15 µs here), so it is used only for set-up and
/// notifications.
pub struct Registers {
    base: u64,
}

impl Registers {
    /// The window at `base`.
    ///
    /// # Safety
    /// `base` is the address of a virtio-mmio register window that stays mapped and that nobody else drives.
    pub unsafe fn new(base: u64) -> Self {
        Self { base }
    }

    /// Reads a 32-bit register.
    pub fn read(&self, offset: u64) -> u32 {
        // SAFETY: inside the window of `new`; registers are 32 bits wide and aligned.
        unsafe { ptr::read_volatile((self.base + offset) as *const u32) }
    }

    /// Reads one byte of the device configuration.
    pub fn read_config(&self, index: u64) -> u8 {
        // SAFETY: inside the window of `new`.
        unsafe { ptr::read_volatile((self.base + reg::CONFIG + index) as *const u8) }
    }

    /// Writes a 32-bit register.
    pub fn write(&self, offset: u64, value: u32) {
        // SAFETY: inside the window of `new`; registers are 32 bits wide and aligned.
        unsafe { ptr::write_volatile((self.base + offset) as *mut u32, value) }
    }

    /// Writes a 64-bit address to a low/high register pair.
    pub fn write_address(&self, offset: u64, address: u64) {
        self.write(offset, address as u32);
        self.write(offset + 4, (address >> 32) as u32);
    }
}
