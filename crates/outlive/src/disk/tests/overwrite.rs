//! What a standby overwrites, and what it refuses.

use std::fs::{self, File};

use outlive_epoch::{Ancestor, Lineage, VmId};

use super::provenance;
use super::start::{OTHER, Stage, VM};
use crate::arbiter::{Arbiter, process_token};
use crate::disk::Target;
use crate::disk::provenance::{KnownArbiter, Provenance};
use crate::disk::sidecar::{Role, Sidecar, beside};

/// Whether a standby would overwrite an image with the disk of `VM` in generation 4, begun from `OTHER` as of
/// generation 2.
fn overwrite(stage: &mut Stage, image: &str, asked_for: bool) -> Result<bool, String> {
    let path = stage.image(image);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let arbiter = KnownArbiter::Id(stage.arbiter.identity().to_owned());
    let lineage = Lineage::new([Ancestor { vm: OTHER, through: 2 }]);
    let incoming = Provenance { arbiter, lineage, ..provenance(VM) };
    let target = Target { path: &path, file: &file, overwrite: asked_for };
    let accepted = target.check(&incoming, 4, &mut stage.arbiter).map_err(|error| error.to_string())?;
    Ok(accepted.is_some())
}

#[test]
fn a_standby_overwrites_what_holds_nothing_and_what_its_vm_has() {
    let mut stage = Stage::new();
    (2..=4).for_each(|generation| stage.win(VM, generation));
    assert_eq!(overwrite(&mut stage, "blank", false), Ok(false));
    let of = |vm, generation, role| {
        let mut sidecar = Sidecar { generation, role, ..stage.sidecar() };
        sidecar.provenance.vm = vm;
        sidecar
    };
    let line = [
        of(VM, 1, Role::Primary),
        of(VM, 4, Role::Replica),
        Sidecar { whole: false, ..of(VM, 4, Role::Replica) },
        of(OTHER, 2, Role::Primary),
    ];
    let strangers = [
        (of(VM, 5, Role::Primary), "generation 5 of this VM, which its generation 4 does not have"),
        (of(OTHER, 3, Role::Primary), "generation 3 of another VM server (0808"),
        (of(VmId([3; 16]), 1, Role::Replica), "generation 1 of another VM"),
        (Sidecar { whole: false, ..of(VmId([3; 16]), 1, Role::Replica) }, "generation 1 of another VM"),
    ];
    for sidecar in line {
        fs::write(stage.image("line"), [7; 4096]).unwrap();
        sidecar.write(&stage.image("line")).unwrap();
        assert_eq!(overwrite(&mut stage, "line", false), Ok(false), "{sidecar:?}");
    }
    for (sidecar, holds) in strangers {
        sidecar.write(&stage.image("stranger")).unwrap();
        let error = overwrite(&mut stage, "stranger", false).unwrap_err();
        assert!(error.contains(holds) && error.contains("nothing is overwritten"), "{error}");
        assert!(error.contains(",overwrite") && error.lines().count() == 1, "{error}");
        assert_eq!(overwrite(&mut stage, "stranger", true), Ok(true));
    }
}

/// Hosts mixed up: the server's image is given to the standby.
#[test]
fn a_standby_does_not_overwrite_data_that_nobody_knows() {
    let mut stage = Stage::new();
    fs::write(stage.image("server"), [&[0; 4096][..], b"data"].concat()).unwrap();
    let error = overwrite(&mut stage, "server", false).unwrap_err();
    assert!(error.contains("holds data (at byte 0) and is no standby's copy"), "{error}");
    assert_eq!(overwrite(&mut stage, "server", true), Ok(true));
    // Nor does a damaged sidecar make an image free.
    fs::write(beside(&stage.image("damaged"), "outlive"), "vm = nonsense").unwrap();
    let error = overwrite(&mut stage, "damaged", false).unwrap_err();
    assert!(error.contains("is invalid") && error.contains("outlive image accept"), "{error}");
    assert_eq!(overwrite(&mut stage, "damaged", true), Ok(true));
}

/// The standby won the generation that is given up, and died before its sidecar said so.
#[test]
fn a_standby_does_not_overwrite_what_its_process_has_won() {
    let mut stage = Stage::new();
    let me = Some(process_token().unwrap().to_owned());
    Sidecar { role: Role::Replica, process: me, ..stage.sidecar() }.write(&stage.image("b")).unwrap();
    assert_eq!(overwrite(&mut stage, "b", false), Ok(false));
    (2..=5).for_each(|generation| stage.win(VM, generation));
    let error = overwrite(&mut stage, "b", false).unwrap_err();
    assert!(error.contains("generation 5 of this VM"), "{error}");
}
