//! The menu that a configuration makes, and the entry that is its default.

use super::syntax::Script;
use crate::bls::Bls;

/// Most arguments behind a title that are kept.
const ARGUMENTS: usize = 64;

/// What an entry does.
#[derive(Clone, Debug)]
pub(super) enum Body {
    /// Commands that load a kernel.
    Entry(Script),
    /// Commands that make another menu.
    Submenu(Script),
    /// An entry of the Boot Loader Specification on a volume.
    Bls { volume: usize, entry: Box<Bls> },
}

/// An entry of a menu.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub(super) title: String,
    pub(super) id: String,
    /// Arguments behind its title.
    pub(super) arguments: Vec<String>,
    pub(super) body: Body,
}

impl Item {
    /// From the words of `menuentry` or `submenu`.
    pub(super) fn new(words: Vec<String>, body: Body) -> Self {
        let mut item = Self { title: String::new(), id: String::new(), arguments: Vec::new(), body };
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--id" => item.id = words.next().unwrap_or_default(),
                "--class" | "--users" | "--hotkey" | "--source" => drop(words.next()),
                "--unrestricted" => {}
                _ => match word.split_once('=') {
                    Some(("--id", id)) => item.id = id.to_owned(),
                    Some(("--class" | "--users" | "--hotkey" | "--source", _)) => {}
                    _ if item.arguments.len() < ARGUMENTS => item.arguments.push(word),
                    _ => {}
                },
            }
        }
        if let Some(title) = item.arguments.first() {
            item.title.clone_from(title);
        }
        item
    }

    fn is_named(&self, name: &str) -> bool {
        self.title == name || (!self.id.is_empty() && self.id == name)
    }
}

/// The first step of a way such as `1>2` or `gnulinux-advanced>gnulinux-6.1`, and the rest. In a title `>>` is a `>`.
pub(super) fn step(way: &str) -> (String, &str) {
    let mut first = String::new();
    let mut letters = way.char_indices().peekable();
    while let Some((at, letter)) = letters.next() {
        if letter != '>' {
            first.push(letter);
        } else if letters.next_if(|(_, next)| *next == '>').is_some() {
            first.push('>');
        } else {
            return (first, &way[at + 1..]);
        }
    }
    (first, "")
}

/// The entry that a step means: a title, an id or a number; else the first, as GRUB does.
pub(super) fn find<'a>(items: &'a [Item], step: &str) -> Option<&'a Item> {
    let number = || step.parse::<usize>().ok().and_then(|number| items.get(number));
    items.iter().find(|item| item.is_named(step)).or_else(number).or_else(|| items.first())
}

/// Whether a step means an entry that is there.
pub(super) fn has(items: &[Item], step: &str) -> bool {
    let number = step.parse::<usize>().is_ok_and(|number| number < items.len());
    step.is_empty() || number || items.iter().any(|item| item.is_named(step))
}
