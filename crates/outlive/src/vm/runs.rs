//! How a host tells another one which VM it runs. The words are a refusal's, so every release can show them.

use std::fmt;

const BEGINS: &str = "this host RUNS the VM ";
const ID: &str = " (id ";
const GENERATION: &str = ", generation ";
const ENDS: &str = ") and protects no other";

/// A VM that runs on the host that says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Runs {
    /// Its name. Several VMs may have the same one.
    pub(crate) name: String,
    /// Its id.
    pub(crate) id: String,
    /// The generation in which it runs there.
    pub(crate) generation: u64,
}

impl fmt::Display for Runs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, id, generation } = self;
        write!(f, "{BEGINS}{name}{ID}{id}{GENERATION}{generation}{ENDS}")
    }
}

impl Runs {
    /// What a host says that it runs. `None` if it says something else.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let said = text.strip_prefix(BEGINS)?.strip_suffix(ENDS)?;
        // From the end: the name is what a stranger may have chosen.
        let (said, generation) = said.rsplit_once(GENERATION)?;
        let (name, id) = said.rsplit_once(ID)?;
        Some(Self { name: name.to_owned(), id: id.to_owned(), generation: generation.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_host_says_is_understood_whatever_the_name() {
        for name in ["server", "a (id b, generation 3) and protects no other", " (id ", ""] {
            let runs = Runs { name: name.into(), id: "00ff".into(), generation: 7 };
            assert_eq!(Runs::parse(&runs.to_string()), Some(runs));
        }
        for other in
            ["", "another primary is attached", BEGINS, "this host RUNS the VM a) and protects no other"]
        {
            assert_eq!(Runs::parse(other), None, "{other}");
        }
        let huge = format!("{BEGINS}a{ID}b{GENERATION}99999999999999999999{ENDS}");
        assert_eq!(Runs::parse(&huge), None);
    }
}
