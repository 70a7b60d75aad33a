//! The thread of a run's base: copies it, and forgets what is old.

use std::cell::Cell;
use std::fs::File;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use outlive_epoch::Hello;

use super::session::RunState;
use super::{Shared, Told};
use crate::base::Base;
use crate::copying::{CopyError, copy};
use crate::forget::{BaseFiles, Current};
use crate::places::{RunPlaces, sync_directory};
use crate::run::time;
use crate::segment::disks;
use crate::source::Source;

/// Time between two looks whether the run is over.
const LOOK: Duration = Duration::from_millis(50);

/// Makes the base of a run, and looks after it.
pub(super) struct BaseWork {
    pub(super) shared: Arc<Shared>,
    pub(super) state: Arc<RunState>,
    pub(super) places: RunPlaces,
    pub(super) hello: Hello,
}

impl BaseWork {
    pub(super) fn run(self, source: &Weak<dyn Source>) {
        match self.make(source) {
            Ok(files) => self.keep(&files),
            Err(CopyError::Over) => {}
            Err(error) => self.fail(&format!("the VM cannot be copied: {error}")),
        }
    }

    fn fail(&self, why: &str) {
        if self.state.end(why) {
            self.shared.gap(&self.state, why);
        }
    }

    fn make(&self, source: &Weak<dyn Source>) -> Result<BaseFiles, CopyError> {
        let looked = Cell::new(Instant::now());
        let goes_on = || {
            self.forget_when_due(&looked, None);
            !self.state.is_over()
        };
        let files = copy(&self.places, &self.hello.layout, source, &goes_on)?;
        // Behind the last look at the source, and before M is read: nothing but commits up to M has written to it.
        if self.state.is_over() {
            return Err(CopyError::Over);
        }
        let from = self.state.handed.load(Ordering::SeqCst);
        let time_us = self.state.handed_us.load(Ordering::Relaxed);
        files.iter().try_for_each(File::sync_all).map_err(CopyError::Write)?;
        sync_directory(&self.places.directory).map_err(CopyError::Write)?;
        if self.state.is_over() {
            // Nobody waits for it any more.
            return Err(CopyError::Over);
        }
        Base { from, time_us }.write(&self.places.base()).map_err(CopyError::Write)?;
        self.state.whole.store(true, Ordering::Relaxed);
        self.shared.measure();
        self.shared.of_run(&self.state, |report| report.from = Some((from, time(time_us))));
        (self.shared.config.tell)(Told::Whole { run: self.places.number, from });
        BaseFiles::open(&self.places, disks(&self.hello).len()).map_err(CopyError::Write)
    }

    /// Forgets what need not be kept, until the run is over.
    fn keep(&self, files: &BaseFiles) {
        let looked = Cell::new(Instant::now());
        while !self.state.is_over() {
            std::thread::sleep(LOOK.min(self.shared.limits.forget));
            self.forget_when_due(&looked, Some(files));
        }
    }

    /// Forgets what need not be kept, if it is time to look.
    fn forget_when_due(&self, looked: &Cell<Instant>, files: Option<&BaseFiles>) {
        if looked.get().elapsed() < self.shared.limits.forget {
            return;
        }
        let newest = time(self.state.handed_us.load(Ordering::Relaxed));
        let base = files.map(|files| (&self.hello, files));
        let Ok(mut forgetting) = self.shared.forgetting.try_lock() else { return };
        let forgotten = forgetting
            .forget(&self.shared.config.directory, Some(&Current { places: &self.places, newest, base }));
        drop(forgetting);
        match forgotten {
            Ok(note) => self.shared.note(note),
            Err(error) => return self.fail(&error.to_string()),
        }
        looked.set(Instant::now());
        let first = Base::read(&self.places.base()).ok().flatten();
        self.shared.measure();
        self.shared.of_run(&self.state, |report| {
            report.from = first.map(|base| (base.from, time(base.time_us)));
        });
    }
}
