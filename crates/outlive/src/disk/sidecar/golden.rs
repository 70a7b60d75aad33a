//! The sidecars that releases have written.

use outlive_epoch::Lineage;

use super::{Role, Sidecar};
use crate::disk::provenance::{Accepted, DangerKind, KnownArbiter, Provenance};
use crate::disk::stamp::Stamp;
use crate::golden;

/// What a sidecar of today can say at most.
fn full() -> (Sidecar, Stamp) {
    let sidecar = Sidecar {
        accepted: vec![Accepted {
            danger: DangerKind::StaleImage,
            at: "2026-01-30T12:00:00Z".into(),
            host: "hostb".into(),
            about: "generation 4 was given up".into(),
        }],
        ..super::tests::sidecar()
    };
    let stamp = toml::from_str("bytes = 8589934592\nfile = \"2621443-1769860800000000000\"\n").unwrap();
    (sidecar, stamp)
}

#[test]
fn the_newest_sidecar_is_written_as_the_release_before_reads_it() {
    let (sidecar, stamp) = full();
    let written = sidecar.text_of(Some(stamp.clone()), "hostb", "2026-01-31T12:00:00Z").unwrap();
    let golden = golden::keeps("sidecar-v2.toml", &written);
    assert_eq!(Sidecar::parse(&golden), Ok((sidecar, Some(stamp))));
}

#[test]
fn the_shortest_sidecar_is_written_as_the_release_before_reads_it() {
    let (full, _) = full();
    let provenance =
        Provenance { arbiter: KnownArbiter::None, lineage: Lineage::default(), ..full.provenance };
    let (earlier, accepted) = (Vec::new(), Vec::new());
    let bare = Sidecar { provenance, role: Role::Primary, end: None, journal: None, disks: None, ..full };
    let bare = Sidecar { process: None, earlier, accepted, ..bare };
    let golden =
        golden::keeps("sidecar-v2-bare.toml", &bare.text_of(None, "hosta", "2026-01-31T12:00:00Z").unwrap());
    assert_eq!(Sidecar::parse(&golden), Ok((bare, None)));
}

/// Version 1 was before there were arbiters.
#[test]
fn the_first_sidecars_are_read() {
    let (full, _) = full();
    let provenance = Provenance {
        vm: full.provenance.vm,
        name: String::new(),
        arbiter: KnownArbiter::Unsaid,
        lineage: Lineage::default(),
    };
    let (earlier, accepted) = (Vec::new(), Vec::new());
    let first = Sidecar { provenance, end: None, disks: None, process: None, earlier, accepted, ..full };
    assert_eq!(Sidecar::parse(&golden::text("sidecar-v1.txt")), Ok((first, None)), "{}", golden::REMEDY);
}
