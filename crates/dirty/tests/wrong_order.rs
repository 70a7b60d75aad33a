//! An epoch whose steps are in the wrong order does not compile, for the intended reason.
//!
//! The messages beside the sources are those of the compiler that the workspace is written for. To write them
//! anew: `TRYBUILD=overwrite cargo test -p outlive-dirty --test wrong_order`.

use std::process::Command;

/// The compiler whose messages are beside the sources.
const MESSAGES: &str = "1.95";

#[test]
fn does_not_compile() {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = Command::new(rustc).arg("--version").output().expect("rustc");
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    if !version.starts_with(&format!("rustc {MESSAGES}")) {
        // Each compiler has its own messages. The compile_fail examples of `Epoch` still run.
        println!("skipped: the messages are those of {}, not of {version}", MESSAGES);
        return;
    }
    trybuild::TestCases::new().compile_fail("tests/wrong_order/*.rs");
}
