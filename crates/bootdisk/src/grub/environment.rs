//! GRUB's variables, and the file `grubenv` that keeps some of them.

use std::collections::BTreeMap;

use super::words::{Part, Word};

/// Longest value, and most variables.
const VALUE: usize = 4096;
const VARIABLES: usize = 1024;
/// Longest text that the variables of one command make of it.
const EXPANDED: usize = 64 << 10;

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
    pub(super) fn expand(&self, words: &[Word], arguments: &[String]) -> Vec<String> {
        let mut expanded = Vec::new();
        let mut left = EXPANDED;
        for word in words {
            let mut current = word.quoted.then(String::new);
            for part in &word.parts {
                match part {
                    Part::Text(text) => add(&mut current, text, &mut left),
                    Part::Variable { name, quoted } => {
                        let value = self.value(name, arguments);
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
                            expanded.extend(current.take());
                            add(&mut current, piece, &mut left);
                        }
                    }
                }
            }
            expanded.extend(current);
        }
        expanded
    }

    fn value(&self, name: &str, arguments: &[String]) -> String {
        match (name, name.parse::<usize>()) {
            ("@" | "*", _) => arguments.join(" "),
            ("#", _) => arguments.len().to_string(),
            (_, Ok(number)) => {
                number.checked_sub(1).and_then(|it| arguments.get(it)).cloned().unwrap_or_default()
            }
            _ => self.get(name).to_owned(),
        }
    }

    /// A text with its variables put in, as entries have it that are no scripts.
    pub(super) fn expand_text(&self, text: &str) -> String {
        let words =
            super::words::tokens(&text.replace(['\'', '"', '\\', ';', '#', '\n'], " ")).unwrap_or_default();
        let words: Vec<Word> = words
            .into_iter()
            .filter_map(|token| match token {
                super::words::Token::Word(word) => Some(word),
                super::words::Token::End => None,
            })
            .collect();
        if text.contains('$') { self.expand(&words, &[]).join(" ") } else { text.to_owned() }
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
