//! What a long-running command needs from its process: signals, the death of its starter, names and random
//! bytes.

use std::io::{self, Read};

use nix::sys::signal::{SigSet, Signal};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Why a process stops whose starter is gone. It stops at once and does not ask the guest.
pub(crate) const ORPHANED: &str = "standard input was closed";

/// Calls `stop` once for each SIGINT or SIGTERM and, if `with_stdin`, when standard input is closed. It
/// starts threads for this, which live as long as the process.
///
/// # Errors
/// The operating system's, when handlers or threads are refused.
pub(crate) fn on_stop(
    with_stdin: bool,
    stop: impl Fn(&'static str) + Send + Clone + 'static,
) -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let on_signal = stop.clone();
    outlive_machine::spawn("signals", move || {
        // No other thread does: the coordinator blocks all signals for good.
        take([Signal::SIGINT, Signal::SIGTERM]);
        for signal in signals.forever() {
            on_signal(if signal == SIGINT { "interrupted" } else { "told to stop" });
        }
    })?;
    if with_stdin {
        outlive_machine::spawn("stdin", move || {
            let mut sink = [0u8; 64];
            while io::stdin().read(&mut sink).is_ok_and(|n| n > 0) {}
            stop(ORPHANED);
        })?;
    }
    Ok(())
}

/// The calling thread takes these signals from now on.
fn take(signals: impl IntoIterator<Item = Signal>) {
    let signals: SigSet = signals.into_iter().collect();
    if let Err(error) = signals.thread_unblock() {
        tracing::error!(%error, "a thread cannot take signals");
    }
}

/// Fresh random bytes.
///
/// # Errors
/// The operating system's, when it has no random numbers.
pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0u8; N];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}

/// The name of this host, for people; at most 64 bytes.
pub(crate) fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String = name.trim().chars().filter(char::is_ascii_graphic).take(64).collect();
    if name.is_empty() { "unknown".into() } else { name }
}

/// CPU vendor and KVM module, for example `AuthenticAMD kvm_amd`: the state of one vendor cannot be loaded on
/// another.
pub(crate) fn vendor() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let vendor = cpu
        .lines()
        .find_map(|line| line.strip_prefix("vendor_id")?.split_once(':'))
        .map_or("unknown", |(_, value)| value.trim());
    let module = ["kvm_intel", "kvm_amd", "kvm_pvm"]
        .into_iter()
        .find(|module| std::path::Path::new("/sys/module").join(module).exists())
        .unwrap_or("kvm");
    format!("{vendor} {module}").chars().take(64).collect()
}
