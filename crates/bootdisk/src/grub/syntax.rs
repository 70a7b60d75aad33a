//! The syntax of GRUB's scripts.

use std::rc::Rc;

use super::words::{Fault, Token, Word, tokens};
use crate::source::Source;

/// How deep blocks may be within each other.
const DEPTH: usize = 32;
/// Most commands of a script.
const COMMANDS: usize = 50_000;

/// A command and what belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Simple(Vec<Word>),
    If {
        branches: Vec<(Script, Script)>,
        otherwise: Script,
    },
    While {
        until: bool,
        condition: Script,
        body: Script,
    },
    For {
        name: String,
        words: Vec<Word>,
        body: Script,
    },
    Function {
        name: String,
        body: Script,
    },
    /// `menuentry` or `submenu`.
    Entry {
        submenu: bool,
        words: Vec<Word>,
        body: Script,
    },
}

/// Commands in their order.
pub(super) type Script = Rc<[Command]>;

/// Parses a script.
///
/// # Errors
/// What is wrong with it, or more than there may be. A command costs no more than its words do.
pub(super) fn parse(text: &str, source: &Source) -> Result<Script, Fault> {
    let mut parser = Parser { tokens: tokens(text, source)?.into_iter().peekable(), depth: 0, commands: 0 };
    let script = parser.script(&[])?;
    if parser.tokens.peek().is_some() { Err("a block ends that has not begun".into()) } else { Ok(script) }
}

struct Parser {
    tokens: std::iter::Peekable<std::vec::IntoIter<Token>>,
    depth: usize,
    commands: usize,
}

const CUT: &str = "it ends within a block";

impl Parser {
    /// Commands until one of these keywords, which stays, or the end.
    fn script(&mut self, until: &[&str]) -> Result<Script, &'static str> {
        self.depth += 1;
        if self.depth > DEPTH {
            return Err("its blocks are too deep");
        }
        let mut commands = Vec::new();
        loop {
            while self.tokens.next_if_eq(&Token::End).is_some() {}
            let Some(Token::Word(word)) = self.tokens.peek() else { break };
            if word.plain().is_some_and(|it| until.contains(&it) || it == "}") {
                break;
            }
            self.commands += 1;
            if self.commands > COMMANDS {
                return Err("it has too many commands");
            }
            commands.push(self.command()?);
        }
        self.depth -= 1;
        Ok(commands.into())
    }

    fn command(&mut self) -> Result<Command, &'static str> {
        let Some(Token::Word(first)) = self.tokens.next() else { return Err(CUT) };
        match first.plain() {
            Some("if") => self.conditions(),
            Some(word @ ("while" | "until")) => {
                let until = word == "until";
                let condition = self.script(&["do"])?;
                Ok(Command::While { until, condition, body: self.body()? })
            }
            Some("for") => {
                let name = self.name()?;
                self.keyword("in")?;
                let words = self.words();
                while self.tokens.next_if_eq(&Token::End).is_some() {}
                Ok(Command::For { name, words, body: self.body()? })
            }
            Some("function") => {
                let name = self.name()?;
                Ok(Command::Function { name, body: self.block()? })
            }
            Some(word @ ("menuentry" | "submenu")) => {
                let submenu = word == "submenu";
                let words = self.words_until_block();
                Ok(Command::Entry { submenu, words, body: self.block()? })
            }
            _ => {
                let mut words = vec![first];
                words.extend(self.words());
                Ok(Command::Simple(words))
            }
        }
    }

    fn conditions(&mut self) -> Result<Command, &'static str> {
        let mut branches = Vec::new();
        loop {
            let condition = self.script(&["then"])?;
            self.keyword("then")?;
            branches.push((condition, self.script(&["elif", "else", "fi"])?));
            match self.name()?.as_str() {
                "elif" => {}
                "else" => {
                    let otherwise = self.script(&["fi"])?;
                    self.keyword("fi")?;
                    return Ok(Command::If { branches, otherwise });
                }
                "fi" => return Ok(Command::If { branches, otherwise: Rc::new([]) }),
                _ => return Err(CUT),
            }
        }
    }

    fn body(&mut self) -> Result<Script, &'static str> {
        self.keyword("do")?;
        let body = self.script(&["done"])?;
        self.keyword("done")?;
        Ok(body)
    }

    fn block(&mut self) -> Result<Script, &'static str> {
        while self.tokens.next_if_eq(&Token::End).is_some() {}
        self.keyword("{")?;
        let body = self.script(&["}"])?;
        self.keyword("}")?;
        Ok(body)
    }

    fn keyword(&mut self, keyword: &str) -> Result<(), &'static str> {
        match self.tokens.next() {
            Some(Token::Word(word)) if word.plain() == Some(keyword) => Ok(()),
            _ => Err("a block is not as it should be"),
        }
    }

    fn name(&mut self) -> Result<String, &'static str> {
        match self.tokens.next() {
            Some(Token::Word(word)) => word.plain().map(str::to_owned).ok_or("a name is missing"),
            _ => Err(CUT),
        }
    }

    /// The rest of the line.
    fn words(&mut self) -> Vec<Word> {
        let mut words = Vec::new();
        while let Some(Token::Word(word)) = self.tokens.next_if(|it| matches!(it, Token::Word(_))) {
            words.push(word);
        }
        words
    }

    fn words_until_block(&mut self) -> Vec<Word> {
        let is_word = |it: &Token| matches!(it, Token::Word(word) if word.plain() != Some("{"));
        let mut words = Vec::new();
        while let Some(Token::Word(word)) = self.tokens.next_if(is_word) {
            words.push(word);
        }
        words
    }
}
