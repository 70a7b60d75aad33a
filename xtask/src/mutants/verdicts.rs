//! Verdicts of a run that was ended before it was through, so that the next one goes on from there.
//!
//! A line for each verdict in `target/mutants/verdicts`, below a line with the sum of the programs that gave them: those
//! of other programs count no more.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Mutex;

use super::nursery::{Round, Verdict};

/// See the module.
pub(super) struct Verdicts {
    known: BTreeMap<(u32, Round), Verdict>,
    file: Mutex<File>,
}

impl Verdicts {
    /// Reads what these programs have said before; with `again` it is forgotten.
    ///
    /// # Errors
    /// The file cannot be written, or a program cannot be read.
    pub(super) fn open(path: &Path, programs: &[&Path], again: bool) -> io::Result<Self> {
        let sum = sum(programs)?;
        let text = fs::read_to_string(path).unwrap_or_default();
        let (head, lines) = text.split_once('\n').unwrap_or_default();
        let keep = head == sum && !again;
        let known = if keep { lines.lines().filter_map(parse).collect() } else { BTreeMap::new() };
        let mut file = File::options().create(true).append(true).open(path)?;
        if !keep {
            file.set_len(0)?;
            writeln!(file, "{sum}")?;
        }
        Ok(Self { known, file: Mutex::new(file) })
    }

    /// What an earlier run has said of a change.
    pub(super) fn known(&self, number: u32, round: Round) -> Option<Verdict> {
        self.known.get(&(number, round)).copied()
    }

    /// Keeps a verdict for the next run.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(super) fn keep(&self, number: u32, round: Round, verdict: Verdict) -> io::Result<()> {
        // One write, so that a run that is ended leaves whole lines.
        self.file.lock().unwrap().write_all(format!("{number} {round:?} {verdict:?}\n").as_bytes())
    }
}

fn sum(programs: &[&Path]) -> io::Result<String> {
    let mut hasher = DefaultHasher::new();
    programs.iter().try_for_each(|program| {
        fs::read(program)?.hash(&mut hasher);
        io::Result::Ok(())
    })?;
    Ok(format!("{:016x}", hasher.finish()))
}

fn parse(line: &str) -> Option<((u32, Round), Verdict)> {
    let [number, round, verdict] = line.split(' ').collect::<Vec<_>>().try_into().ok()?;
    let round = [Round::Quick, Round::Thorough].into_iter().find(|it| format!("{it:?}") == round)?;
    let verdict =
        [Verdict::Noticed, Verdict::Unnoticed].into_iter().find(|it| format!("{it:?}") == verdict)?;
    Some(((number.parse().ok()?, round), verdict))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_same_programs_said_is_known_and_what_others_said_is_not() {
        let directory = std::env::temp_dir().join(format!("outlive-verdicts-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let [path, program] = ["verdicts", "program"].map(|name| directory.join(name));
        let open = |again| Verdicts::open(&path, &[&program], again).unwrap();
        fs::write(&program, "one").unwrap();
        let first = open(false);
        assert_eq!(first.known(7, Round::Quick), None);
        first.keep(7, Round::Quick, Verdict::Unnoticed).unwrap();
        first.keep(8, Round::Thorough, Verdict::Noticed).unwrap();

        let second = open(false);
        assert_eq!(second.known(7, Round::Quick), Some(Verdict::Unnoticed));
        assert_eq!(second.known(7, Round::Thorough), None);
        assert_eq!(second.known(8, Round::Thorough), Some(Verdict::Noticed));
        fs::write(&path, fs::read_to_string(&path).unwrap() + "9 Quick Noti").unwrap();
        assert_eq!(open(false).known(9, Round::Quick), None);

        fs::write(&program, "another").unwrap();
        assert_eq!(open(false).known(7, Round::Quick), None);
        fs::write(&program, "one").unwrap();
        assert_eq!(open(false).known(7, Round::Quick), None, "of another program");
        open(false).keep(7, Round::Quick, Verdict::Noticed).unwrap();
        assert_eq!(open(true).known(7, Round::Quick), None);
        fs::remove_dir_all(&directory).unwrap();
    }
}
