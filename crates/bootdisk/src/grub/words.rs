//! Words of a GRUB script: text, quotes and variables.

use std::iter::Peekable;
use std::str::Chars;

use crate::ReadError;
use crate::source::Source;

/// What a token costs in bytes: its place in a list and in a command, which may grow by doubling, and its first part.
const TOKEN: usize = 320;
/// What a part costs beside its letters.
const PART: usize = 112;
/// What a letter costs: a text grows by doubling.
const LETTER: usize = 4;

/// Why there are no tokens, or no script.
#[derive(Debug)]
pub(super) enum Fault {
    /// What is wrong with the text.
    Syntax(&'static str),
    /// Limits, or the disk.
    Read(ReadError),
}

impl From<&'static str> for Fault {
    fn from(why: &'static str) -> Self {
        Self::Syntax(why)
    }
}

impl From<ReadError> for Fault {
    fn from(error: ReadError) -> Self {
        Self::Read(error)
    }
}

impl Fault {
    /// Of the configuration at this path.
    pub(super) fn of(self, path: &str) -> ReadError {
        match self {
            Self::Syntax(why) => ReadError::Configuration { path: path.to_owned(), why: why.into() },
            Self::Read(error) => error,
        }
    }
}

/// A part of a word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Text(String),
    Variable {
        name: String,
        /// In quotes its value stays one word.
        quoted: bool,
    },
}

/// A word before its variables are put in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Word {
    pub(super) parts: Vec<Part>,
    /// It has quotes, so it is no keyword, and stays a word when it is empty.
    pub(super) quoted: bool,
}

impl Word {
    /// The word, if it is nothing but unquoted text.
    pub(super) fn plain(&self) -> Option<&str> {
        match (&self.parts[..], self.quoted) {
            ([Part::Text(text)], false) => Some(text),
            _ => None,
        }
    }

    fn push(&mut self, letter: char) {
        if let Some(Part::Text(text)) = self.parts.last_mut() {
            text.push(letter);
        } else {
            self.parts.push(Part::Text(letter.into()));
        }
    }
}

/// A token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Word(Word),
    /// A new line or `;`.
    End,
}

/// Splits a script into tokens.
///
/// # Errors
/// A quote that does not end, or more than there may be.
pub(super) fn tokens(text: &str, source: &Source) -> Result<Vec<Token>, Fault> {
    source.think(text.len().saturating_mul(LETTER))?;
    let mut tokens = Vec::new();
    let mut letters = text.chars().peekable();
    while let Some(&letter) = letters.peek() {
        match letter {
            '\n' | ';' => {
                letters.next();
                source.think(TOKEN)?;
                tokens.push(Token::End);
            }
            _ if letter.is_whitespace() => {
                letters.next();
            }
            '#' => while letters.next_if(|it| *it != '\n').is_some() {},
            '\\' if continues(&letters) => {
                letters.nth(1);
            }
            _ => {
                source.think(TOKEN)?;
                tokens.push(Token::Word(word(&mut letters, source)?));
            }
        }
    }
    Ok(tokens)
}

/// Whether the line goes on in the next one.
fn continues(letters: &Peekable<Chars<'_>>) -> bool {
    letters.clone().nth(1) == Some('\n')
}

fn word(letters: &mut Peekable<Chars<'_>>, source: &Source) -> Result<Word, Fault> {
    let mut word = Word::default();
    while let Some(&letter) = letters.peek() {
        match letter {
            ';' => break,
            _ if letter.is_whitespace() => break,
            '\'' => {
                letters.next();
                word.quoted = true;
                loop {
                    match letters.next().ok_or("a quote does not end")? {
                        '\'' => break,
                        letter => word.push(letter),
                    }
                }
            }
            '"' => {
                letters.next();
                word.quoted = true;
                in_quotes(letters, &mut word, source)?;
            }
            '\\' => {
                letters.next();
                match letters.next() {
                    Some('\n') | None => {}
                    Some(letter) => {
                        word.quoted = true;
                        word.push(letter);
                    }
                }
            }
            '$' => {
                letters.next();
                variable(letters, &mut word, false, source)?;
            }
            _ => {
                letters.next();
                word.push(letter);
            }
        }
    }
    Ok(word)
}

fn in_quotes(letters: &mut Peekable<Chars<'_>>, word: &mut Word, source: &Source) -> Result<(), Fault> {
    loop {
        match letters.next().ok_or("a quote does not end")? {
            '"' => return Ok(()),
            '\\' => match letters.next().ok_or("a quote does not end")? {
                '\n' => {}
                letter @ ('"' | '\\' | '$') => word.push(letter),
                letter => {
                    word.push('\\');
                    word.push(letter);
                }
            },
            '$' => variable(letters, word, true, source)?,
            letter => word.push(letter),
        }
    }
}

/// What follows a dollar.
fn variable(
    letters: &mut Peekable<Chars<'_>>,
    word: &mut Word,
    quoted: bool,
    source: &Source,
) -> Result<(), ReadError> {
    // It, and the text behind it.
    source.think(2 * PART)?;
    let is_name = |it: &char| it.is_ascii_alphanumeric() || *it == '_';
    let mut name = String::new();
    if letters.next_if_eq(&'{').is_some() {
        while let Some(letter) = letters.next_if(|it| *it != '}' && *it != '\n') {
            name.push(letter);
        }
        letters.next_if_eq(&'}');
    } else if let Some(letter) =
        letters.next_if(|it| matches!(it, '?' | '#' | '*' | '@') || it.is_ascii_digit())
    {
        name.push(letter);
    } else {
        while let Some(letter) = letters.next_if(is_name) {
            name.push(letter);
        }
    }
    if name.is_empty() {
        word.push('$');
    } else {
        word.parts.push(Part::Variable { name, quoted });
    }
    Ok(())
}
