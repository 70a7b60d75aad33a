//! Words and numbers, as a terminal shows them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ratatui::text::Span;

use crate::terminal::is_harmless;

/// The longest text of a node that is shown, in characters.
const LONGEST: usize = 400;
/// The last moment that can be written down, in milliseconds since 1970.
const LAST_MS: i64 = 253_402_300_799_000;

/// A text that means nothing to a terminal: whoever names a VM, or is quoted in an event, may want to write to it. What
/// would move the cursor, change colours or turn the direction of writing is `�`.
pub(super) fn clean(text: &str) -> String {
    text.chars().take(LONGEST).map(harmless).collect()
}

/// A character that means nothing to a terminal, in the place of one that may.
fn harmless(it: char) -> char {
    if is_harmless(it) { it } else { '\u{fffd}' }
}

/// How many columns a text takes.
pub(super) fn width(text: &str) -> usize {
    Span::raw(text).width()
}

/// A text that takes so many columns at most; `…` says that some of it is missing.
pub(super) fn cut(text: &str, columns: usize) -> String {
    if width(text) <= columns {
        return text.to_owned();
    }
    let (mut cut, mut taken) = (String::new(), 1);
    for it in text.chars() {
        taken += width(it.encode_utf8(&mut [0; 4]));
        if taken > columns {
            break;
        }
        cut.push(it);
    }
    if columns > 0 {
        cut.push('…');
    }
    cut
}

/// A text in lines of so many columns at most.
pub(super) fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let word = cut(word, columns);
        let last = lines.last_mut().expect("there is a line from the start");
        if last.is_empty() {
            *last = word;
        } else if width(last) + 1 + width(&word) <= columns {
            *last += &format!(" {word}");
        } else {
            lines.push(word);
        }
    }
    lines
}

fn rounded(value: f64) -> String {
    match value {
        it if it >= 10.0 || it.fract() == 0.0 => format!("{it:.0}"),
        it if it >= 1.0 => format!("{it:.1}"),
        it => format!("{it:.2}"),
    }
}

/// A time in microseconds.
pub(super) fn micros(us: u64) -> String {
    let it = us as f64;
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{} ms", rounded(it / 1e3)),
        _ => format!("{} s", rounded(it / 1e6)),
    }
}

/// A size.
pub(super) fn bytes(count: u64) -> String {
    let it = count as f64;
    match count {
        0..0x400 => format!("{count} B"),
        0x400..0x10_0000 => format!("{} KiB", rounded(it / 1024.0)),
        0x10_0000..0x4000_0000 => format!("{} MiB", rounded(it / 1_048_576.0)),
        _ => format!("{} GiB", rounded(it / 1_073_741_824.0)),
    }
}

/// A number of something.
pub(super) fn count(number: u64) -> String {
    if number < 10_000 { number.to_string() } else { format!("{} k", rounded(number as f64 / 1e3)) }
}

/// "3 VMs": a number and its noun.
pub(super) fn many(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// A span, from milliseconds.
pub(super) fn span(ms: u64) -> String {
    let seconds = ms as f64 / 1e3;
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..120_000 => format!("{seconds:.0} s"),
        120_000..7_200_000 => format!("{:.0} min", seconds / 60.0),
        7_200_000..172_800_000 => format!("{:.0} h", seconds / 3600.0),
        _ => format!("{:.0} days", seconds / 86_400.0),
    }
}

/// A moment that a node has named, in milliseconds since 1970.
pub(super) fn moment(text: &str) -> Option<i64> {
    let at = humantime::parse_rfc3339(text).ok()?;
    i64::try_from(at.duration_since(UNIX_EPOCH).ok()?.as_millis()).ok()
}

/// The moment that this host calls now.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(LAST_MS)
}

/// The time of day of a moment, in UTC, with the date if it is not that of `now`.
pub(super) fn clock(ms: i64, now: i64) -> String {
    let written = |ms: i64| {
        let since = Duration::from_millis(ms.clamp(0, LAST_MS).unsigned_abs());
        humantime::format_rfc3339_seconds(UNIX_EPOCH + since).to_string()
    };
    let (at, today) = (written(ms), written(now));
    let (date, time) = at.split_at(10);
    let of_day = &time[1..9];
    if today.starts_with(date) { of_day.to_owned() } else { format!("{date} {of_day}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_would_obey_is_left() {
        let hostile = "a\x1b[31mb\x07\r\n\t\u{9b}2J\u{202e}c\u{200b}\u{feff}\u{2028}d\0e";
        let cleaned = clean(hostile);
        assert_eq!(cleaned, "a�[31mb�����2J�c���d�e");
        assert_eq!(clean("wëb-1 日本 ✓"), "wëb-1 日本 ✓");
        assert_eq!(clean(&"x".repeat(9999)).len(), LONGEST);
    }

    #[test]
    fn texts_fit_into_their_columns() {
        assert_eq!((cut("hosta", 5).as_str(), cut("hosta", 4).as_str()), ("hosta", "hos…"));
        assert_eq!((cut("日本語", 5).as_str(), cut("日本語", 4).as_str()), ("日本…", "日…"));
        assert_eq!((cut("x", 0).as_str(), cut("xy", 1).as_str()), ("", "…"));
        assert_eq!(wrap("one two  three", 7), ["one two", "three"]);
        assert_eq!(wrap("abcdefgh i", 4), ["abc…", "i"]);
        assert_eq!(wrap("", 4), [""]);
    }

    #[test]
    fn numbers_are_short() {
        for (us, text) in
            [(7, "7 µs"), (1_000, "1 ms"), (1_540, "1.5 ms"), (30_400, "30 ms"), (2_000_000, "2 s")]
        {
            assert_eq!(micros(us), text);
        }
        for (size, text) in
            [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5 MiB"), (3 << 30, "3 GiB")]
        {
            assert_eq!(bytes(size), text);
        }
        assert_eq!((count(9_999), count(12_345)), ("9999".into(), "12 k".into()));
        for (ms, text) in [
            (999, "999 ms"),
            (1_500, "2 s"),
            (120_000, "2 min"),
            (7_200_000, "2 h"),
            (u64::MAX, "213503982335 days"),
        ] {
            assert_eq!(span(ms), text);
        }
        assert_eq!((many(1, "VM"), many(2, "VM")), ("1 VM".into(), "2 VMs".into()));
    }

    #[test]
    fn moments_are_read_and_written() {
        let noon = moment("2026-12-01T12:00:00.250Z").unwrap();
        assert_eq!(clock(noon, noon + 1000), "12:00:00");
        assert_eq!(clock(noon, noon + 86_400_000), "2026-12-01 12:00:00");
        assert_eq!((moment("yesterday"), moment("1969-12-31T23:59:59Z")), (None, None));
        assert_eq!(
            (clock(i64::MIN, 0).as_str(), clock(i64::MAX, 0).as_str()),
            ("00:00:00", "9999-12-31 23:59:59")
        );
    }
}
