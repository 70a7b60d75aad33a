//! Certificates and lists that releases have made: hosts keep them for a year and longer.

use std::path::Path;

use outlive_epoch::VmId;

use super::certificate::Certificate;
use super::grant::{Grant, Vms};
use super::load;
use super::revoked::Revoked;
use crate::golden::{self, keeps};

const SERIAL: &str = "671fedb9974049f535125c89121814d3";

/// Release 0.2.0 has made it: `outlive keys issue --host hostb --vm ... --hold`.
#[test]
fn a_certificate_of_the_release_before_is_read() {
    let pem = golden::text("certificate.pem");
    let der = load::certificates(Path::new("certificate.pem"), pem.as_bytes()).unwrap().swap_remove(0);
    let read = Certificate::of_host(&der).unwrap();
    let grant = Grant { send: Vms::NONE, hold: Vms::Only(vec![VmId(*b"0123456789abcdef")]), ..Grant::NONE };
    assert_eq!(
        (&read.name[..], &read.serial[..], &read.grant),
        ("hostb", SERIAL, &grant),
        "{}",
        golden::REMEDY
    );
}

/// A right of another name is none for the release before.
#[test]
fn rights_are_written_as_the_release_before_reads_them() {
    let vm = VmId(*b"0123456789abcdef");
    let grants = [Grant::ALL, Grant { send: Vms::NONE, hold: Vms::Only(vec![vm]), ..Grant::NONE }];
    let names = grants.each_ref().map(Grant::to_names).concat();
    let golden = keeps("rights.txt", &format!("{}\n", names.join("\n")));
    let (any, one) = golden.split_at(golden.match_indices('\n').nth(1).unwrap().0);
    for (grant, names) in grants.iter().zip([any, one]) {
        assert_eq!(Grant::from_names(names.lines()), *grant);
    }
}

#[test]
fn a_list_of_the_release_before_is_read() {
    let list = Revoked::parse(&golden::text("revoked.txt")).unwrap();
    assert!(list.has(SERIAL) && list.len() == 1, "{}", golden::REMEDY);
}
