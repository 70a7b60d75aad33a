//! The contract between the VMM and the payload guest: addresses, ports and the boot information block.
//!
//! The payload includes this very file, so the two sides cannot drift apart. Everything here is plain `core`.
//! All numbers are little endian in guest memory; all addresses are guest physical addresses (GPAs), which
//! the identity page tables make virtual addresses too.
//!
//! # Start of a vCPU
//!
//! Every vCPU enters at `e_entry` of the payload ELF in 64-bit mode at CPL3 with IOPL 3, IF = 0, `CR4.OSFXSR`
//! and `CR4.OSXMMEXCPT` on and no IDT, with these registers:
//!
//! | register | value |
//! |---|---|
//! | rdi | [`BOOT_INFO_ADDR`] |
//! | rsi | index of the vCPU, 0 first |
//! | rsp | [`initial_rsp`] of the vCPU |
//!
//! vCPU 0 runs the server; the others idle until [`PORT_WAKE`] and carry the `WORK` load.

/// First byte of the global descriptor table (two code/data pairs, written by the VMM).
pub const GDT_ADDR: u64 = 0x8000;

/// Where the VMM writes [`BootInfo`].
pub const BOOT_INFO_ADDR: u64 = 0x7000;

/// First byte of the identity page tables: 2 MiB pages, user, writable, accessed and dirty bits preset.
pub const PAGE_TABLES_ADDR: u64 = 0x1_0000;

/// First byte after the area reserved for page tables.
pub const PAGE_TABLES_END: u64 = 0x10_0000;

/// First byte of the stack of vCPU 0; the stacks of the others follow, each [`STACK_SIZE`] long.
pub const STACKS_ADDR: u64 = 0x10_0000;

/// Bytes of stack per vCPU.
pub const STACK_SIZE: u64 = 0x1_0000;

/// Most vCPUs the payload supports (its stacks fill the space up to the image).
pub const MAX_VCPUS: u32 = 8;

/// Where the payload image is linked; nothing of it lies below.
pub const IMAGE_ADDR: u64 = 0x20_0000;

/// RAM below this address is `[0, min(memory, LOW_RAM_END))`; the rest of the memory starts at
/// [`HIGH_RAM_ADDR`].
pub const LOW_RAM_END: u64 = 0xC000_0000;

/// First byte of the RAM above the hole.
pub const HIGH_RAM_ADDR: u64 = 0x1_0000_0000;

/// The smallest memory the payload starts with, in bytes.
pub const MIN_MEMORY: u64 = 32 << 20;

/// Register window of the virtio-mmio (version 2) net device.
pub const NET_MMIO_ADDR: u64 = 0xD000_0000;

/// Bytes of that window.
pub const NET_MMIO_SIZE: u64 = 0x1000;

/// GSI of the net device. The payload takes no interrupts; the line exists for guests that do.
pub const NET_IRQ: u32 = 5;

/// 32-bit OUT, "nothing to do": the value is a timeout in microseconds, [`IDLE_FOREVER`] for none.
///
/// The OUT returns when the vCPU was woken (device event or [`PORT_WAKE`]), when the time is over, or for no
/// reason. A wake that came since the previous IDLE of the same vCPU makes the next one return at once.
/// Device wakes go to vCPU 0.
pub const PORT_IDLE: u16 = 0x500;

/// Timeout value of [`PORT_IDLE`] that means "until woken".
pub const IDLE_FOREVER: u32 = u32::MAX;

/// 32-bit OUT, wake other vCPUs: bit n set wakes vCPU n.
pub const PORT_WAKE: u16 = 0x504;

/// 32-bit OUT, the end of this run: one of [`POWER_OFF`], [`POWER_RESET`], [`POWER_PANIC`].
pub const PORT_POWER: u16 = 0x508;

/// [`PORT_POWER`]: the guest has shut down in order.
pub const POWER_OFF: u32 = 1;

/// [`PORT_POWER`]: the guest asks for a reset.
pub const POWER_RESET: u32 = 2;

/// [`PORT_POWER`]: the guest panicked; it has written the message to [`PORT_DEBUG`] before.
pub const POWER_PANIC: u32 = 3;

/// 8-bit OUT, debug console; a line ends with `\n`.
pub const PORT_DEBUG: u16 = 0xE9;

/// TCP port of the payload's Redis protocol server.
pub const SERVER_PORT: u16 = 6379;

/// [`BootInfo::magic`].
pub const BOOT_MAGIC: u64 = 0x4F55_544C_4956_4531;

/// [`BootInfo::version`] of this file.
pub const BOOT_VERSION: u32 = 1;

/// Length of [`BootInfo`] in guest memory.
pub const BOOT_INFO_LEN: usize = 104;

/// The stack pointer vCPU `index` starts with: the top of its stack, aligned as right after a `call`.
#[must_use]
pub const fn initial_rsp(index: u32) -> u64 {
    STACKS_ADDR + (index as u64 + 1) * STACK_SIZE - 8
}

/// The VMM's information for the payload, at [`BOOT_INFO_ADDR`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct BootInfo {
    /// [`BOOT_MAGIC`].
    pub magic: u64,
    /// [`BOOT_VERSION`].
    pub version: u32,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// All RAM in bytes: `low_bytes + high_bytes`.
    pub memory_bytes: u64,
    /// RAM at `[0, low_bytes)`, at most [`LOW_RAM_END`].
    pub low_bytes: u64,
    /// RAM at `[HIGH_RAM_ADDR, HIGH_RAM_ADDR + high_bytes)`.
    pub high_bytes: u64,
    /// Frequency of the time stamp counter.
    pub tsc_khz: u64,
    /// Fresh random bytes: initial sequence numbers and hash keys come from here.
    pub random_seed: [u8; 32],
    /// Register window of the net device, usually [`NET_MMIO_ADDR`]; 0 means no net.
    pub net_mmio_base: u64,
    /// IPv4 address of the guest.
    pub ipv4: [u8; 4],
    /// IPv4 address of the default gateway; 0.0.0.0 means none.
    pub gateway: [u8; 4],
    /// Length of the network prefix of `ipv4`, 0 to 32.
    pub prefix: u8,
    /// Zero.
    pub reserved: [u8; 7],
}

const _: () = assert!(core::mem::size_of::<BootInfo>() == BOOT_INFO_LEN, "BootInfo has hidden padding");

impl BootInfo {
    /// A block with magic and version filled in, one vCPU and everything else zero.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            magic: BOOT_MAGIC,
            version: BOOT_VERSION,
            vcpus: 1,
            memory_bytes: 0,
            low_bytes: 0,
            high_bytes: 0,
            tsc_khz: 0,
            random_seed: [0; 32],
            net_mmio_base: 0,
            ipv4: [0; 4],
            gateway: [0; 4],
            prefix: 0,
            reserved: [0; 7],
        }
    }

    /// Sets the three memory fields for a guest with `bytes` of RAM, split at the hole.
    #[must_use]
    pub const fn with_memory(mut self, bytes: u64) -> Self {
        self.memory_bytes = bytes;
        self.low_bytes = if bytes < LOW_RAM_END { bytes } else { LOW_RAM_END };
        self.high_bytes = bytes - self.low_bytes;
        self
    }

    /// The block as it lies in guest memory.
    #[must_use]
    pub fn to_bytes(self) -> [u8; BOOT_INFO_LEN] {
        let mut out = [0; BOOT_INFO_LEN];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            out[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&self.magic.to_le_bytes());
        put(&self.version.to_le_bytes());
        put(&self.vcpus.to_le_bytes());
        put(&self.memory_bytes.to_le_bytes());
        put(&self.low_bytes.to_le_bytes());
        put(&self.high_bytes.to_le_bytes());
        put(&self.tsc_khz.to_le_bytes());
        put(&self.random_seed);
        put(&self.net_mmio_base.to_le_bytes());
        put(&self.ipv4);
        put(&self.gateway);
        put(&[self.prefix]);
        put(&self.reserved);
        out
    }

    /// Why the payload cannot start from this block, or `None` when it can.
    #[must_use]
    pub fn problem(&self) -> Option<&'static str> {
        if self.magic != BOOT_MAGIC {
            Some("boot info has the wrong magic")
        } else if self.version != BOOT_VERSION {
            Some("boot info has an unknown version")
        } else if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            Some("number of vCPUs out of range")
        } else if self.low_bytes > LOW_RAM_END
            || self.low_bytes.checked_add(self.high_bytes) != Some(self.memory_bytes)
        {
            Some("memory sizes contradict each other")
        } else if self.low_bytes < MIN_MEMORY {
            Some("not enough memory")
        } else if self.tsc_khz == 0 {
            Some("TSC frequency missing")
        } else if self.prefix > 32 {
            Some("IPv4 prefix longer than 32")
        } else {
            None
        }
    }
}

impl Default for BootInfo {
    fn default() -> Self {
        Self::new()
    }
}
