//! Files that do not belong together, commands that fail or are killed, and what is revoked by mistake.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::sign::{new_ca, open_ca};
use super::*;

const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

fn order(host: &str) -> Order {
    Order { host: host.into(), grant: Grant::ALL, life: YEAR }
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory).unwrap().map(|it| it.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The private key of one file and the certificate of another.
fn mixed(key: &Path, certificate: &Path) -> String {
    const BEGIN: &str = "-----BEGIN CERTIFICATE";
    let [key, certificate] = [key, certificate].map(|file| fs::read_to_string(file).unwrap());
    format!("{}{BEGIN}{}", key.split_once(BEGIN).unwrap().0, certificate.split_once(BEGIN).unwrap().1)
}

#[test]
fn files_of_two_sets_of_keys_are_found_before_anybody_is_met() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b, other] = ["a", "b", "other"].map(|name| dir.path().join(name));
    init(&a, &order("hosta")).unwrap();
    issue(&a, &order("hostb"), &b).unwrap();
    init(&other, &order("hostc")).unwrap();
    let good = fs::read(b.join(HOST)).unwrap();

    fs::write(b.join(HOST), mixed(&a.join(HOST), &b.join(HOST))).unwrap();
    let refused = load(&b).unwrap_err().to_string();
    let file = b.join(HOST).display().to_string();
    assert!(refused.contains(&file) && refused.contains("does not belong to its certificate"), "{refused}");
    fs::write(b.join(HOST), &good).unwrap();

    // A link does not ask, because the other end may know both CAs.
    fs::copy(other.join(CAS), b.join(CAS)).unwrap();
    load(&b).unwrap();
    let refused = fitting(&b).unwrap_err();
    assert!(matches!(refused, LoadError::OtherCa { .. }), "{refused}");
    let refused = refused.to_string();
    assert!(refused.contains(&file) && refused.contains("keys issue --host hostb"), "{refused}");

    // Who is in ca.crt makes certificates, whatever his own one says.
    let cas = fs::read_to_string(a.join(CAS)).unwrap();
    let thief = fs::read_to_string(b.join(HOST)).unwrap();
    let thief = thief.split_once("-----BEGIN CERTIFICATE").unwrap().1;
    fs::write(b.join(CAS), format!("{cas}-----BEGIN CERTIFICATE{thief}")).unwrap();
    let refused = fitting(&b).unwrap_err().to_string();
    assert!(refused.contains("of hostb which is no CA's"), "{refused}");
    fs::write(b.join(CAS), cas).unwrap();
    assert_eq!(fitting(&b).unwrap().host.name, "hostb");

    // Both certificates of a CA that is replaced fit.
    rotate_ca(&a).unwrap();
    assert_eq!(fitting(&a).unwrap().cas.len(), 2);
}

#[test]
fn a_cas_key_that_makes_useless_certificates_makes_none() {
    let dir = tempfile::tempdir().unwrap();
    let [a, other, to] = ["a", "other", "to"].map(|name| dir.path().join(name));
    init(&a, &order("hosta")).unwrap();
    init(&other, &order("hostc")).unwrap();
    let [ours, theirs] = [ca_key(&a), ca_key(&other)];
    let good = fs::read(&ours).unwrap();
    let refuses = |about: &str| {
        for refused in [
            issue(&a, &order("hostb"), &to).unwrap_err(),
            rotate(&a, YEAR, true).unwrap_err(),
            rotate_ca(&a).unwrap_err(),
            forget_old_cas(&a, true).unwrap_err(),
        ] {
            let refused = refused.to_string();
            assert!(refused.contains(about) && refused.contains(&ours.display().to_string()), "{refused}");
        }
        assert!(!to.exists());
    };

    fs::write(&ours, mixed(&theirs, &ours)).unwrap();
    refuses("does not belong to its certificate");
    fs::copy(&theirs, &ours).unwrap();
    refuses("no host that has it would accept what is made");
    fs::write(&ours, good).unwrap();

    // An old copy of ca.crt; the remedy adds what it lacks.
    let old = fs::read(a.join(CAS)).unwrap();
    rotate_ca(&a).unwrap();
    fs::write(a.join(CAS), old).unwrap();
    let refused = issue(&a, &order("hostb"), &to).unwrap_err().to_string();
    let (_, remedy) = refused.split_once("add the CA: ").unwrap();
    assert!(std::process::Command::new("sh").args(["-c", remedy]).status().unwrap().success(), "{remedy}");
    issue(&a, &order("hostb"), &to).unwrap();
    assert_eq!(fitting(&to).unwrap().cas.len(), 2);
}

#[test]
fn nothing_is_signed_when_the_clock_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("keys");
    let host = init(&keys, &order("hosta")).unwrap();
    let ca = open_ca(&keys).unwrap();
    let day = Duration::from_secs(24 * 3600);
    let now = SystemTime::now();
    assert!(matches!(ca.in_time(now - day), Err(MakeError::TooEarly { .. })));
    assert!(matches!(ca.in_time(now + 3651 * day), Err(MakeError::CaOver { .. })));
    ca.in_time(now).unwrap();
    assert_eq!(host.too_early(now), None);
    assert!(host.too_early(now - day).unwrap().contains("set the clock"));
    assert!(new_ca("hosta").unwrap().make(&order("hostb")).is_ok());
}

#[test]
fn what_others_could_change_is_told_and_stops_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("keys");
    init(&keys, &order("hosta")).unwrap();
    for (name, mode) in [(CAS, 0o666), (REVOKED, 0o620)] {
        let file = keys.join(name);
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        let told = loose(&keys).join("; ");
        assert!(told.contains(&format!("chmod go-w {}", file.display())), "{told}");
        fitting(&keys).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    }
    assert_eq!(loose(&keys), [""; 0]);
    if std::os::unix::fs::chown(keys.join(CAS), Some(65534), None).is_ok() {
        let told = loose(&keys).join("; ");
        assert!(told.contains(&format!("chown 0: {}", keys.join(CAS).display())), "{told}");
        fitting(&keys).unwrap();
    }
}

/// What a process that was killed has left is no longer there after the next command, and what another one is making is.
#[test]
fn the_next_command_removes_what_was_left_half_made() {
    let dir = tempfile::tempdir().unwrap();
    let [keys, to] = ["keys", "to"].map(|name| dir.path().join(name));
    // A number that is no process's, and this one's: in a container it may be the same each time.
    let own = std::process::id();
    for name in [".keys.new-4194999".to_owned(), format!(".keys-ca.new-{own}"), format!(".to.new-{own}")] {
        fs::create_dir(dir.path().join(&name)).unwrap();
        fs::write(dir.path().join(&name).join(CAS), "").unwrap();
    }
    fs::create_dir(dir.path().join(".keys.new-7")).unwrap();
    let busy = File::open(dir.path().join(".keys.new-7")).unwrap();
    busy.lock().unwrap();
    init(&keys, &order("hosta")).unwrap();
    let beside = dir.path().join("keys-ca");
    let left = [
        keys.join(format!("host.new-{own}")),
        keys.join("revoked.new-4194999"),
        beside.join("ca.new-4194999"),
        beside.join(ISSUED).join("hostb-00112233.new-4194999"),
    ];
    for file in &left {
        fs::write(file, "-----BEGIN").unwrap();
    }
    fs::write(keys.join("notes.new"), "").unwrap();
    issue(&keys, &order("hostb"), &to).unwrap();
    assert!(left.iter().all(|file| !file.exists()));
    assert_eq!(names(&keys), [CAS, HOST, "notes.new", REVOKED]);
    assert_eq!(names(dir.path()), [".keys.new-7", "keys", "keys-ca", "to"]);
}

/// Two revocations at a time would each write a list without the other one.
#[test]
fn commands_wait_for_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("keys");
    init(&keys, &order("hosta")).unwrap();
    let serial = |number: u8| format!("{number:032x}");
    let threads: Vec<_> = (0..8)
        .map(|number| {
            let keys = keys.clone();
            std::thread::spawn(move || revoke(&keys, &serial(number)).unwrap())
        })
        .collect();
    threads.into_iter().for_each(|it| drop(it.join().unwrap()));
    assert_eq!(load(&keys).unwrap().revoked.len(), 8);
    let held = File::open(&keys).unwrap();
    held.lock().unwrap();
    assert!(matches!(revoke(&keys, &serial(9)), Err(MakeError::Busy(_))));
}

#[test]
fn a_command_that_fails_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("etc/keys");
    // The second directory cannot get its place.
    let taken = dir.path().join("etc");
    let failed = super::files::new_directory::<MakeError>(&keys, |beside| {
        super::files::write(&beside.join(CAS), "", 0o644)?;
        Err(MakeError::Busy(beside.to_owned()))
    });
    assert!(failed.is_err() && !taken.exists());
    let file = dir.path().join("full");
    fs::create_dir(&file).unwrap();
    // Nothing is written over a directory, as nothing is on a full disk.
    assert!(super::files::replace(&file.join("."), "x", 0o600).is_err());
    fs::create_dir(file.join("ca.crt")).unwrap();
    assert!(super::files::replace(&file.join("ca.crt"), "x", 0o600).is_err());
    assert_eq!(names(&file), ["ca.crt"]);

    init(&keys, &order("hosta")).unwrap();
    assert_eq!(fs::metadata(&taken).unwrap().mode() & 0o022, 0, "nobody else puts keys there");
    let inside = keys.join("hostb.keys");
    let refused = issue(&keys, &order("hostb"), &inside).unwrap_err();
    assert!(matches!(refused, MakeError::Within { .. }) && !inside.exists(), "{refused}");
}

#[test]
fn what_is_revoked_stays_so_under_a_new_ca_and_names_go_before_serial_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let [keys, b] = ["keys", "b"].map(|name| dir.path().join(name));
    init(&keys, &order("hosta")).unwrap();
    let thief = issue(&keys, &order("hostb"), &b).unwrap();
    // As other programs write it.
    let pairs: Vec<_> = thief.serial.as_bytes().chunks(2).map(|it| str::from_utf8(it).unwrap()).collect();
    assert_eq!(revoke(&keys, &pairs.join(":").to_uppercase()).unwrap(), std::slice::from_ref(&thief.serial));
    assert!(fs::read_to_string(keys.join(REVOKED)).unwrap().contains(&format!("{} hostb ", thief.serial)));
    rotate_ca(&keys).unwrap();
    rotate(&keys, YEAR, true).unwrap();
    forget_old_cas(&keys, true).unwrap();
    let new = dir.path().join("new");
    issue(&keys, &order("hostb"), &new).unwrap();
    for keys in [&keys, &new] {
        assert!(load(keys).unwrap().revoked.has(&thief.serial));
    }
    assert!(matches!(revoke(&keys, ""), Err(MakeError::Unknown(_))));
    assert!(!revoke(&keys, "a\nb").unwrap_err().to_string().contains('\n'));
}
