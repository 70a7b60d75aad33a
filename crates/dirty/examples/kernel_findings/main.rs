//! Programs that show where Linux loses dirty pages without a word, or nearly does. docs/kernel-findings.md
//! explains each: `cargo run -p outlive-dirty --example kernel_findings -- all`.
//!
//! They use only system calls and nothing of outlive-dirty, so that they show the kernel's behaviour.

mod early_reset;
#[path = "../common/guest.rs"]
mod guest;
mod initially_set;
mod pinned;
mod reset_signal;
mod ring;
mod walk_end;
mod watch;

use std::error::Error;
use std::process::ExitCode;

type Failure = Box<dyn Error + Send + Sync>;

/// The result of a program.
enum Verdict {
    /// The kernel does it, with the figures.
    Shown(String),
    /// The kernel does it right.
    NotShown(String),
    /// The kernel has no such interface, or this process may not use it.
    Skipped(String),
}

/// A finding: its name, one line about it, and the program.
type Finding = (&'static str, &'static str, fn() -> Result<Verdict, Failure>);

const FINDINGS: [Finding; 5] = [
    (
        "reset-signal",
        "a signal during KVM_RESET_DIRTY_RINGS loses pages that the call has counted",
        reset_signal::run,
    ),
    (
        "initially-set",
        "a dirty ring with KVM_DIRTY_LOG_INITIALLY_SET sees no first write to a page",
        initially_set::run,
    ),
    ("early-reset", "an entry given back before KVM filled it stops the vCPU for ever", early_reset::run),
    ("pinned-write", "PAGEMAP_SCAN misses a write through a page pinned before the scan", pinned::run),
    ("walk-end", "walk_end of PAGEMAP_SCAN is short of the end of a complete scan", walk_end::run),
];

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if wanted.is_empty() || wanted.iter().any(|word| word == "-h" || word == "--help") {
        println!("Usage: kernel_findings all | NAME...\n\nNames:");
        FINDINGS.iter().for_each(|(name, about, _)| println!("  {name:14} {about}"));
        println!(
            "\nEach says \"shown\", \"not shown on this kernel\" or \"skipped\"; the exit code is 0 for all three."
        );
        return ExitCode::SUCCESS;
    }
    let known = |word: &String| word == "all" || FINDINGS.iter().any(|finding| finding.0 == word);
    if let Some(word) = wanted.iter().find(|word| !known(word)) {
        eprintln!("kernel_findings: there is no finding {word:?}; without a name it lists them");
        return ExitCode::from(2);
    }
    println!("kernel {}", kernel());
    let mut code = ExitCode::SUCCESS;
    for (name, about, run) in FINDINGS {
        if !wanted.iter().any(|word| word == "all" || word == name) {
            continue;
        }
        let (verdict, figures) = match run() {
            Ok(Verdict::Shown(figures)) => ("shown", figures),
            Ok(Verdict::NotShown(figures)) => ("not shown on this kernel", figures),
            Ok(Verdict::Skipped(why)) => ("skipped", why),
            Err(error) => {
                code = ExitCode::FAILURE;
                ("failed", error.to_string())
            }
        };
        println!("{name}: {verdict}: {about}\n    {}", figures.replace('\n', "\n    "));
    }
    code
}

fn kernel() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let (release, version) = (read("/proc/sys/kernel/osrelease"), read("/proc/sys/kernel/version"));
    format!("{} {}", release.trim(), version.trim())
}
