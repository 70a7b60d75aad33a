//! Changes that no test needs to notice, because they change nothing that matters: a table in the docs.

use std::collections::BTreeMap;
use std::path::Path;

use super::{Mutant, read};
use crate::run::StepError;

/// File, what is there, and what it is changed to.
type Change = (String, String, String);

/// What is known; see the module.
pub(super) struct Known(BTreeMap<Change, String>);

impl Known {
    /// Reads `docs/mutants.md`.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn read(root: &Path) -> Result<Self, StepError> {
        Ok(Self::parse(&read(&root.join("docs/mutants.md"))?))
    }

    /// Rows of four cells: file, what is there, what it is changed to, and the reason. A bar in code is written `\|`.
    fn parse(text: &str) -> Self {
        let rows = text.lines().filter_map(|line| {
            let line = line.trim().strip_prefix("| `")?.replace("\\|", "\0");
            let mut cells = line.split('|').map(|cell| cell.trim().trim_matches('`').replace('\0', "|"));
            Some(((cells.next()?, cells.next()?, cells.next()?), cells.next()?))
        });
        Self(rows.collect())
    }

    /// Why no test notices this change, if that is known.
    pub(super) fn reason(&self, mutant: &Mutant) -> Option<&str> {
        let change = (mutant.file.to_owned(), mutant.before.clone(), mutant.after.clone());
        self.0.get(&change).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutants::Sources;
    use crate::run::Workspace;

    #[test]
    fn a_row_is_a_change_with_its_reason() {
        let known = Known::parse(
            "text\n| file | from | to | why |\n|---|---|---|---|\n| `a.rs` | `x \\|\\| y` | `x && y` | as good |\n",
        );
        let mutant = |after: &str| Mutant {
            number: 1,
            file: "a.rs",
            line: 7,
            before: "x || y".into(),
            after: after.into(),
        };
        assert_eq!(known.reason(&mutant("x && y")), Some("as good"));
        assert_eq!(known.reason(&mutant("x")), None);
    }

    /// What is no longer in the sources would be taken for a reason that still holds.
    #[test]
    fn the_docs_speak_of_changes_that_can_be_made() {
        let root = Workspace::find().root;
        let known = Known::read(&root).unwrap();
        let mutants = Sources::read(&root).unwrap().mutants();
        for (file, before, after) in known.0.keys() {
            let found =
                mutants.iter().any(|it| it.file == file && it.before == *before && it.after == *after);
            assert!(found, "docs/mutants.md: nothing in {file} is changed from {before} to {after}");
        }
    }
}
