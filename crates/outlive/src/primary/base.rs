//! Base synchronisation: all memory goes to the standby while the guest runs, in rounds that shrink.

use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use outlive_dirty::Gfn;
use outlive_machine::Ram;
use outlive_pair::Link;

use crate::events::{Event, EventWriter};
use crate::link::Job;

/// After this many rounds the rest is sent with the VM stopped, however much it is: a guest that writes faster than the link
/// carries would never get there otherwise.
const MAX_ROUNDS: u32 = 6;
/// Time between two progress events.
const REPORT: Duration = Duration::from_millis(100);

/// One base synchronisation.
pub(crate) struct Base {
    link: Link,
    round: u32,
    sent_pages: u64,
    total_pages: u64,
    bar: ProgressBar,
    events: EventWriter,
    reported: Instant,
    /// Taken from the tracker before their round, because a dirty ring was full.
    early: Vec<Gfn>,
}

impl Base {
    /// Begins with the first round, which is all memory.
    pub(crate) fn new(link: Link, total_pages: u64, events: EventWriter) -> Self {
        // Draws on a terminal only.
        let bar = ProgressBar::new(bytes(total_pages));
        if let Ok(style) = ProgressStyle::with_template(
            "base synchronisation {bar:30} {percent:>3} % {binary_bytes_per_sec:>12}, round {msg}",
        ) {
            bar.set_style(style);
        }
        bar.set_message("1");
        Self {
            link,
            round: 1,
            sent_pages: 0,
            total_pages,
            bar,
            events,
            reported: Instant::now(),
            early: Vec::new(),
        }
    }

    /// The link that it goes over.
    pub(crate) fn link(&self) -> Link {
        self.link
    }

    /// The job for the current round.
    pub(crate) fn round(&self, gfns: Vec<Gfn>, ram: &Arc<Ram>) -> Job {
        Job::BaseRound { round: self.round, gfns, ram: ram.clone() }
    }

    /// Where pages go that are taken while a round is still being sent. They belong to the next one.
    pub(crate) fn early(&mut self) -> &mut Vec<Gfn> {
        &mut self.early
    }

    /// Goes on to the next round with the pages that became dirty during the last.
    pub(crate) fn next_round(&mut self, mut gfns: Vec<Gfn>, ram: &Arc<Ram>) -> Job {
        gfns.append(&mut self.early);
        gfns.sort_unstable();
        gfns.dedup();
        self.round += 1;
        self.bar.set_message(self.round.to_string());
        self.bar.inc_length(bytes(gfns.len() as u64));
        self.round(gfns, ram)
    }

    /// Whether the rest is to be sent with the VM stopped: it fits half of a staging buffer, or there were rounds enough.
    pub(crate) fn is_last(&self, dirty: usize, staging_pages: usize) -> bool {
        // In bitmap mode `dirty` counts the device models' pages alone, so at least two rounds are made.
        self.round >= MAX_ROUNDS || self.round >= 2 && dirty + self.early.len() <= staging_pages / 2
    }

    /// So many pages more are sent.
    pub(crate) fn sent(&mut self, pages: u64) {
        self.sent_pages += pages;
        self.bar.inc(bytes(pages));
        if self.reported.elapsed() >= REPORT {
            self.report();
        }
    }

    /// The base is captured.
    pub(crate) fn finish(mut self) {
        self.report();
        self.bar.finish_and_clear();
    }

    fn report(&mut self) {
        self.reported = Instant::now();
        let Self { round, sent_pages, total_pages, .. } = *self;
        self.events.emit(Event::BaseProgress { round, sent_pages, total_pages });
    }
}

/// What the progress bar counts in.
fn bytes(pages: u64) -> u64 {
    pages * outlive_machine::PAGE_SIZE as u64
}

impl Drop for Base {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
