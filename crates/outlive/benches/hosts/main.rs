//! Benches of the whole product, with both hosts on this machine: `cargo xtask bench NAME`, or
//! `cargo bench -p outlive --bench hosts -- NAME [--quick] [--json FILE]`. One program, as each needs the product and
//! what the tests make hosts of.
//!
//! `cargo test` runs a little of each.

// As in the tests, of which each bench uses a part.
#[allow(dead_code, unused_imports)]
#[path = "../../tests/survive/support/mod.rs"]
mod support;

mod clients;
mod common;
mod guest;
mod hand_over;
mod link;
mod rate;
mod record;

use std::fs::File;
use std::io::Write;
use std::process::ExitCode;

use common::Amount;

/// Measures, and adds rows. `None`: this machine cannot run it, which it has said.
type Bench = fn(Amount, &mut String) -> Option<()>;

const BENCHES: [(&str, Bench); 6] = [
    ("guest", guest::run),
    ("clients", clients::run),
    ("rate", rate::run),
    ("link", link::run),
    ("record", record::run),
    ("hand-over", hand_over::run),
];

/// An option of this name has a value.
const WITH_VALUE: [&str; 2] = ["--json", "--count"];

/// The value of an option.
fn option(name: &str) -> Option<String> {
    std::env::args().skip_while(|it| it != name).nth(1)
}

/// The first word that is neither an option nor the value of one.
fn word() -> Option<String> {
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if WITH_VALUE.contains(&argument.as_str()) {
            arguments.next();
        } else if !argument.starts_with('-') {
            return Some(argument);
        }
    }
    None
}

fn main() -> ExitCode {
    let has = |option: &str| std::env::args().any(|it| it == option);
    if has("--list") {
        BENCHES.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let amount = match (has("--bench"), has("--quick")) {
        (false, _) => Amount::Smoke,
        (true, true) => Amount::Quick,
        (true, false) => Amount::Full,
    };
    let wanted = word();
    if let Some(name) = wanted.as_ref().filter(|_| amount != Amount::Smoke)
        && !BENCHES.iter().any(|(bench, _)| bench == name)
    {
        eprintln!("bench: there is no '{name}', but: {}", BENCHES.map(|(name, _)| name).join(", "));
        return ExitCode::from(2);
    }
    let mut rows = String::new();
    for (name, bench) in BENCHES {
        // The name of a bench, or under `cargo test` a part of it.
        let is_wanted = wanted.as_ref().is_none_or(|word| match amount {
            Amount::Smoke => name.contains(word),
            _ => name == word,
        });
        if is_wanted && bench(amount, &mut rows).is_none() {
            // Under `cargo test` that is no failure.
            return if amount == Amount::Smoke { ExitCode::SUCCESS } else { ExitCode::from(2) };
        }
    }
    let written = option("--json").map(|file| File::create(file)?.write_all(rows.as_bytes()));
    match written.transpose() {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::from(2)
        }
    }
}
