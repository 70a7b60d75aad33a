//! Bars for the base synchronisation: one for memory, one for each disk.

use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::sync::mpsc::{Receiver, sync_channel};

use indicatif::{ProgressBar, ProgressStyle};

use crate::events::{Event, EventWriter};

/// How many events may wait to be drawn; more are not shown.
const WAITING: usize = 64;

/// Draws bars on standard error, if it is a terminal, from the events. A separate thread draws, so that the
/// threads that report progress do not wait for a terminal.
pub(crate) fn show_progress(events: &EventWriter) {
    if !io::stderr().is_terminal() {
        return;
    }
    let (queue, inbox) = sync_channel(WAITING);
    let drawing = outlive_machine::spawn("progress", move || {
        draw(&inbox);
    });
    match drawing {
        Ok(_) => events.observe(move |event| {
            if is_shown(event) {
                queue.try_send(event.clone()).ok();
            }
        }),
        Err(error) => tracing::warn!(%error, "no progress bars: cannot start a thread"),
    }
}

fn is_shown(event: &Event) -> bool {
    matches!(event, Event::BaseProgress { .. } | Event::DiskSync { .. }) || ends(event)
}

/// Whether no synchronisation runs after this event.
fn ends(event: &Event) -> bool {
    matches!(event, Event::Protected { .. } | Event::LinkLost { .. } | Event::Ended { .. })
}

fn draw(inbox: &Receiver<Event>) {
    let mut bars = Bars::default();
    while let Ok(event) = inbox.recv() {
        bars.show(&event);
    }
}

#[derive(Default)]
struct Bars {
    memory: Option<ProgressBar>,
    disks: HashMap<u16, ProgressBar>,
}

impl Bars {
    fn show(&mut self, event: &Event) {
        match *event {
            Event::BaseProgress { round, sent_pages, planned_pages, .. } => {
                let bar = self.memory.get_or_insert_with(|| {
                    bar("base synchronisation {bar:30} {percent:>3} % {binary_bytes_per_sec:>12}, round {msg}")
                });
                bar.set_length(bytes(planned_pages));
                bar.set_position(bytes(sent_pages));
                bar.set_message(round.to_string());
            }
            Event::DiskSync { disk, done_bytes, total_bytes, .. } => {
                let bar = self.disks.entry(disk).or_insert_with(|| {
                    let bar =
                        bar("disk {msg} synchronisation {bar:30} {percent:>3} % {binary_bytes_per_sec:>12}");
                    bar.set_message(disk.to_string());
                    bar
                });
                bar.set_length(total_bytes);
                bar.set_position(done_bytes);
                if done_bytes == total_bytes {
                    bar.finish_and_clear();
                }
            }
            _ if ends(event) => {
                self.memory.take().into_iter().chain(self.disks.drain().map(|(_, bar)| bar)).for_each(
                    |bar| {
                        bar.finish_and_clear();
                    },
                );
            }
            _ => {}
        }
    }
}

/// A bar for a copy of this many bytes. Whoever is no terminal sees none.
pub(crate) fn bytes_bar(what: &'static str, bytes: u64) -> ProgressBar {
    let bar =
        bar("{msg} {bar:30} {percent:>3} % of {binary_total_bytes} {binary_bytes_per_sec:>12}, {eta} left");
    bar.set_message(what);
    bar.set_length(bytes);
    bar
}

/// How far checkpoints have been played. It begins with the first one that it is told of.
pub(crate) fn checkpoints_bar(last: u64) -> ProgressBar {
    let bar = bar("playing checkpoints {bar:30} {pos} of {len}");
    bar.set_length(last);
    bar
}

fn bar(template: &str) -> ProgressBar {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

fn bytes(pages: u64) -> u64 {
    pages * outlive_machine::PAGE_SIZE as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_follow_the_events_and_go_with_the_synchronisation() {
        let mut bars = Bars::default();
        let memory =
            |sent_pages| Event::BaseProgress { round: 2, sent_pages, total_pages: 10, planned_pages: 16 };
        let read_bytes = 4;
        bars.show(&Event::DiskSync { disk: 1, done_bytes: 4, total_bytes: 8, sent_bytes: 2, read_bytes });
        bars.show(&memory(12));
        let bar = bars.memory.clone().unwrap();
        assert_eq!((bar.position(), bar.length(), bar.message().as_str()), (12 << 12, Some(16 << 12), "2"));
        assert_eq!((bars.disks[&1].position(), bars.disks[&1].length()), (4, Some(8)));
        for end in [
            Event::Protected {
                generation: 1,
                checkpoint: 1,
                base_ms: 1,
                rounds: 2,
                held_ms: 0,
                longest_stop_us: 0,
            },
            Event::LinkLost { reason: String::new() },
        ] {
            bars.show(&memory(13));
            let bar = bars.memory.clone().unwrap();
            assert!(is_shown(&end));
            bars.show(&end);
            assert!(bar.is_finished() && bars.memory.is_none() && bars.disks.is_empty());
        }
        assert!(!is_shown(&Event::GuestPanicked));
    }
}
