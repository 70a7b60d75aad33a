//! Command lines as a shell reads them, as far as documents use it.

/// Words of simple commands, of which a line may have several.
pub(crate) type Commands = Vec<Vec<String>>;

/// The commands of a line: split at `&&`, `||`, `|` and `;`, without redirections and comments.
///
/// # Errors
/// A quote has no end.
pub(crate) fn commands(line: &str) -> Result<Commands, String> {
    let mut all: Commands = vec![Vec::new()];
    let mut words = words(line)?.into_iter();
    while let Some(Word { text, bare }) = words.next() {
        if bare && [">", ">>", "<"].contains(&text.as_str()) {
            // And the file.
            words.next();
        } else if bare && ["&&", "||", "|", ";"].contains(&text.as_str()) {
            all.push(Vec::new());
        } else if !(bare && ["<", ">", "2>"].iter().any(|it| text.starts_with(it))) {
            let ends = bare && text.ends_with(';');
            all.last_mut()
                .expect("there is one")
                .push(text.trim_end_matches(if ends { ";" } else { "" }).into());
            if ends {
                all.push(Vec::new());
            }
        }
    }
    all.retain(|words| !words.is_empty());
    Ok(all)
}

/// A word, and whether nothing in it was quoted.
struct Word {
    text: String,
    bare: bool,
}

fn words(line: &str) -> Result<Vec<Word>, String> {
    let mut words: Vec<Word> = Vec::new();
    let mut word: Option<Word> = None;
    let mut rest = line.chars().peekable();
    while let Some(it) = rest.next() {
        match it {
            _ if it.is_whitespace() => words.extend(word.take()),
            // A comment. With a letter behind it, it is one all the same.
            '#' if word.is_none() => break,
            '\'' | '"' => {
                let word = word.get_or_insert_with(|| Word { text: String::new(), bare: false });
                word.bare = false;
                loop {
                    match rest.next() {
                        None => return Err(format!("a quote has no end: {line}")),
                        Some(end) if end == it => break,
                        Some(inner) => word.text.push(inner),
                    }
                }
            }
            _ => {
                let word = word.get_or_insert_with(|| Word { text: String::new(), bare: true });
                let it = if it == '\\' { rest.next().unwrap_or('\\') } else { it };
                word.text.push(it);
            }
        }
    }
    words.extend(word);
    Ok(words)
}

#[test]
fn lines_are_read_as_a_shell_does() {
    let read = |line: &str| commands(line).unwrap();
    assert_eq!(read("a 'b c' d=\"e f\" \\# # g"), [["a", "b c", "d=e f", "#"]]);
    assert_eq!(read("a && b | c; d </dev/null 2>x"), [vec!["a"], vec!["b"], vec!["c"], vec!["d"]]);
    assert_eq!(read("a b > c d"), [["a", "b", "d"]]);
    assert_eq!(read("a on|off '&&'"), [["a", "on|off", "&&"]]);
    assert_eq!(read("# nothing"), [] as [Vec<String>; 0]);
    assert!(commands("a 'b").is_err());
}
