//! Questions and answers with any content.

use std::fmt::Debug;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::protocol::{Answer, LONGEST_ANSWER, LONGEST_QUESTION, Question, hear, say};
use crate::arbiter::{Ending, Win, record};

/// More than a word in memory takes.
const TIME: Duration = Duration::from_secs(60);

/// What a host, an arbiter or a stranger says. Nothing panics; what is understood is said again in the same words, and
/// what becomes a path or a line of a file can be nothing else.
///
/// # Panics
/// If it is not so.
pub fn served(data: &[u8]) {
    // As it comes from the network: a line, and whatever follows.
    if let Some(question) = understood::<Question>(data, LONGEST_QUESTION)
        && let Some(vm) = question.ask.vm()
    {
        let name = record::vm_name(vm);
        assert_eq!(record::parse_vm_name(&name), Some(*vm), "{name} is a path of its own");
    }
    match understood::<Answer>(data, LONGEST_ANSWER) {
        Some(Answer::History { wins }) => wins.into_iter().for_each(|win| drop(Win::from(win))),
        Some(Answer::Ending { ending: Some(ending) }) => drop(Ending::from(ending)),
        _ => {}
    }
}

fn understood<T: DeserializeOwned + Serialize + Debug>(mut data: &[u8], longest: usize) -> Option<T> {
    let heard: T = hear(&mut data, longest, Instant::now() + TIME).ok()?;
    let (mut said, mut again) = (Vec::new(), Vec::new());
    say(&mut said, &heard).expect("what was heard can be said");
    // Escapes may make it longer than it was.
    let same: T = hear(&mut said.as_slice(), 6 * longest, Instant::now() + TIME).expect("and heard again");
    say(&mut again, &same).expect("and said again");
    assert_eq!(said, again, "{heard:?}");
    Some(heard)
}
