//! What a person sees while the demo runs: a line for each milestone, and one live line.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// How often the live line changes on a terminal, and how often it is repeated elsewhere.
const LIVE: Duration = Duration::from_millis(100);
const PLAIN: Duration = Duration::from_secs(1);

/// Writes to standard error; standard output is for the summary.
#[derive(Debug)]
pub(super) struct Status {
    /// The live line, if standard error is a terminal.
    bar: Option<ProgressBar>,
    begin: Instant,
    due: Instant,
}

impl Status {
    pub(super) fn new() -> Self {
        let bar = stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{spinner} {wide_msg}").expect("a constant template");
            ProgressBar::new_spinner().with_style(style)
        });
        Self { bar, begin: Instant::now(), due: Instant::now() }
    }

    /// Prints a line that stays, for something that has happened.
    pub(super) fn say(&self, text: &str) {
        let line = format!("[{:5.1} s] {text}", self.begin.elapsed().as_secs_f64());
        match &self.bar {
            Some(bar) => bar.println(line),
            None => crate::logs::say(&line),
        }
    }

    /// Whether it is time to [`Status::show`] the live line again.
    pub(super) fn due(&self) -> bool {
        Instant::now() >= self.due
    }

    /// Shows the live line.
    pub(super) fn show(&mut self, text: &str) {
        match &self.bar {
            Some(bar) => {
                bar.set_message(text.to_owned());
                bar.tick();
                self.due = Instant::now() + LIVE;
            }
            None => {
                self.say(text);
                self.due = Instant::now() + PLAIN;
            }
        }
    }
}

impl Drop for Status {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// `1234567` as `1 234 567`.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// Microseconds with a fitting unit.
pub(super) fn time(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..100_000 => format!("{:.1} ms", us as f64 / 1e3),
        100_000..10_000_000 => format!("{} ms", grouped(us / 1_000)),
        _ => format!("{:.1} s", us as f64 / 1e6),
    }
}

/// Nanoseconds with a fitting unit.
pub(super) fn time_ns(ns: u64) -> String {
    match ns {
        0..10_000 => format!("{:.1} µs", ns as f64 / 1e3),
        _ => time(ns / 1_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        assert_eq!(
            ["0", "999", "1 000", "12 345 678"].map(String::from),
            [0, 999, 1_000, 12_345_678].map(grouped)
        );
        assert_eq!(
            ["0 µs", "999 µs", "1.5 ms", "250 ms", "1 020 ms", "12.0 s"].map(String::from),
            [0, 999, 1_500, 250_000, 1_020_000, 12_000_000].map(time)
        );
        assert_eq!(
            ["0.0 µs", "0.4 µs", "9.9 µs", "10 µs", "1.5 ms"].map(String::from),
            [0, 432, 9_940, 10_999, 1_500_000].map(time_ns)
        );
    }
}
