//! Looks at files that may never come back: a mount whose server is dead holds up whoever looks, for ever. Nobody waits
//! for such a look longer than a moment.

use std::collections::BTreeMap;
use std::sync::mpsc::channel;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// How long the first look may take. The more looks have not come back, the less the next one may: all of a host's
/// definitions may be on one dead mount, and together they cost less than two seconds and the [`LEAST`] of each.
const MOST: Duration = Duration::from_secs(1);
const LEAST: Duration = Duration::from_millis(10);

/// Looks that are under way, and whether somebody has given up waiting for one.
static UNDER_WAY: Mutex<BTreeMap<String, bool>> = Mutex::new(BTreeMap::new());
static ENDED: Condvar = Condvar::new();

/// Has ended, also if it has panicked.
struct Look(String);

impl Drop for Look {
    fn drop(&mut self) {
        under_way().remove(&self.0);
        ENDED.notify_all();
    }
}

/// What `look` finds. `None`: it has not come back in time, or an earlier one of the same name has not. So there is at most
/// one thread that hangs for each name.
pub(crate) fn look<T: Send + 'static>(name: &str, look: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let mut all = under_way();
    let unanswered = all.values().filter(|given_up| **given_up).count() as u32;
    let most = (MOST / (1 + unanswered).saturating_pow(2)).max(LEAST);
    if all.contains_key(name) {
        // Somebody else looks at the moment.
        let waits = |all: &mut BTreeMap<String, bool>| all.get(name) == Some(&false);
        all = ENDED.wait_timeout_while(all, most, waits).unwrap_or_else(PoisonError::into_inner).0;
        if all.contains_key(name) {
            return None;
        }
    }
    all.insert(name.to_owned(), false);
    drop(all);
    let this = Look(name.to_owned());
    let (tell, told) = channel();
    let begun = thread::Builder::new().name("look".into()).spawn(move || {
        let found = look();
        drop(this);
        // Nobody may wait any more.
        let _ = tell.send(found);
    });
    begun.ok()?;
    let found = told.recv_timeout(most).ok();
    if found.is_none()
        && let Some(given_up) = under_way().get_mut(name)
    {
        *given_up = true;
    }
    found
}

fn under_way() -> MutexGuard<'static, BTreeMap<String, bool>> {
    UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn what_hangs_costs_little_and_one_thread() {
        assert_eq!(look("bounded: good", || 7), Some(7));
        let began = Instant::now();
        let (release, hangs) = channel::<()>();
        let hang = |_: &str| None::<()>;
        assert_eq!(look("bounded: a", move || hangs.recv().unwrap_or(())), hang("a"));
        let waited = began.elapsed();
        assert!(waited < 10 * MOST, "{waited:?}");
        for _ in 0..50 {
            assert_eq!(look("bounded: a", || panic!("a second thread")), hang("a"));
        }
        assert!(began.elapsed() < waited + 10 * MOST);
        drop(release);
        while under_way().contains_key("bounded: a") {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(look("bounded: a", || 8), Some(8));
        assert_eq!(look("bounded: panics", || panic!("meant")), None::<()>);
        assert_eq!(look("bounded: panics", || 9), Some(9));
    }
}
