//! Whether this host still has the memory that the VM may come to need here.
//!
//! A copy takes memory page by page, as the guest comes to use its own. So what was free when the primary was accepted
//! may have gone to somebody else since, another standby perhaps, and the OOM killer would say so in the middle of a
//! takeover. The host is looked at while all is well.

use std::fs;
use std::time::{Duration, Instant};

use crate::check;
use crate::events::{Event, EventWriter};
use crate::status::Standing;

/// Time between two looks.
const LOOK: Duration = Duration::from_secs(10);
/// So much more than is missing must be there before it counts as enough again.
const SLACK: u64 = 64 << 20;

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Room {
    /// What the copy may still need, in bytes.
    missing: u64,
    /// What this host has left.
    available: u64,
}

impl Room {
    /// Now, for a VM with so much memory. `None` if the system does not say.
    fn now(promised: u64) -> Option<Self> {
        let statm = fs::read_to_string("/proc/self/statm").ok()?;
        Some(Self {
            missing: promised.saturating_sub(resident(&statm)?),
            available: check::available_memory_bytes()?,
        })
    }

    /// Whether it is too little; once it was, a little more is not enough.
    fn is_short(self, was_short: bool) -> bool {
        self.available < self.missing + if was_short { SLACK } else { 0 }
    }
}

/// Bytes of this process that are in RAM and in no file. Nearly all of a standby's are the copy's.
fn resident(statm: &str) -> Option<u64> {
    let mut pages = statm.split_whitespace().map(str::parse::<u64>);
    let (all, files) = (pages.nth(1)?.ok()?, pages.next()?.ok()?);
    Some(all.saturating_sub(files) * outlive_machine::PAGE_SIZE as u64)
}

/// The watch; see the module.
#[derive(Default)]
pub(super) struct MemoryWatch {
    looked: Option<Instant>,
    short: bool,
}

impl MemoryWatch {
    /// Looks, if it is time to. `promised` is the memory of the VM that has a copy here, if one has.
    pub(super) fn look(&mut self, promised: Option<u64>, events: &EventWriter, standing: &Standing) {
        if promised.is_some() && self.looked.is_some_and(|at| at.elapsed() < LOOK) {
            return;
        }
        self.looked = promised.map(|_| Instant::now());
        let found = promised.and_then(Room::now);
        let short = found.is_some_and(|room| room.is_short(self.short));
        if short == std::mem::replace(&mut self.short, short) {
            return;
        }
        standing.memory_is_short(short);
        match found.filter(|_| short) {
            Some(Room { missing, available }) => {
                tracing::warn!(
                    "THIS HOST HAS TOO LITTLE MEMORY LEFT for the VM that it protects: the guest may come to use {} MiB \
                     more here, and {} MiB are available; end other programs, or protect fewer VMs here",
                    missing >> 20,
                    available >> 20
                );
                events.emit(Event::StandbyMemoryShort { missing, available });
            }
            None => {
                tracing::info!(
                    "this host has enough memory for the VM that it protects, or protects none any more"
                );
                events.emit(Event::StandbyMemoryEnough);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Role;

    #[test]
    fn what_is_in_files_is_not_the_copys() {
        assert_eq!(resident("9000 300 100 1 0 700 0\n"), Some(200 * 4096));
        assert_eq!(resident("9000 300"), None);
        assert!(resident(&fs::read_to_string("/proc/self/statm").unwrap()).unwrap() > 0);
    }

    #[test]
    fn a_little_more_is_not_enough_again() {
        let room = |missing, available| Room { missing, available };
        assert!(!room(100, 100).is_short(false) && room(101, 100).is_short(false));
        assert!(room(100, 100 + SLACK - 1).is_short(true) && !room(100, 100 + SLACK).is_short(true));
    }

    #[test]
    fn a_loss_is_told_once_and_so_is_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events");
        let events = EventWriter::open(&path).unwrap();
        let standing = Standing::new(Role::Standby, None, "");
        let mut watch = MemoryWatch::default();
        let mut look = |promised| {
            watch.looked = None;
            watch.look(promised, &events, &standing);
        };
        look(None);
        look(Some(1 << 20));
        // No host has so much.
        look(Some(1 << 60));
        look(Some(1 << 60));
        look(None);
        look(None);
        drop(events);
        let wait = Instant::now() + Duration::from_secs(20);
        let told = || fs::read_to_string(&path).unwrap();
        while told().lines().count() < 2 && Instant::now() < wait {
            std::thread::sleep(Duration::from_millis(5));
        }
        let told = told();
        assert_eq!(told.lines().count(), 2, "{told}");
        assert!(told.contains("standby_memory_short") && told.contains("standby_memory_enough"), "{told}");
    }
}
