//! All fuzz targets in one program: `OUTLIVE_FUZZ_TARGET` says which one runs. `cargo xtask fuzz` builds it
//! with coverage on a stable compiler and gives it time; its `--list` prints the names.
#![no_main]

mod wire;

use std::sync::OnceLock;

type Target = fn(&[u8]);

const TARGETS: [(&str, Target); 17] = [
    ("wire", wire::stream),
    ("message", wire::message),
    ("incoming", wire::incoming),
    ("state", outlive_machine::fuzz::state),
    ("sidecar", outlive::fuzz::sidecar),
    ("journal", outlive::fuzz::journal),
    ("served", outlive::fuzz::served),
    ("metrics", outlive::fuzz::metrics),
    ("disk", outlive_bootdisk::fuzz::disk),
    ("grub", outlive_bootdisk::fuzz::text),
    ("image", outlive_images::fuzz::image),
    ("record", outlive_record::fuzz::record),
    ("kernel", outlive_machine::fuzz::kernel),
    ("console", outlive_machine::fuzz::console),
    ("rng", outlive_machine::fuzz::rng),
    ("net", outlive_machine::fuzz::net),
    ("blk", outlive_machine::fuzz::blk),
];

/// The chosen one. Ends the program if there is no such target.
fn target() -> Target {
    static CHOSEN: OnceLock<Target> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let name = std::env::var("OUTLIVE_FUZZ_TARGET").unwrap_or_default();
        let chosen = TARGETS.iter().find(|target| target.0 == name);
        chosen.map(|target| target.1).unwrap_or_else(|| {
            let names = TARGETS.map(|target| target.0).join(", ");
            eprintln!("'{name}' is no fuzz target; set OUTLIVE_FUZZ_TARGET to one of: {names}");
            std::process::exit(2)
        })
    })
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| target()(data));
