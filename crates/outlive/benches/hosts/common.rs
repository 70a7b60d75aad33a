//! What the benches of the whole product share: how much is measured, and rows.

use outlive::events::{Event, Stats};

use crate::support::{Client, Process, Value};

/// More writes than any guest gets to.
pub(crate) const NO_LIMIT: u64 = 1_000_000_000;

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Amount {
    /// Enough for a figure that somebody will read.
    Full,
    /// A look.
    Quick,
    /// So little that it only shows that the bench does not rot: under `cargo test`.
    Smoke,
}

/// What each of these amounts is for a bench.
pub(crate) struct Scales<S> {
    pub(crate) full: S,
    pub(crate) quick: S,
    pub(crate) smoke: S,
}

impl<S> Scales<S> {
    pub(crate) fn of(&self, amount: Amount) -> &S {
        match amount {
            Amount::Full => &self.full,
            Amount::Quick => &self.quick,
            Amount::Smoke => &self.smoke,
        }
    }
}

/// The newest counters of a primary. They come five times a second.
pub(crate) fn stats(primary: &mut Process) -> Stats {
    let newest = primary.events().filter_map(|event| match event {
        Event::Stats(stats) => Some(stats.clone()),
        _ => None,
    });
    newest.last().unwrap_or_default()
}

/// Writes of the guest since its load was set.
pub(crate) fn writes(client: &mut Client) -> u64 {
    let Ok(Value::Array(fields)) = client.ask("WORK STAT") else { panic!("no statistics") };
    let at = fields.iter().position(|it| *it == Value::Bulk(Some("writes".into()))).expect("a field");
    let Value::Integer(writes) = fields[at + 1] else { panic!("not a number: {:?}", fields[at + 1]) };
    writes as u64
}

/// The value in the middle. Panics if there is none.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    quantile(values, 0.5)
}

/// The value below which this share of the others is. Panics if there is none.
pub(crate) fn quantile(values: impl IntoIterator<Item = f64>, share: f64) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values[((values.len() as f64 * share) as usize).min(values.len() - 1)]
}

/// A row, as every bench of the project writes it. `case` is a JSON object.
pub(crate) fn row(
    bench: &str,
    case: &str,
    (value, unit): (f64, &str),
    (peer, peer_value): (&str, f64),
) -> String {
    format!(
        "{{\"bench\":\"{bench}\",\"case\":{case},\"value\":{value:.3},\"unit\":\"{unit}\",\"peer\":\"{peer}\",\"peer_value\":{peer_value:.3}}}\n"
    )
}
