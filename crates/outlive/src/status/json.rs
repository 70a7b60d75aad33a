//! JSON for people who read it: a list within an object is one line, however long it is.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter};

/// The text of a value, in lines.
///
/// # Errors
/// When the value cannot be JSON.
pub(super) fn text(value: &impl Serialize) -> serde_json::Result<String> {
    let mut text = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut text, Lines::default()))?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[derive(Default)]
struct Lines {
    pretty: PrettyFormatter<'static>,
    /// How many lists are open. What is in more than one is in one line.
    lists: usize,
}

impl Lines {
    fn formatter(&mut self) -> Either<'_> {
        if self.lists > 1 { Either::Compact } else { Either::Pretty(&mut self.pretty) }
    }
}

enum Either<'a> {
    Compact,
    Pretty(&'a mut PrettyFormatter<'static>),
}

macro_rules! by_either {
    ($($name:ident($($argument:ident: $kind:ty),*);)*) => {$(
        fn $name<W: ?Sized + Write>(&mut self, writer: &mut W $(, $argument: $kind)*) -> io::Result<()> {
            match self.formatter() {
                Either::Compact => CompactFormatter.$name(writer $(, $argument)*),
                Either::Pretty(pretty) => pretty.$name(writer $(, $argument)*),
            }
        }
    )*};
}

impl Formatter for Lines {
    by_either! {
        begin_array_value(first: bool);
        end_array_value();
        begin_object();
        end_object();
        begin_object_key(first: bool);
        begin_object_value();
        end_object_value();
    }

    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.lists += 1;
        match self.formatter() {
            Either::Compact => CompactFormatter.begin_array(writer),
            Either::Pretty(pretty) => pretty.begin_array(writer),
        }
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        let ended = match self.formatter() {
            Either::Compact => CompactFormatter.end_array(writer),
            Either::Pretty(pretty) => pretty.end_array(writer),
        };
        self.lists -= 1;
        ended
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_list_in_an_object_is_one_line() {
        let value =
            json!([{ "a": 1, "b": { "c": [1, 2, 3], "d": [{ "e": [], "f": "x" }] }, "g": [] }, {}, 7]);
        let text = text(&value).unwrap();
        let lines = r#"[
  {
    "a": 1,
    "b": {
      "c": [1,2,3],
      "d": [{"e":[],"f":"x"}]
    },
    "g": []
  },
  {},
  7
]"#;
        assert_eq!(text, lines);
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }
}
