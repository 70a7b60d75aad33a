//! A status for people: a first line that answers what an operator asks first, and a line for each fact.

use std::fmt::{self, Write as _};

use super::Status;
use super::answer::{ArbiterSight, Audited, Recorded, span};
use crate::events::Role;
use crate::link::LinkKind;

/// Where values begin: behind the longest key.
const COLUMN: usize = 22;
/// A value keeps this much of a line.
const LEAST: usize = 30;

impl Status {
    /// The lines, folded to a terminal of this width; without one each fact is a line.
    pub(super) fn lines(&self, width: Option<usize>) -> String {
        let room = width.map_or(usize::MAX, |it| it.saturating_sub(4).max(LEAST));
        let mut text = folded(&self.verdict(), room).join("\n    ") + "\n";
        for (key, value) in self.facts() {
            let room = width.map_or(usize::MAX, |it| it.saturating_sub(COLUMN).max(LEAST));
            let mut head = format!("  {key}:");
            for line in folded(&value, room) {
                // Writing to a string does not fail.
                writeln!(text, "{head:<COLUMN$}{line}").ok();
                head.clear();
            }
        }
        text
    }

    /// Whether the VM is protected, and whether a failure now would be survived.
    fn verdict(&self) -> String {
        let name = self.vm.as_deref().unwrap_or("(no VM yet)");
        let role = match self.role {
            Role::Primary => "primary",
            Role::Standby => "standby",
        };
        let protected = if self.protected { "protected" } else { "UNPROTECTED" };
        let loss = match (self.loss_of_this_host.survived, self.loss_of_other_host.survived) {
            (true, true) => "the loss of either host would be survived now",
            (false, true) => "the loss of this host would NOT be survived now",
            (true, false) => "the loss of the other host would NOT be survived now",
            (false, false) => "the loss of either host would NOT be survived now",
        };
        format!("{name}: {role}, {protected}; {loss}")
    }

    fn facts(&self) -> Vec<(&'static str, String)> {
        let peer = match self.role {
            Role::Primary => "standby",
            Role::Standby => "primary",
        };
        let link = match self.link {
            Some(LinkKind::Plain) => Some("INSECURE: neither encrypted nor authenticated".to_owned()),
            Some(LinkKind::Tls13) | None => None,
        };
        let facts = [
            ("why", self.why.clone()),
            ("since", Some(self.since.clone())),
            ("process", Some(self.pid.to_string())),
            (peer, self.peer.clone()),
            ("link", link),
            ("generation", self.generation.map(|it| it.to_string())),
            ("checkpoint", self.committed()),
            ("in flight", self.flying()),
            ("audit", self.audit.as_ref().map(Audited::to_string)),
            ("record", self.record.as_ref().map(Recorded::to_string)),
            (
                "arbiter",
                Some(self.arbiter.as_ref().map_or_else(|| "none".to_owned(), ArbiterSight::to_string)),
            ),
            ("loss of this host", Some(self.loss_of_this_host.to_string())),
            ("loss of the other", Some(self.loss_of_other_host.to_string())),
        ];
        facts.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
    }

    fn committed(&self) -> Option<String> {
        let checkpoint = self.checkpoint?;
        let ago = self.committed_ms_ago.map_or_else(String::new, |ms| format!(" {} ago", span(ms)));
        Some(format!("{checkpoint}, committed{ago}"))
    }

    fn flying(&self) -> Option<String> {
        let count = self.in_flight?;
        let bytes = self.bytes_in_flight.filter(|&bytes| bytes > 0);
        let size = bytes.map_or_else(String::new, |bytes| format!(" ({} KiB)", bytes.div_ceil(1024)));
        Some(format!("{count}{size}"))
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.lines(None).trim_end())
    }
}

impl fmt::Display for Audited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages compared", self.pages)?;
        if let Some(ms) = self.round_ended_ms_ago {
            write!(f, ", all of them {} ago", span(ms))?;
        }
        if self.disk_bytes > 0 {
            write!(f, "; {} MiB of disks", self.disk_bytes >> 20)?;
        }
        if let Some(ms) = self.disk_round_ended_ms_ago {
            match self.disk_round_left_out {
                0 => write!(f, ", all of it {} ago", span(ms))?,
                bytes => write!(f, ", all but {} KiB {} ago", bytes >> 10, span(ms))?,
            }
        }
        match self.differences {
            0 => f.write_str(", no difference"),
            count => write!(f, ", COPY DIFFERED {count} TIMES"),
        }
    }
}

impl fmt::Display for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {} MiB: ", self.directory, self.bytes >> 20)?;
        match (self.run, self.first_ms_ago, &self.why) {
            (Some(_), Some(ms), _) => write!(f, "the last {} can be had", span(ms / 1000 * 1000))?,
            (Some(_), None, _) => f.write_str("memory and disks are being copied")?,
            (None, _, Some(why)) => write!(f, "NOT RECORDING: {why}")?,
            (None, _, None) => f.write_str("no VM is recorded now")?,
        }
        match self.gaps {
            0 => Ok(()),
            1 => f.write_str(", one gap"),
            gaps => write!(f, ", {gaps} gaps"),
        }
    }
}

impl fmt::Display for ArbiterSight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_operator {
            return f.write_str("an operator (manual)");
        }
        let way = match self.link {
            None => "",
            Some(LinkKind::Tls13) => " over TLS 1.3",
            Some(LinkKind::Plain) => " over an INSECURE way",
        };
        let seen =
            self.seen_ms_ago.map_or_else(|| "not seen yet".to_owned(), |ms| format!("seen {} ago", span(ms)));
        match &self.lost {
            Some(why) => write!(f, "LOST, {seen}{way}: {why}"),
            None => write!(f, "{seen}{way}"),
        }
    }
}

/// A text in lines of at most this many characters. A longer word has a line of its own.
fn folded(text: &str, room: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let last = lines.last_mut().expect("there is one from the beginning");
        if last.is_empty() {
            last.push_str(word);
        } else if last.chars().count() + 1 + word.chars().count() <= room {
            *last = format!("{last} {word}");
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_value_is_folded_at_words() {
        assert_eq!(folded("one two three", 7), ["one two", "three"]);
        assert_eq!(folded("a-word-without-end b", 5), ["a-word-without-end", "b"]);
        assert_eq!(folded("ä ö ü", 3), ["ä ö", "ü"]);
        assert_eq!(folded("", 3), [""]);
        assert_eq!(folded("one two", usize::MAX), ["one two"]);
    }
}
