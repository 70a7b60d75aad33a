//! Builds the payload (a workspace of its own, for no operating system) and hands the image to the library.
//!
//! The inner build must not see how the outer one is built: flags such as `--cfg loom` or
//! `-Cinstrument-coverage`, a compiler wrapper or a target directory would break it or deadlock with it. So
//! their variables are removed, and the payload's own .cargo/config.toml says how it is built.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let dir = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let payload = dir.join("payload");
    for input in ["src", "build.rs", "link.ld", "Cargo.toml", "Cargo.lock", ".cargo/config.toml"] {
        println!("cargo:rerun-if-changed={}", payload.join(input).display());
    }
    println!("cargo:rerun-if-changed={}", dir.join("src/abi.rs").display());
    println!("cargo:rerun-if-changed=build.rs");

    let target_dir = out.join("payload-target");
    let image = target_dir.join(TARGET).join("release/outlive-payload");
    if let Err(reason) = build(&payload, &target_dir) {
        println!("cargo::error=the payload guest in {} did not build: {reason}", payload.display());
        exit(1);
    }
    println!("cargo:rustc-env=OUTLIVE_PAYLOAD_IMAGE={}", image.display());
}

/// Runs cargo in the payload's workspace.
fn build(payload: &Path, target_dir: &Path) -> Result<(), String> {
    let cargo = env::var_os("CARGO").expect("cargo sets CARGO");
    let mut command = Command::new(&cargo);
    command.current_dir(payload).args(["build", "--release", "--locked", "--target", TARGET, "--target-dir"]);
    command.arg(target_dir);
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(belongs_to_outer_build) {
            command.env_remove(&name);
        }
    }
    let output = command.output().map_err(|error| format!("{} does not start: {error}", cargo.display()))?;
    if output.status.success() {
        return Ok(());
    }
    eprintln!("{}", String::from_utf8_lossy(&output.stderr));
    let last = String::from_utf8_lossy(&output.stderr);
    let first_error =
        last.lines().find(|line| line.starts_with("error")).unwrap_or("see its output above").to_owned();
    Err(format!("{first_error} ({})", output.status))
}

/// True for variables that carry the outer build's choices. CARGO_HOME, CARGO_NET_* and the job server stay.
fn belongs_to_outer_build(name: &str) -> bool {
    const EXACT: [&str; 8] = [
        "RUSTFLAGS",
        "RUSTDOCFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_ENCODED_RUSTDOCFLAGS",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_TARGET_DIR",
        "LLVM_PROFILE_FILE",
    ];
    const PREFIXES: [&str; 6] =
        ["CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_TARGET_", "CARGO_CFG_", "CARGO_FEATURE_", "SMOLTCP_"];
    EXACT.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}
