//! GRUB's variables, and the file `grubenv` that keeps some of them.

use std::collections::BTreeMap;

use super::words::{Part, Token, Word, tokens};
use crate::ReadError;
use crate::source::Source;

/// Longest value, and most variables.
const VALUE: usize = 4096;
const VARIABLES: usize = 1024;
/// Longest text that the variables of one command make of it.
const EXPANDED: usize = 64 << 10;
/// What a word costs in bytes beside its letters: its place in a list, which may grow by doubling, and its text's.
const WORD: usize = 112;
/// What a part of a word costs: nothing is kept of it, but each is work.
const PART: usize = 32;

/// Variables.
#[derive(Debug, Default)]
pub(super) struct Environment(BTreeMap<String, String>);

impl Environment {
    pub(super) fn get(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    /// Sets a variable; one that is too long, or too much, stays as it was.
    pub(super) fn set(&mut self, name: &str, value: &str) {
        if value.len() <= VALUE
            && name.len() <= VALUE
            && (self.0.len() < VARIABLES || self.0.contains_key(name))
        {
            self.0.insert(name.to_owned(), value.to_owned());
        }
    }

    pub(super) fn unset(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// Words with their variables put in. `arguments` are those of a function.
    ///
    /// # Errors
    /// More than there may be.
    pub(super) fn expand(
        &self,
        words: &[Word],
        arguments: &[String],
        source: &Source,
    ) -> Result<Vec<String>, ReadError> {
        let mut expanded = Vec::new();
        let mut left = EXPANDED;
        for word in words {
            source.think(WORD)?;
            let mut current = word.quoted.then(String::new);
            for part in &word.parts {
                match part {
                    Part::Text(text) => {
                        source.think(PART + 2 * text.len())?;
                        add(&mut current, text, &mut left);
                    }
                    Part::Variable { name, quoted } => {
                        let value = self.value(name, arguments, source)?;
                        if *quoted {
                            add(&mut current, &value, &mut left);
                            continue;
                        }
                        // Without quotes a value is as many words as it has.
                        let mut pieces = value.split_whitespace();
                        if let Some(first) = pieces.next() {
                            add(&mut current, first, &mut left);
                        }
                        for piece in pieces {
                            source.think(WORD)?;
                            expanded.extend(current.take());
                            add(&mut current, piece, &mut left);
                        }
                    }
                }
            }
            expanded.extend(current);
        }
        Ok(expanded)
    }

    /// The value, which is copied, and copied once more into a word.
    fn value(&self, name: &str, arguments: &[String], source: &Source) -> Result<String, ReadError> {
        let cost = |bytes: usize| source.think(PART + name.len() + 4 * bytes);
        let value = match (name, name.parse::<usize>()) {
            ("@" | "*", _) => {
                cost(arguments.iter().map(|it| it.len() + 1).sum())?;
                return Ok(arguments.join(" "));
            }
            ("#", _) => {
                cost(0)?;
                return Ok(arguments.len().to_string());
            }
            (_, Ok(number)) => {
                number.checked_sub(1).and_then(|it| arguments.get(it)).map_or("", String::as_str)
            }
            _ => self.get(name),
        };
        cost(value.len())?;
        Ok(value.to_owned())
    }

    /// A text with its variables put in, as entries have it that are no scripts.
    ///
    /// # Errors
    /// More than there may be.
    pub(super) fn expand_text(&self, text: &str, source: &Source) -> Result<String, ReadError> {
        source.think(PART + 4 * text.len())?;
        if !text.contains('$') {
            return Ok(text.to_owned());
        }
        let plain = text.replace(['\'', '"', '\\', ';', '#', '\n'], " ");
        let words = tokens(&plain, source).map_err(|fault| fault.of("an entry"))?.into_iter();
        let words: Vec<Word> = words
            .filter_map(|token| match token {
                Token::Word(word) => Some(word),
                Token::End => None,
            })
            .collect();
        Ok(self.expand(&words, &[], source)?.join(" "))
    }
}

fn add(current: &mut Option<String>, text: &str, left: &mut usize) {
    let text = if text.len() <= *left { text } else { "" };
    *left -= text.len();
    current.get_or_insert_default().push_str(text);
}

/// The variables in a file `grubenv`.
pub(super) fn parse_block(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut letters = text.strip_prefix("# GRUB Environment Block\n").unwrap_or_default().chars();
    let (mut line, mut escaped) = (String::new(), false);
    for letter in letters.by_ref() {
        match letter {
            _ if std::mem::take(&mut escaped) => line.push(letter),
            '\\' => escaped = true,
            '\n' => {
                let line = std::mem::take(&mut line);
                if let Some((name, value)) = line.split_once('=').filter(|(name, _)| !name.starts_with('#')) {
                    found.push((name.to_owned(), value.to_owned()));
                }
            }
            _ => line.push(letter),
        }
    }
    found
}
