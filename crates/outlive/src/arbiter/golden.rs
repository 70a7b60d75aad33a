//! What releases have written down of claims, in directories and in etcd.

use outlive_epoch::VmId;

use super::record::{self, Marker};
use crate::golden::{self, keeps};

const AT: u64 = 1_769_860_800;

fn vm() -> VmId {
    VmId(*b"0123456789abcdef")
}

#[test]
fn markers_of_both_versions_are_read() {
    let identity = "9c01".repeat(8);
    let newest = keeps("arbiter-marker-v2.txt", &Marker::text(&identity));
    assert_eq!(Marker::parse(&newest), Some(Marker::Current(identity.clone())));
    let old = golden::text("arbiter-marker-v1.txt");
    assert_eq!(Marker::parse(&old), Some(Marker::Old(identity)), "{}", golden::REMEDY);
}

#[test]
fn claims_are_written_as_the_release_before_reads_them() {
    let (owner, process) = ("standby on host hostb\u{7}", "51d0".repeat(8));
    let claim = keeps("arbiter-claim-v1.txt", &record::claim_text(&vm(), 7, owner, &process));
    let dated = keeps("arbiter-claim-at-v1.txt", &record::claim_text_at(&vm(), 7, owner, &process, AT));
    for text in [&claim, &dated] {
        assert_eq!(record::parse_claim(text), Some(("standby on host hostb?", &process[..])));
    }
    assert_eq!((record::parse_at(&claim), record::parse_at(&dated)), (None, Some(AT)));
}

#[test]
fn ends_are_written_as_the_release_before_reads_them() {
    let why = "the guest has switched off";
    let end = keeps("arbiter-end-v1.txt", &record::ended_text(&vm(), 7, why));
    let dated = keeps("arbiter-end-at-v1.txt", &record::ended_text_at(&vm(), 7, why, AT));
    for text in [&end, &dated] {
        assert_eq!(record::parse_ended(text), Some(why));
    }
    assert_eq!(record::parse_at(&dated), Some(AT));
}

/// A name that changes is a claim that nobody finds.
#[test]
fn claims_are_where_the_release_before_looks_for_them() {
    let names = [
        record::MARKER.to_owned(),
        record::vm_name(&vm()),
        record::claim_name(&vm(), 7),
        record::ended_name(&vm(), 7),
        record::pruned_name(&vm(), 5),
    ];
    keeps("arbiter-names-v2.txt", &format!("{}\n", names.join("\n")));
    assert_eq!(record::parse_old_claim_name(&format!("{}.7", vm())), Some((vm(), 7)));
}
