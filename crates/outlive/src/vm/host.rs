//! What a VM needs from the host that it runs on.

use std::sync::Arc;

use super::Remedy;
use super::limits::REMEMBERED_PAGES;
use crate::check;
use crate::cli::{ActiveOptions, NetSpec};
use crate::network::{Netlink, Place, Uplink, UplinkSpec};

/// Refuses a VM for which this host has too little memory.
///
/// # Errors
/// One line with the remedy.
pub(crate) fn check_memory(bytes: u64) -> Result<(), String> {
    outlive_machine::ranges(bytes).map_err(|e| e.with_remedy())?;
    match check::available_memory_bytes() {
        Some(available) if bytes > available => Err(format!(
            "a VM with {} MiB of memory does not fit: this host has {} MiB available; give the VM less with \
             --memory",
            bytes >> 20,
            available >> 20
        )),
        _ => Ok(()),
    }
}

/// Keeps the memory of this process out of swap, if that is wanted.
///
/// # Errors
/// One line with the remedy.
pub(crate) fn lock_memory(wanted: bool) -> Result<(), String> {
    if wanted { outlive_machine::lock_memory().map_err(|e| e.with_remedy()) } else { Ok(()) }
}

/// Refuses to start protection if its buffers would take more than half of the memory that this host has
/// left: the VM itself must not suffer.
///
/// # Errors
/// One line with the remedy.
pub(crate) fn check_staging(pages: usize, disk_bytes: usize, buffers: u64) -> Result<(), String> {
    // One more buffer for disk writes: the one that is being filled.
    let pages = pages as u64 * buffers + REMEMBERED_PAGES as u64;
    let bytes = pages * outlive_machine::PAGE_SIZE as u64 + disk_bytes as u64 * (buffers + 1);
    match check::available_memory_bytes() {
        Some(available) if bytes > available / 2 => Err(format!(
            "protection needs {} MiB for checkpoints in flight and for what was sent of them, and this host has \
             {} MiB available; lower --max-dirty",
            bytes >> 20,
            available >> 20
        )),
        _ => Ok(()),
    }
}

/// Watches this host's way to the guest's clients, if the guest has a card. Without the watch a VM runs as well,
/// so only a name that does not fit is an error.
///
/// # Errors
/// One line with the remedy.
pub(crate) fn watch_uplink(
    net: Option<&NetSpec>,
    options: &ActiveOptions,
) -> Result<Option<Arc<Uplink>>, String> {
    let (uplink, lost_after) = (options.uplink.clone(), options.uplink_timeout);
    if let UplinkSpec::Named(name) = &uplink {
        if net.is_none() {
            return Err(format!("--uplink {name} makes no sense without --net: leave it out"));
        }
        Netlink::open().and_then(|mut netlink| netlink.link(name)).map_err(|e| format!("--uplink: {e}"))?;
    }
    let Some(net) = net else { return Ok(None) };
    let (tap, bridge) = (net.tap.clone(), net.bridge.clone());
    let watch = Uplink::start(Place { uplink, tap, bridge, lost_after });
    Ok(watch.inspect_err(|error| tracing::warn!("nobody watches this host's uplink: {error}")).ok())
}

/// The message for a host without random numbers.
pub(crate) fn no_random(error: std::io::Error) -> String {
    format!("this host has no random numbers: {error}")
}
