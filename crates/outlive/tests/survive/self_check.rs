//! The self-check: at every hundredth checkpoint all memory of both hosts is compared.

use outlive::events::Event;

use crate::support::{MemoryLoad, Side, Witnesses, World};

#[test]
fn the_copy_equals_the_vm_at_every_hundredth_checkpoint_and_after_a_takeover() {
    let Some(world) = World::new() else { return };
    let check = ["--self-check", "100"];
    let mut standby = world.standby_with(Side::B, &check);
    let mut primary =
        world.run_with(Side::A, &[&["--standby", &Side::B.addr().to_string()], &check[..]].concat());
    primary.wait_protected();
    let witnesses = Witnesses::start(&world, 4);
    let load = MemoryLoad::start(&world, 2000, 20_000);
    for _ in 0..10 {
        let checked = standby.wait_for("comparing", |e| matches!(e, Event::SelfCheck { .. }));
        assert!(matches!(checked, Event::SelfCheck { difference: None, .. }), "{checked:?}");
    }
    load.finish(&world);
    primary.kill();
    standby.wait_takeover();
    witnesses.hear_all();
    witnesses.finish(&world);
}
