//! What colours mean. They say nothing that signs and words do not say, too.

use ratatui::style::{Color, Modifier, Style};

/// What is to be said by a colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tone {
    Plain,
    Strong,
    Quiet,
    Good,
    Warn,
    Bad,
    Wait,
    Note,
    /// What is looked at.
    Chosen,
    /// The mean of figures, and what none was above.
    Bar,
    Light,
}

/// Whether there are colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Colours(bool);

impl Colours {
    pub(crate) const NONE: Self = Self(false);
    #[cfg(test)]
    pub(crate) const ALL: Self = Self(true);

    /// As the user wants it: <https://no-color.org>.
    pub(crate) fn wanted() -> Self {
        Self(std::env::var_os("NO_COLOR").is_none_or(|it| it.is_empty()))
    }

    pub(super) fn are_on(self) -> bool {
        self.0
    }

    /// Only colours of the terminal's own palette, which its user can read.
    pub(super) fn style(self, tone: Tone) -> Style {
        let (colour, modifier) = match tone {
            Tone::Plain => (None, Modifier::empty()),
            Tone::Strong => (None, Modifier::BOLD),
            Tone::Quiet => (None, Modifier::DIM),
            Tone::Good => (Some(Color::Green), Modifier::empty()),
            Tone::Warn => (Some(Color::Yellow), Modifier::empty()),
            Tone::Bad => (Some(Color::Red), Modifier::BOLD),
            Tone::Wait | Tone::Note => (Some(Color::Cyan), Modifier::empty()),
            Tone::Chosen => (None, Modifier::REVERSED),
            Tone::Bar => (Some(Color::Blue), Modifier::empty()),
            Tone::Light => (Some(Color::Cyan), Modifier::DIM),
        };
        let style = Style::new().add_modifier(modifier);
        match colour.filter(|_| self.0) {
            Some(colour) => style.fg(colour),
            None => style,
        }
    }
}
