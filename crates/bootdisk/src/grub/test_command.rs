//! GRUB's command `test`, also written `[ ... ]`.

use crate::ReadError;
use crate::versions;

/// What a test asks of the disk.
pub(super) trait Look {
    /// Length of a file, `None` if there is none.
    fn length(&self, path: &str) -> Result<Option<u64>, ReadError>;
    /// Whether there is a directory.
    fn is_directory(&self, path: &str) -> Result<bool, ReadError>;
}

/// Whether the test holds. `-o` binds less than `-a`, which binds less than `!`.
pub(super) fn test(arguments: &[String], look: &dyn Look) -> Result<bool, ReadError> {
    for alternative in arguments.split(|it| it == "-o") {
        let mut all = true;
        for term in alternative.split(|it| it == "-a") {
            all = all && term_holds(term, look)?;
        }
        if all {
            return Ok(true);
        }
    }
    Ok(false)
}

fn term_holds(term: &[String], look: &dyn Look) -> Result<bool, ReadError> {
    let nots = term.iter().take_while(|it| *it == "!").count();
    let holds = match &term[nots..] {
        [] => false,
        [open, inner @ .., close] if open == "(" && close == ")" && inner.len() < term.len() => {
            let inner: Vec<&str> = inner.iter().map(String::as_str).collect();
            plain(&inner, look)?
        }
        words => plain(&words.iter().map(String::as_str).collect::<Vec<_>>(), look)?,
    };
    Ok(holds != (nots % 2 == 1))
}

fn plain(words: &[&str], look: &dyn Look) -> Result<bool, ReadError> {
    Ok(match *words {
        [text] => !text.is_empty(),
        ["-n", text] => !text.is_empty(),
        ["-z", text] => text.is_empty(),
        ["-f", path] => look.length(path)?.is_some(),
        ["-s", path] => look.length(path)?.is_some_and(|length| length > 0),
        ["-e", path] => look.length(path)?.is_some() || look.is_directory(path)?,
        ["-d", path] => look.is_directory(path)?,
        [a, "=" | "==", b] => a == b,
        [a, "!=", b] => a != b,
        [a, "<", b] => a < b,
        [a, ">", b] => a > b,
        [a, "<=", b] => a <= b,
        [a, ">=", b] => a >= b,
        [a, operator, b] if operator.starts_with('-') => {
            let number = |text: &str| text.trim().parse::<i64>().unwrap_or(0);
            match operator {
                "-eq" => number(a) == number(b),
                "-ne" => number(a) != number(b),
                "-lt" => number(a) < number(b),
                "-le" => number(a) <= number(b),
                "-gt" => number(a) > number(b),
                "-ge" => number(a) >= number(b),
                "-pgt" => versions::compare(a, b).is_gt(),
                "-plt" => versions::compare(a, b).is_lt(),
                _ => false,
            }
        }
        _ => false,
    })
}
