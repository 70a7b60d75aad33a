//! `docs/examples/fence-scsi` against a disk that is a folder: one file with its keys, one with its reservation.

#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

/// What `sg_persist` does, and what it prints. A preemption does what Linux' target does
/// (`core_scsi3_pro_preempt`): without a reservation it removes the key, makes no reservation and succeeds.
const FAKE: &str = r#"#!/bin/sh
for word; do
    case $word in
        --param-rk=*) rk=${word#*=};;
        --param-sark=*) sark=${word#*=};;
        --prout-type=*) type=${word#*=};;
        --in|--out) ;;
        --*) what=$word;;
        *) disk=$word;;
    esac
done
echo "$what" >> "$disk/asked"
[ ! -e "$disk/broken$what" ] || { echo "PR $what: transport error" >&2; exit 99; }
has() { grep -qx "$1" "$disk/keys"; }
held() { cat "$disk/held"; }
case $what in
    --register-ignore) has "$sark" || echo "$sark" >> "$disk/keys";;
    --preempt-abort)
        has "$rk" && has "$sark" || exit 24
        grep -vx "$sark" "$disk/keys" > "$disk/new"; mv "$disk/new" "$disk/keys"
        case $(held) in "$sark "*) echo "$rk $type" > "$disk/held";; esac;;
    --reserve)
        has "$rk" || exit 24
        case $(held) in "") echo "$rk $type" > "$disk/held";; "$rk $type") ;; *) exit 24;; esac;;
    --read-keys)
        echo "  LIO-ORG   disk  4.0"
        echo "  PR generation=0x4, registered reservation keys follow:"
        sed 's/^/    /' "$disk/keys";;
    --read-reservation)
        case $(held) in
            "") echo "  PR generation=0x4, there is NO reservation held";;
            *" 5") echo "  PR generation=0x4, Reservation follows:"; echo "    Key=$(held)" | cut -d' ' -f1-5
                echo "    scope: LU_SCOPE,  type: Write Exclusive, registrants only";;
            *) echo "    scope: LU_SCOPE,  type: Exclusive Access";;
        esac;;
    *) exit 1;;
esac
"#;

struct Disk(tempfile::TempDir);

impl Disk {
    /// With these keys, and held by `KEY TYPE` or by nobody.
    fn new(keys: &str, held: &str) -> Self {
        let disk = Self(tempfile::tempdir().unwrap());
        let fake = disk.path().join("sg_persist");
        fs::write(&fake, FAKE).unwrap();
        fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(disk.path().join("keys"), keys).unwrap();
        fs::write(disk.path().join("held"), held).unwrap();
        disk
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn run(&self, action: &str, keys: &[&str]) -> Output {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/examples/fence-scsi");
        let mut command = Command::new(script);
        command.env("SG_PERSIST", self.path().join("sg_persist"));
        command.arg(action).arg(self.path()).args(keys).output().unwrap()
    }

    /// Host b (0xb) fences host a (0xa).
    fn preempt(&self) -> Result<(), String> {
        let output = self.run("preempt", &["0xB", "0xa"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(()) } else { Err(said) }
    }

    fn breaks(&self, what: &str) {
        fs::write(self.path().join(format!("broken{what}")), "").unwrap();
    }

    /// Whether host a, and a host without a key, cannot write.
    fn is_fenced(&self) -> bool {
        let read = |name| fs::read_to_string(self.path().join(name)).unwrap();
        !read("keys").lines().any(|key| key == "0xa") && read("held").trim().ends_with(" 5")
    }
}

#[test]
fn the_reservation_of_the_other_host_is_taken_over() {
    let disk = Disk::new("0xa\n0xb\n", "0xa 5\n");
    disk.preempt().unwrap();
    assert!(disk.is_fenced());
    // A second run, after a lost answer, finds everything done.
    disk.preempt().unwrap();
    assert!(disk.is_fenced());
}

#[test]
fn a_disk_that_nobody_has_reserved_is_reserved() {
    let disk = Disk::new("0xa\n", "");
    disk.preempt().unwrap();
    assert!(disk.is_fenced(), "a host that has no key can write");
    // The key of the other host is gone, and the reservation with its host.
    let disk = Disk::new("0xb\n0x1a\n", "");
    disk.preempt().unwrap();
    assert!(disk.is_fenced());
}

#[test]
fn nothing_that_cannot_be_seen_counts_as_done() {
    for what in ["--read-keys", "--read-reservation", "--register-ignore"] {
        let disk = Disk::new("0xa\n0xb\n", "0xa 5\n");
        disk.breaks(what);
        let said = disk.preempt().expect_err(what);
        assert!(said.lines().last().unwrap().starts_with("fence-scsi: cannot"), "{said}");
    }
    let disk = Disk::new("0xa\n0xb\n", "0xa 5\n");
    disk.breaks("--preempt-abort");
    assert!(disk.preempt().unwrap_err().contains("still has the other host's key 0xa"));
    let disk = Disk::new("0xa\n0xb\n", "");
    disk.breaks("--reserve");
    assert!(disk.preempt().unwrap_err().contains("has no reservation"));
    // A reservation of another kind would let nobody write, or everybody.
    let disk = Disk::new("0xb\n0xc\n", "0xc 3\n");
    assert!(disk.preempt().unwrap_err().contains("has no reservation"));
}

#[test]
fn both_hosts_register_at_boot_and_the_first_reserves() {
    let disk = Disk::new("", "");
    for key in ["0xa", "0xb", "0xa"] {
        assert!(disk.run("reserve", &[key]).status.success());
    }
    let read = |name| fs::read_to_string(disk.path().join(name)).unwrap();
    assert_eq!((read("keys").as_str(), read("held").as_str()), ("0xa\n0xb\n", "0xa 5\n"));
    disk.preempt().unwrap();
    assert!(disk.is_fenced());
}

#[test]
fn mistakes_are_said() {
    let disk = Disk::new("", "");
    for (action, keys) in [("preempt", &["0xb"][..]), ("preempt", &["0xb", "11"]), ("take", &["0xb"])] {
        assert!(!disk.run(action, keys).status.success(), "{action} {keys:?}");
    }
}

/// Where shellcheck is installed.
#[test]
fn the_script_is_clean() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/examples/fence-scsi");
    match Command::new("shellcheck").arg(script).output() {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout)),
        Err(error) => println!("skipped: no shellcheck: {error}"),
    }
}
