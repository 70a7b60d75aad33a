//! The etcd cluster.

use std::sync::atomic::{AtomicU32, Ordering};

use outlive::arbiter::{self, Claim, Initialized};

use super::etcd_cluster::{Cluster, has_etcd, put, remove};
use super::proxy::Proxy;
use crate::conformance::{Place, Reach, all};
use crate::support::{VM, why};

/// A prefix of its own in a cluster, whose members are behind proxies.
struct Prefix<'a> {
    cluster: &'a Cluster,
    proxies: Vec<Proxy>,
    name: String,
}

impl<'a> Prefix<'a> {
    fn make(cluster: &'a Cluster) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("test/{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let proxies = cluster.members.iter().map(|member| Proxy::before(member.client)).collect();
        let prefix = Self { cluster, proxies, name };
        let (_, done) = arbiter::init(&prefix.text()).unwrap();
        assert_eq!(done, Initialized::Made);
        prefix
    }
}

impl Place for Prefix<'_> {
    fn text(&self) -> String {
        let urls: Vec<String> =
            self.proxies.iter().map(|proxy| format!("http://{}", proxy.address)).collect();
        format!("etcd:{}/{}", urls.join(","), self.name)
    }

    fn reach(&self, reach: Reach) -> bool {
        self.proxies.iter().for_each(|proxy| proxy.reach(reach));
        true
    }

    fn empty(&self) {
        remove(self.cluster.members[0].client, &format!("{}/vms/", self.name));
    }

    fn swap(&self) {
        remove(self.cluster.members[0].client, &format!("{}/", self.name));
        arbiter::init(&self.text()).unwrap();
    }
}

#[test]
fn etcd_conforms() {
    if !has_etcd() {
        return;
    }
    let cluster = Cluster::start(3);
    all(&|| Box::new(Prefix::make(&cluster)), 60);
    damage_is_never_a_win(&Prefix::make(&cluster));
    only_the_winner_notes_an_end(&Prefix::make(&cluster));
    a_prefix_in_use_and_a_bare_cluster_are_no_arbiters(&cluster);
    a_cluster_that_went_back_is_not_trusted(&cluster);
}

fn damage_is_never_a_win(prefix: &Prefix) {
    let member = prefix.cluster.members[0].client;
    let mut arbiter = prefix.open();
    assert_eq!(arbiter.claim(&VM, 1, "primary"), Claim::Won);
    for text in ["", "garbage", "outlive claim, version 1\nowner primary\n"] {
        put(member, &format!("{}/vms/{VM}/claims/{:020}", prefix.name, 1), text);
        assert!(why(arbiter.claim(&VM, 1, "primary")).contains("is damaged"));
        assert_eq!(arbiter.history(&VM).unwrap()[0].winner, None);
    }
    put(member, &format!("{}/arbiter", prefix.name), "garbage");
    assert!(why(arbiter.claim(&VM, 1, "primary")).contains("is damaged"));
    remove(member, &format!("{}/arbiter", prefix.name));
    assert!(why(arbiter.claim(&VM, 1, "primary")).contains("is gone"));
}

fn only_the_winner_notes_an_end(prefix: &Prefix) {
    let mut arbiter = prefix.open();
    assert_eq!(arbiter.claim(&VM, 1, "primary"), Claim::Won);
    let (token, other) = (arbiter::process_token().unwrap(), "b0".repeat(16));
    let text = |process: &str| {
        format!(
            "outlive claim, version 1\nvm {VM}\ngeneration 1\nowner primary\ntoken {process}\nat 1\nend\n"
        )
    };
    let key = format!("{}/vms/{VM}/claims/{:020}", prefix.name, 1);
    put(prefix.cluster.members[0].client, &key, &text(&other));
    let error = arbiter.note_end(&VM, 1, "the end").unwrap_err().to_string();
    assert!(error.contains("has not won generation 1"), "{error}");
    put(prefix.cluster.members[0].client, &key, &text(token));
    arbiter.note_end(&VM, 1, "the end").unwrap();
}

fn a_prefix_in_use_and_a_bare_cluster_are_no_arbiters(cluster: &Cluster) {
    let place = format!("etcd:{}/somebody", cluster.urls());
    let error = arbiter::parse(&place).map(drop).unwrap_err().to_string();
    assert!(error.contains(&format!("outlive arbiter init '{place}'")), "{error}");
    put(cluster.members[0].client, "somebody/elses", "key");
    let error = arbiter::init(&place).map(drop).unwrap_err().to_string();
    assert!(error.contains("'somebody/elses'"), "{error}");
    let error = arbiter::parse("etcd:http://127.0.0.1:1").map(drop).unwrap_err().to_string();
    assert!(error.contains("majority"), "{error}");
}

/// The revision of a restored cluster is behind what this process has seen.
fn a_cluster_that_went_back_is_not_trusted(cluster: &Cluster) {
    let young = Cluster::start(1);
    let proxy = Proxy::before(cluster.members[0].client);
    let place = format!("etcd:http://{}/back", proxy.address);
    let (mut arbiter, _) = arbiter::init(&place).unwrap();
    assert_eq!(arbiter.claim(&VM, 1, "primary"), Claim::Won);
    // The same marker and claims in a cluster that has done less: a snapshot.
    proxy.target(young.members[0].client);
    let marker = format!("outlive arbiter directory, version 2\nid {}\nend\n", arbiter.identity());
    put(young.members[0].client, "back/arbiter", &marker);
    proxy.reach(Reach::Away);
    why(arbiter.claim(&VM, 2, "primary"));
    proxy.reach(Reach::Here);
    for _ in 0..2 {
        let reason = why(arbiter.claim(&VM, 1, "primary"));
        assert!(reason.contains("has forgotten writes"), "{reason}");
    }
    // Also when it has done more since, and is asked by a probe.
    (0..100).for_each(|number| put(young.members[0].client, "x", &number.to_string()));
    assert!(arbiter.prober()().unwrap_err().to_string().contains("has forgotten writes"));
    // This process takes it for an arbiter no more.
    let error = arbiter::parse(&place).map(drop).unwrap_err().to_string();
    assert!(error.contains("has forgotten writes"), "{error}");
}
