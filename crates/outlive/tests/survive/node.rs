//! Two hosts with a node each: they keep two VMs, and are themselves killed, drained and started anew.

use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use crate::support::{Nodes, Side, Witnesses, World, pid};

const VMS: [&str; 2] = ["web", "db"];

#[test]
fn two_nodes_keep_their_vms_and_no_guest_notices_what_becomes_of_a_node() {
    let Some(world) = World::new() else { return };
    let mut nodes = Nodes::start(&world, &VMS);
    nodes.start_vms();
    let before = VMS.map(|vm| pid(&nodes.wait(Side::A, vm, "running", true)));
    VMS.iter().for_each(|vm| drop(nodes.wait(Side::B, vm, "standby", true)));
    let (code, _, said) = nodes.ask(Side::B, &["vm", "stop", "web"]);
    assert!(code == Some(1) && said.contains("is its standby"), "{said}");

    // The node of host a is killed and started anew.
    let witnesses = Witnesses::start(&world, 2);
    nodes.kill(Side::A);
    witnesses.hear_all();
    nodes.start_one(Side::A);
    let after = VMS.map(|vm| nodes.wait(Side::A, vm, "running", true));
    assert_eq!(after.each_ref().map(pid), before);
    assert!(after.iter().all(|vm| vm["adopted"] == true && vm["status"]["generation"] == 1), "{after:?}");
    witnesses.hear_all();

    // Host a is emptied.
    let drained: Value = serde_json::from_str(&nodes.good(Side::A, &["node", "drain", "--json"])).unwrap();
    assert_eq!(drained["result"]["moved"].as_array().unwrap().len(), 2, "{drained}");
    let moved = VMS.map(|vm| nodes.wait(Side::B, vm, "running", true));
    VMS.iter().for_each(|vm| drop(nodes.wait(Side::A, vm, "standby", true)));
    witnesses.hear_all();
    let (code, _, said) = nodes.ask(Side::A, &["vm", "start", "web"]);
    assert!(code == Some(1) && said.contains("drained"), "{said}");
    assert!(nodes.good(Side::A, &["node", "undrain"]).contains("active"));

    // The process of one VM is killed: host a has the VM, and node b makes a new standby.
    kill(pid(&moved[0]), Signal::SIGKILL).unwrap();
    nodes.wait(Side::A, "web", "running", true);
    let back = nodes.wait(Side::B, "web", "standby", true);
    assert!(pid(&back) != pid(&moved[0]) && back["last_end"]["signal"] == 9, "{back}");
    assert_eq!(pid(&nodes.show(Side::B, "db")), pid(&moved[1]), "the other VM has nothing to do with it");
    witnesses.hear_all();
    witnesses.finish(&world);

    // The end of a VM is its end on both hosts, and stays so.
    nodes.good(Side::A, &["vm", "stop", "web"]);
    assert_eq!(nodes.show(Side::A, "web")["state"], "stopped");
    let ended = nodes.wait(Side::B, "web", "ended", false);
    assert_eq!((&ended["desired"], &ended["pid"]), (&"stopped".into(), &Value::Null));
    nodes.wait(Side::B, "db", "running", true);
}
