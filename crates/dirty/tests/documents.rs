//! Documents show what exists.

use std::fs;
use std::path::Path;

/// The documentation tests run the example of README.md.
#[test]
fn the_readme_shows_its_example_as_it_is() {
    let shown = include_str!("../README.md");
    let file = include_str!("../examples/readme.rs");
    let (_, program) = file.split_once("#![allow(unsafe_code)]\n\n").expect("lines for this workspace only");
    assert!(shown.contains(&format!("```rust\n{program}```\n")), "copy examples/readme.rs to README.md");
}

/// Each trap of the kernel is guarded by tests, which docs/dirty-tracking.md names in the last column of its
/// table.
#[test]
fn the_tests_that_guard_against_traps_exist() {
    let crate_ = Path::new(env!("CARGO_MANIFEST_DIR"));
    let Ok(document) = fs::read_to_string(crate_.join("../../docs/dirty-tracking.md")) else {
        println!("skipped: docs/dirty-tracking.md is not in the package");
        return;
    };
    let (_, table) = document.split_once("| guarded by |\n").unwrap();
    let mut sources = String::new();
    read_sources(&crate_.join("src"), &mut sources);
    read_sources(&crate_.join("tests"), &mut sources);
    let rows = table.lines().skip(1).take_while(|line| line.starts_with('|'));
    let mut count = 0;
    for row in rows {
        let guards = row.trim_end_matches(" |").rsplit('|').next().unwrap();
        for name in guards.split('`').skip(1).step_by(2) {
            let defined = [format!("fn {name}("), format!(" {name}: ")].iter().any(|it| sources.contains(it));
            assert!(defined, "docs/dirty-tracking.md names a test {name} that is not there");
            count += 1;
        }
        assert!(guards.contains('`'), "nothing guards: {row}");
    }
    assert!(count > 10);
}

fn read_sources(directory: &Path, text: &mut String) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read_sources(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            *text += &fs::read_to_string(&path).unwrap();
        }
    }
}
