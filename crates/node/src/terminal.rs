//! Texts of others, for the terminal of whoever reads them. A process that a guest has taken over, a peer and an arbiter say
//! why something is so; what they say must not move the cursor, nor look like words of this program.

use std::borrow::Cow;

/// The same text without what a terminal obeys: control characters, but for the ends of lines, and what turns the direction
/// of writing around. A character takes the place of each.
pub fn shown(text: &str) -> Cow<'_, str> {
    replaced(text, |it| it != '\n' && !is_harmless(it))
}

/// The same in one line.
pub fn shown_in_line(text: &str) -> Cow<'_, str> {
    replaced(text, |it| !is_harmless(it))
}

fn replaced(text: &str, bad: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&bad) {
        return Cow::Borrowed(text);
    }
    let good = |it| match it {
        it if !bad(it) => it,
        '\t' | '\n' => ' ',
        _ => '?',
    };
    Cow::Owned(text.chars().map(good).collect())
}

/// Whether a character is only itself. A terminal obeys C0, DEL and C1; what has no width hides, and what turns the direction
/// of writing lies about the rest.
pub(crate) fn is_harmless(it: char) -> bool {
    let hides = matches!(it,
        '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
        | '\u{e0000}'..='\u{e0fff}');
    !it.is_control() && !hides
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_is_left() {
        let evil = "a\x1b[2Jb\rc\x07\u{9b}31md\u{202e}e\u{2066}f\tg\x7fh\u{85}i\u{2028}j\nü…\u{a0}k";
        assert_eq!(shown(evil), "a?[2Jb?c??31md?e?f g?h?i?j\nü…\u{a0}k");
        assert_eq!(shown_in_line(evil), "a?[2Jb?c??31md?e?f g?h?i?j ü…\u{a0}k");
        assert!(matches!(shown("plain\nü"), Cow::Borrowed(_)));
    }
}
