//! What a VM needs from the host that it runs on.

use std::io;
use std::sync::Arc;

use outlive_machine::{LockError, MemoryError};

use super::Remedied;
use super::limits::REMEMBERED_PAGES;
use crate::check;
use crate::cli::{ActiveOptions, NetSpec};
use crate::network::{Netlink, NetlinkError, Place, Uplink, UplinkSpec};
use crate::process;

/// Why a VM cannot have its memory here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VmMemoryError {
    /// No VM has so much.
    #[error(transparent)]
    Size(#[from] Remedied<MemoryError>),
    /// This host has less.
    #[error(
        "a VM with {} MiB of memory does not fit: this host has {} MiB available; give the VM less with --memory",
        .bytes >> 20, .available >> 20
    )]
    TooLittle { bytes: u64, available: u64 },
}

/// Refuses a VM for which this host has too little memory.
///
/// # Errors
/// See [`VmMemoryError`].
pub(crate) fn check_memory(bytes: u64) -> Result<(), VmMemoryError> {
    outlive_machine::ranges(bytes).map_err(Remedied)?;
    match check::available_memory_bytes() {
        Some(available) if bytes > available => Err(VmMemoryError::TooLittle { bytes, available }),
        _ => Ok(()),
    }
}

/// Keeps the memory of this process out of swap, if that is wanted.
///
/// # Errors
/// The system does not allow it.
pub(crate) fn lock_memory(wanted: bool) -> Result<(), Remedied<LockError>> {
    if wanted { outlive_machine::lock_memory().map_err(Remedied) } else { Ok(()) }
}

/// The buffers of checkpoints do not fit into this host's memory.
#[derive(Debug, thiserror::Error)]
#[error(
    "protection needs {} MiB for checkpoints in flight and for what was sent of them, and this host has {} MiB \
     available; lower --max-dirty",
    .bytes >> 20, .available >> 20
)]
pub(crate) struct StagingTooLarge {
    bytes: u64,
    available: u64,
}

/// Refuses to start protection if its buffers would take more than half of the memory that this host has
/// left: the VM itself must not suffer.
///
/// # Errors
/// See [`StagingTooLarge`].
pub(crate) fn check_staging(pages: usize, disk_bytes: usize, buffers: u64) -> Result<(), StagingTooLarge> {
    // One more buffer for disk writes: the one that is being filled.
    let pages = pages as u64 * buffers + REMEMBERED_PAGES as u64;
    let bytes = pages * outlive_machine::PAGE_SIZE as u64 + disk_bytes as u64 * (buffers + 1);
    match check::available_memory_bytes() {
        Some(available) if bytes > available / 2 => Err(StagingTooLarge { bytes, available }),
        _ => Ok(()),
    }
}

/// Warns of a VM with a shared disk if nothing but time keeps a lost host from writing to it, and time may stand still: a
/// hypervisor may stop a host that is a VM itself, and continue it with the clock that it had.
pub(crate) fn warn_unfenced(shared: bool, options: &ActiveOptions) {
    if shared && options.fence.is_none() && process::is_virtual() {
        tracing::warn!(
            "this host is a virtual machine, and the VM has a shared disk: if its hypervisor stops it and continues it later, \
             it may write to the disk after another host has taken the VM over; give both hosts --fence \
             (docs/devices.md, \"Fencing\")"
        );
    }
}

/// Why an uplink cannot be watched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UplinkError {
    /// A VM without a card has no clients.
    #[error("--uplink {0} makes no sense without --net: leave it out")]
    NoCard(String),
    /// The interface that was named is not there.
    #[error("--uplink: {0}")]
    Interface(#[from] NetlinkError),
}

/// Watches this host's way to the guest's clients, if the guest has a card. Without the watch a VM runs as well,
/// so only a name that does not fit is an error.
///
/// # Errors
/// See [`UplinkError`].
pub(crate) fn watch_uplink(
    net: Option<&NetSpec>,
    options: &ActiveOptions,
) -> Result<Option<Arc<Uplink>>, UplinkError> {
    let (uplink, lost_after) = (options.uplink.clone(), options.uplink_lost_after());
    if let UplinkSpec::Named(name) = &uplink {
        if net.is_none() {
            return Err(UplinkError::NoCard(name.clone()));
        }
        Netlink::open().and_then(|mut netlink| netlink.link(name))?;
    }
    let Some(net) = net else { return Ok(None) };
    let (tap, bridge) = (net.tap.clone(), net.bridge.clone());
    let watch = Uplink::start(Place { uplink, tap, bridge, lost_after });
    Ok(watch.inspect_err(|error| tracing::warn!("nobody watches this host's uplink: {error}")).ok())
}

/// The operating system gives no random numbers.
#[derive(Debug, thiserror::Error)]
#[error("this host has no random numbers: {0}")]
pub(crate) struct NoRandom(#[source] pub(crate) io::Error);
