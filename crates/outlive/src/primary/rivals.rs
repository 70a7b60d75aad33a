//! Looks now and then whether somebody else has won a newer generation of the VM that runs here. By the protocol
//! nobody can while this host is heard; but an operator may have started a copy of an image elsewhere. When the VM was
//! left to its standby, it looks often, so that this host knows soon that it is the standby's.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::{Thread, park_timeout};
use std::time::{Duration, Instant};

use super::driver::SharedDriver;
use crate::arbiter::{self, Arbiter, process_token};
use crate::events::EventWriter;
use outlive_epoch::VmId;
use outlive_pair::rival;

/// Time between two looks.
const EVERY: Duration = Duration::from_secs(10);
/// Time between two questions whether the driver is still there.
const LOOK: Duration = Duration::from_secs(1);

/// The same in a hurry.
const EVERY_SOON: Duration = Duration::from_millis(10);

/// The thread that looks.
pub(super) struct Rivals {
    thread: Thread,
    hurries: Arc<AtomicBool>,
}

impl Rivals {
    /// Looks often from now on, or as seldom as before.
    pub(super) fn hurry(&self, hurries: bool) {
        // It says nothing of other memory.
        self.hurries.store(hurries, Ordering::Relaxed);
        self.thread.unpark();
    }
}

/// Starts the thread, which has a connection of its own to the arbiter at `place`: a look that takes long holds up
/// no claim. It ends with its driver. An arbiter that does not answer is the watch's to report.
///
/// # Errors
/// The operating system's.
pub(super) fn watch(
    place: String,
    vm: VmId,
    driver: &Arc<SharedDriver>,
    events: EventWriter,
) -> io::Result<Rivals> {
    let token = process_token()?;
    let driver = Arc::downgrade(driver);
    let hurries = Arc::new(AtomicBool::new(false));
    let seen = hurries.clone();
    let started = outlive_machine::spawn("rivals", move || {
        // Opened by this thread, which may wait for it, and once: opening writes to the arbiter.
        let mut arbiter = None;
        while rests(&driver, &seen) {
            arbiter = arbiter.or_else(|| arbiter::parse(&place).ok());
            let newest = arbiter.as_mut().and_then(|it| newest(it.as_mut(), &vm, token));
            let Some((generation, owner)) = newest else { continue };
            let Some(driver) = driver.upgrade() else { return };
            driver.superseded(generation, owner, &events);
        }
    })?;
    Ok(Rivals { thread: started.thread().clone(), hurries })
}

/// Rests, and returns whether the driver is still there.
fn rests(driver: &Weak<SharedDriver>, hurries: &AtomicBool) -> bool {
    let began = Instant::now();
    while driver.strong_count() > 0 {
        let every = if hurries.load(Ordering::Relaxed) { EVERY_SOON } else { EVERY };
        let left = every.saturating_sub(began.elapsed());
        if left.is_zero() {
            return true;
        }
        park_timeout(left.min(LOOK));
    }
    false
}

/// The newest generation and its winner, if that is another process.
fn newest(arbiter: &mut dyn Arbiter, vm: &VmId, token: &str) -> Option<(u64, String)> {
    let win = arbiter.history(vm).ok()?.pop()?;
    // A served arbiter tells other hosts no token, but what can be compared with one.
    if win.winner.as_ref().is_some_and(|winner| winner.is(token)) {
        return None;
    }
    rival(&[win.into()], &token.to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::arbiter::{Claim, FileArbiter};

    #[test]
    fn only_another_process_is_a_rival() {
        let directory = tempfile::tempdir().unwrap();
        let (mut arbiter, _) = FileArbiter::init(directory.path()).unwrap();
        let (vm, token) = (VmId([7; 16]), process_token().unwrap());
        assert_eq!(newest(&mut arbiter, &vm, token), None);
        assert_eq!(arbiter.claim(&vm, 1, "primary on host a"), Claim::Won);
        assert_eq!(newest(&mut arbiter, &vm, token), None);
        let rival = Some((1, "primary on host a".to_owned()));
        assert_eq!(newest(&mut arbiter, &vm, "another process"), rival);
        fs::remove_dir_all(directory.path()).unwrap();
        assert_eq!(newest(&mut arbiter, &vm, "another process"), None, "nobody knows");
    }
}
