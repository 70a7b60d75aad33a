//! All limits of a checkpoint and of its way over the link, in one place. A length that comes from a peer is
//! checked against one of these before it sizes anything.

use super::page::PAGE_SIZE;

/// The last generation that a VM may be introduced with. No VM comes to it, and what is counted from it does not overflow.
pub const MAX_GENERATION: u64 = 1 << 62;
/// Most ranges of a layout.
pub const MAX_RANGES: usize = 8;
/// Most devices of a VM.
pub const MAX_DEVICES: usize = 32;
/// Most VMs in the lineage of a VM.
pub const MAX_ANCESTORS: usize = 16;
/// Most bytes of a disk's serial number.
pub const MAX_SERIAL: usize = 20;
/// Most bytes of a name or another short text.
pub const MAX_TEXT: usize = 64;
/// Most bytes of the text of a refusal.
pub const MAX_REFUSE_TEXT: usize = 256;

/// Most pages of one `Pages` or `BasePages` section.
pub const MAX_PAGES_PER_SECTION: usize = 256;

/// Most vCPUs of a VM.
pub const MAX_VCPUS: u8 = 32;
/// CPUID and TSC frequency of one vCPU: 256 CPUID entries of 40 bytes, which is all that KVM keeps.
pub const MAX_VCPU_CONSTANT: usize = 12 << 10;
/// The rest of one vCPU. Most of it is the XSAVE area, 11 KiB with AMX, and the MSRs, 16 bytes each.
pub const MAX_VCPU_STATE: usize = 64 << 10;
/// Clock, PIT and interrupt chips.
pub const MAX_VM_STATE: usize = 4 << 10;
/// One device.
pub const MAX_DEVICE_STATE: usize = 4 << 10;
/// The hashes of a self-check: one of memory, and one of each disk.
pub const MAX_CHECK_STATE: usize = 1 << 10;
/// Most bytes of all state sections of a checkpoint.
pub const MAX_STATE_BYTES: usize = MAX_VCPUS as usize * (MAX_VCPU_CONSTANT + MAX_VCPU_STATE)
    + MAX_VM_STATE
    + (MAX_DEVICES + 1) * MAX_DEVICE_STATE
    + MAX_CHECK_STATE;
/// Most state sections of a checkpoint: two for each vCPU, one for the VM, one for each device, one for the
/// serial port, one for a self-check.
pub const MAX_STATE_SECTIONS: usize = 2 * MAX_VCPUS as usize + 1 + MAX_DEVICES + 1 + 1;

/// Bytes of a chunk, the unit of base synchronisation of a disk. The last chunk of a disk may be shorter.
pub const DISK_CHUNK: usize = 64 * 1024;
/// Most data in one disk record that is read.
pub const MAX_DISK_DATA: usize = 1 << 20;
/// Most data in one disk record that is written. A longer write becomes several records, because a record is
/// never cut and a long piece on the link would delay a heartbeat.
pub const DISK_RECORD_DATA: usize = DISK_CHUNK;
/// Most sums of one `DiskSums` section.
pub const MAX_SUMS: usize = 256;
/// Most chunks that a `DiskSums` section without sums may declare to be zero.
pub const MAX_ZERO_CHUNKS: u32 = 16 * 1024;

/// Most spans of an `Audit` section. A checkpoint has at most one such section.
pub const MAX_AUDIT_SPANS: usize = 1024;
/// Most ranges of a `DiskAudit` section. A checkpoint has at most one such section.
pub const MAX_AUDIT_RANGES: usize = 64;
/// Most chunks of one such range.
pub const MAX_AUDIT_CHUNKS: u32 = 64;

/// Most bytes of any payload: a `Pages` section with the most raw pages.
pub const MAX_PAYLOAD: usize = 16 + MAX_PAGES_PER_SECTION * (8 + PAGE_SIZE);

/// Most bytes of a frame of the guest's network with its virtio-net header: the largest IP packet, Ethernet header
/// and one VLAN tag behind it.
pub const MAX_PACKET_BYTES: usize = 12 + 14 + 4 + 65_535;
/// Most bytes of a section of such frames.
pub const MAX_FRAMES_BYTES: usize = 128 << 10;

/// Most bytes of all disk records of one section.
pub const MAX_RECORD_BYTES: usize = MAX_PAYLOAD - 8;
