//! Each kind of arbiter: that it conforms, and what is special in it.

mod etcd;
mod etcd_cluster;
mod etcd_faults;
mod etcd_partitions;
mod etcd_tls;
mod file;
mod keys;
mod proxy;
mod served;
mod served_kills;
mod served_tls;
mod server;

use crate::conformance;

/// Not a test by itself: the program that racing processes run.
#[test]
fn claimant() {
    conformance::racer_ends_with_claims();
}
