//! What a long-running command needs from its process: signals, the death of its starter, names and random
//! bytes.

use std::io::{self, Read};

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

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
    let on_signal = stop.clone();
    Signals::take(&[Signal::SIGINT, Signal::SIGTERM])?.each("signals", move |signal| {
        on_signal(if signal == Signal::SIGINT { "interrupted" } else { "told to stop" });
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

/// Keeps a closed terminal from ending this process: nobody has asked for a takeover, and the VM runs on. It
/// starts a thread that lives as long as the process.
///
/// # Errors
/// The operating system's.
pub(crate) fn outlive_the_terminal() -> io::Result<()> {
    Signals::take(&[Signal::SIGHUP])?.each("hangup", |_| {
        tracing::info!("the terminal was closed (SIGHUP): nothing ends; SIGTERM ends this process in order");
    })
}

/// Signals that are read and not delivered.
///
/// They are blocked in the thread that takes them and in those that it starts from then on; threads of
/// [`outlive_machine::spawn`] block all signals anyway. So it is the main thread that takes them, before any
/// thread that was started otherwise. Programs that are started do not inherit it (the standard library resets
/// the mask).
#[derive(Debug)]
pub(crate) struct Signals(SignalFd);

impl Signals {
    /// Takes these signals.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn take(signals: &[Signal]) -> io::Result<Self> {
        let set: SigSet = signals.iter().copied().collect();
        set.thread_block()?;
        Ok(Self(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC)?))
    }

    /// Calls `tell` with each signal, on a thread of this name that lives as long as the process.
    ///
    /// # Errors
    /// The operating system's, when it refuses the thread.
    pub(crate) fn each(self, name: &str, tell: impl Fn(Signal) + Send + 'static) -> io::Result<()> {
        outlive_machine::spawn(name, move || {
            loop {
                match self.0.read_signal() {
                    Ok(Some(info)) => {
                        let signal = i32::try_from(info.ssi_signo).ok().and_then(|it| it.try_into().ok());
                        signal.into_iter().for_each(&tell);
                    }
                    Ok(None) | Err(Errno::EINTR) => {}
                    Err(error) => return tracing::error!(%error, "signals can no longer be read"),
                }
            }
        })?;
        Ok(())
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
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

/// What tells this host from others, over its restarts: of its name and its machine id. It is read once, so ask before a
/// sandbox hides them.
pub(crate) fn machine() -> &'static str {
    static MACHINE: OnceLock<String> = OnceLock::new();
    MACHINE.get_or_init(|| {
        let id = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
        let hash = blake3::hash(format!("outlive machine\n{}\n{}", host_name(), id.trim()).as_bytes());
        hash.to_hex()[..32].to_owned()
    })
}

/// Revision of the microcode of this host's first processor; 0 if the kernel does not say it.
pub(crate) fn microcode() -> u64 {
    let digits = |text: String| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    of_processor("microcode").and_then(digits).unwrap_or(0)
}

/// Whether this host is a virtual machine itself, as its processor says.
pub(crate) fn is_virtual() -> bool {
    of_processor("flags").is_some_and(|flags| has_flag(&flags, "hypervisor"))
}

fn has_flag(flags: &str, wanted: &str) -> bool {
    flags.split_whitespace().any(|flag| flag == wanted)
}

/// A line about the first processor in /proc/cpuinfo.
fn of_processor(name: &str) -> Option<String> {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    cpu.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}

/// CPU vendor and KVM module, for example `AuthenticAMD kvm_amd`: the state of one vendor cannot be loaded on
/// another.
pub(crate) fn vendor() -> String {
    let vendor = of_processor("vendor_id").unwrap_or_else(|| "unknown".to_owned());
    let module = ["kvm_intel", "kvm_amd", "kvm_pvm"]
        .into_iter()
        .find(|module| std::path::Path::new("/sys/module").join(module).exists())
        .unwrap_or("kvm");
    format!("{vendor} {module}").chars().take(64).collect()
}
