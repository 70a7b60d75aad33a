//! Directories of keys as an operator makes, copies, renews and revokes them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use outlive_epoch::VmId;

use super::*;

const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

fn order(host: &str) -> Order {
    Order { host: host.into(), grant: Grant::ALL, life: YEAR }
}

fn files(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .map(|files| files.map(|it| it.unwrap().file_name().into_string().unwrap()).collect())
        .unwrap_or_default();
    names.sort();
    names
}

#[test]
fn a_directory_says_whose_it_is_and_what_it_allows() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (dir.path().join("a"), dir.path().join("b"));
    init(&here, &order("hosta")).unwrap();
    let grant = Grant { send: Vms::NONE, hold: Vms::Only(vec![VmId([9; 16])]), ..Grant::NONE };
    let made = issue(&here, &Order { grant: grant.clone(), ..order("hostb") }, &there).unwrap();
    let (a, b) = (load(&here).unwrap(), load(&there).unwrap());
    assert_eq!((a.host.name.as_str(), b.host.name.as_str()), ("hosta", "hostb"));
    assert_eq!((&b.host.grant, &b.host), (&grant, &made));
    assert_eq!(a.cas, b.cas);
    assert!(b.host.left(SystemTime::now()) > YEAR - Duration::from_secs(60));
    for keys in [&here, &there] {
        assert_eq!(files(keys), [CAS, HOST, REVOKED], "no key of the CA, not even below");
    }
    assert_eq!(files(&dir.path().join("a-ca")), [CA_KEY, ISSUED]);
    assert_eq!(files(dir.path()), ["a", "a-ca", "b"], "nothing else is left");
    assert!(matches!(issue(&there, &order("hostc"), &dir.path().join("c")), Err(MakeError::NoCa(_))));
    assert!(matches!(init(&here, &order("hosta")), Err(MakeError::Exists(_))));
    let long = "a".repeat(65);
    for bad in [
        "",
        "host a",
        "a/b",
        "-a",
        "\u{e9}",
        "a.",
        "a..b",
        "*.a",
        "a\n",
        "a\x1b[2J",
        &long,
        "0123456789abcdef",
    ] {
        let refused = init(&dir.path().join("c"), &order(bad));
        assert!(matches!(refused, Err(MakeError::Name(_))), "{bad}");
        assert!(!refused.unwrap_err().to_string().contains(char::is_control), "{bad}");
    }
    assert_eq!(files(dir.path()), ["a", "a-ca", "b"]);
    // A CA alone is worth as much.
    fs::remove_dir_all(&here).unwrap();
    let refused = init(&here, &order("hosta")).unwrap_err();
    assert!(
        matches!(refused, MakeError::CaAlone { .. }) && refused.to_string().contains("rm -r "),
        "{refused}"
    );
}

#[test]
fn keys_that_others_may_read_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("keys");
    assert!(load(&keys).unwrap_err().to_string().contains("outlive keys init"));
    init(&keys, &order("hosta")).unwrap();
    for (file, good, bad) in [(keys.clone(), 0o700, 0o750), (keys.join(HOST), 0o600, 0o640)] {
        fs::set_permissions(&file, fs::Permissions::from_mode(bad)).unwrap();
        let refused = load(&keys).unwrap_err().to_string();
        assert!(refused.contains(&format!("mode {bad:04o}")) && refused.contains("chmod"), "{refused}");
        fs::set_permissions(&file, fs::Permissions::from_mode(good)).unwrap();
    }
    load(&keys).unwrap();
    fs::write(keys.join(REVOKED), "nonsense\n").unwrap();
    let refused = load(&keys).unwrap_err().to_string();
    assert!(refused.contains("nonsense: correct or remove the line"), "{refused}");
    fs::write(keys.join(REVOKED), "").unwrap();
    load(&keys).unwrap();
    fs::write(keys.join(CAS), "").unwrap();
    assert!(matches!(load(&keys), Err(LoadError::Damaged { .. })));
    fs::remove_file(keys.join(CAS)).unwrap();
    let refused = load(&keys).unwrap_err().to_string();
    assert!(
        refused.contains("ca.crt is missing") && refused.contains("copy it from another host"),
        "{refused}"
    );
}

#[test]
fn keys_and_cas_are_renewed_and_hosts_are_revoked() {
    let dir = tempfile::tempdir().unwrap();
    let (keys, there) = (dir.path().join("keys"), dir.path().join("b"));
    let first = init(&keys, &order("hosta")).unwrap();
    let second = rotate(&keys, YEAR, false).unwrap();
    assert_ne!(first.serial, second.serial);
    assert_eq!(load(&keys).unwrap().host, second);
    rotate_ca(&keys).unwrap();
    let loaded = load(&keys).unwrap();
    assert_eq!((loaded.cas.len(), &loaded.host), (2, &second));
    assert!(matches!(forget_old_cas(&keys, false), Err(MakeError::StillOld(_))));
    let third = rotate(&keys, YEAR, false).unwrap();
    forget_old_cas(&keys, false).unwrap();
    let loaded = load(&keys).unwrap();
    assert_eq!((loaded.cas.len(), &loaded.host), (1, &third));
    let b = issue(&keys, &order("hostb"), &there).unwrap();
    assert_eq!(revoke(&keys, "hostb").unwrap(), std::slice::from_ref(&b.serial));
    revoke(&keys, &b.serial).unwrap();
    let loaded = load(&keys).unwrap();
    assert!(loaded.revoked.has(&b.serial) && loaded.revoked.len() == 1);
    assert!(matches!(revoke(&keys, "hostc"), Err(MakeError::Unknown(_))));
    // A host without the CA's key refuses by the serial number.
    revoke(&there, &third.serial).unwrap();
    assert!(load(&there).unwrap().revoked.has(&third.serial));
}

#[test]
fn the_end_of_a_certificate_is_told_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let about = init(&dir.path().join("keys"), &order("hosta")).unwrap();
    let now = SystemTime::now();
    assert_eq!(about.complaint(now), None);
    let soon = about.complaint(now + YEAR - SOON + Duration::from_secs(3600)).unwrap();
    assert!(soon.contains("hosta expires in 29 days"), "{soon}");
    assert!(about.complaint(now + YEAR).unwrap().contains("EXPIRED"));
}

#[test]
fn a_lost_list_lets_nobody_in_and_nothing_makes_one_silently() {
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("keys");
    let about = init(&keys, &order("hosta")).unwrap();
    fs::remove_file(keys.join(REVOKED)).unwrap();
    let refused = load(&keys).unwrap_err().to_string();
    let remedy = format!("touch {}", keys.join(REVOKED).display());
    assert!(refused.contains("nobody is let in") && refused.contains(&remedy), "{refused}");
    // One with the new line alone would let in whoever was on the old one.
    for refused in [
        revoke(&keys, &about.serial).map(drop),
        issue(&keys, &order("hostb"), &dir.path().join("b")).map(drop),
    ] {
        assert!(matches!(refused, Err(MakeError::Load(LoadError::NoList { .. }))));
    }
    assert!(!keys.join(REVOKED).exists() && !dir.path().join("b").exists());
    fs::write(keys.join(REVOKED), "").unwrap();
    load(&keys).unwrap();
}

/// As `scp -p FROM/* TO/` does.
fn copy(from: &Path, to: &Path) {
    for name in files(from) {
        fs::copy(from.join(&name), to.join(&name)).unwrap();
    }
}

#[test]
fn renewed_keys_that_are_copied_over_the_old_ones_let_nobody_in_again() {
    let dir = tempfile::tempdir().unwrap();
    let [keys, there, new] = ["keys", "b", "b.keys"].map(|name| dir.path().join(name));
    let a = init(&keys, &order("hosta")).unwrap();
    let first = issue(&keys, &order("hostb"), &there).unwrap();
    let (thief, own) = (revoke(&keys, "hostb").unwrap().swap_remove(0), "00112233445566778899aabbccddeeff");
    for serial in [own, &a.serial] {
        revoke(&there, serial).unwrap();
    }
    let second = issue(&keys, &order("hostb"), &new).unwrap();
    copy(&new, &there);
    let loaded = load(&there).unwrap();
    assert_eq!(loaded.host, second);
    for serial in [own, &a.serial, &thief] {
        assert!(loaded.revoked.has(serial), "{serial}");
    }
    assert_eq!((first.serial, loaded.revoked.len()), (thief.clone(), 3));
    // Also the list alone, and the other way round; and the next revocation keeps them all.
    fs::copy(keys.join(REVOKED), there.join(REVOKED)).unwrap();
    revoke(&there, "ffeeddccbbaa99887766554433221100").unwrap();
    fs::copy(there.join(REVOKED), keys.join(REVOKED)).unwrap();
    assert_eq!(load(&keys).unwrap().revoked.len(), 4);
    fs::write(there.join(REVOKED), "").unwrap();
    assert_eq!(load(&there).unwrap().revoked.len(), 4);
    fs::write(there.join(REVOKED_HERE), "nonsense").unwrap();
    assert!(matches!(load(&there), Err(LoadError::Line { .. })));
}

#[test]
fn no_host_is_shut_out_by_a_new_ca() {
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("keys");
    let new = |host: &str, name: &str| issue(&keys, &order(host), &dir.path().join(name)).unwrap();
    init(&keys, &order("hosta")).unwrap();
    for host in ["hostb", "hostc", "hostd", "hoste"] {
        new(host, host);
    }
    // One was renewed, one is gone, and one certificate has ended.
    new("hostb", "b2");
    revoke(&keys, "hostd").unwrap();
    issue(&keys, &Order { life: Duration::ZERO, ..order("late") }, &dir.path().join("late")).unwrap();
    rotate_ca(&keys).unwrap();
    let refused = rotate(&keys, YEAR, false).unwrap_err().to_string();
    assert!(refused.starts_with("hostb, hostc, hoste: ") && refused.contains("--force"), "{refused}");
    assert_eq!(load(&keys).unwrap().host.name, "hosta");
    rotate(&keys, YEAR, true).unwrap();
    // Once more is a renewal like any other.
    rotate(&keys, YEAR, false).unwrap();
    new("hostb", "b3");
    let refused = forget_old_cas(&keys, false).unwrap_err().to_string();
    assert!(refused.starts_with("hostc, hoste: ") && refused.contains("keys issue --host"), "{refused}");
    assert_eq!(load(&keys).unwrap().cas.len(), 2);
    new("hostc", "c2");
    forget_old_cas(&keys, true).unwrap();
    assert_eq!(load(&keys).unwrap().cas.len(), 1);
    // In the order of the documents nobody asks.
    rotate_ca(&keys).unwrap();
    for host in ["hostb", "hostc"] {
        new(host, &format!("{host}-new"));
    }
    revoke(&keys, "hoste").unwrap();
    rotate(&keys, YEAR, false).unwrap();
    forget_old_cas(&keys, false).unwrap();
}

/// Release 0.2.0 has the CA among the keys.
#[test]
fn a_ca_of_the_release_before_goes_on_and_is_complained_about_until_it_is_moved() {
    let dir = tempfile::tempdir().unwrap();
    let [keys, beside] = ["keys", "keys-ca"].map(|name| dir.path().join(name));
    init(&keys, &order("hosta")).unwrap();
    assert_eq!(misplaced(&keys), None);
    for file in files(&beside) {
        fs::rename(beside.join(&file), keys.join(&file)).unwrap();
    }
    fs::remove_dir(&beside).unwrap();
    let first = issue(&keys, &order("hostb"), &dir.path().join("b")).unwrap();
    rotate_ca(&keys).unwrap();
    assert!(!beside.exists());
    let complaint = misplaced(&keys).unwrap();
    let (_, remedy) = complaint.split_once(": ").unwrap();
    assert!(std::process::Command::new("sh").args(["-c", remedy]).status().unwrap().success(), "{remedy}");
    assert_eq!(misplaced(&keys), None);
    assert_eq!(
        (files(&keys), files(&beside)),
        ([CAS, HOST, REVOKED].map(String::from).to_vec(), [CA_KEY, ISSUED].map(String::from).to_vec())
    );
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&keys, &link).unwrap();
    issue(&link, &order("hostb"), &dir.path().join("b2")).unwrap();
    assert!(revoke(&keys, "hostb").unwrap().contains(&first.serial), "what was made before is known");
}

#[test]
fn an_issue_that_fails_hands_nothing_out() {
    let dir = tempfile::tempdir().unwrap();
    let [keys, there] = ["keys", "hostb.keys"].map(|name| dir.path().join(name));
    init(&keys, &order("hosta")).unwrap();
    issue(&keys, &order("hostb"), &there).unwrap();
    let issued = || files(&dir.path().join("keys-ca").join(ISSUED));
    let before = issued();
    let refused = issue(&keys, &order("hostb"), &there).unwrap_err().to_string();
    assert!(refused.contains("--to") && !refused.contains("rotate"), "{refused}");
    let refused = issue(&keys, &order("hostb"), &dir.path().join("no/such/directory"));
    assert!(matches!(refused, Err(MakeError::Write { .. })));
    assert_eq!((issued(), before.len()), (before, 2));
}

#[test]
fn who_names_no_keys_is_told_what_is_wrong_with_the_place() {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let [keys, empty, other] = ["keys", "empty", "other"].map(|name| dir.path().join(name));
    init(&keys, &order("hosta")).unwrap();
    fs::create_dir(&empty).unwrap();
    fs::create_dir(&other).unwrap();
    fs::write(other.join("notes"), "").unwrap();
    let told = |place: &Path| load(place).unwrap_err().to_string();
    assert!(told(&empty).contains("`outlive keys init "));
    assert!(told(&other).contains("has files, but no keys"), "{}", told(&other));
    assert!(told(&keys.join(HOST)).contains("is not a directory"), "{}", told(&keys.join(HOST)));
    if nix::unistd::geteuid().is_root() {
        // A thread of its own: it stays somebody else.
        let (told, made) = std::thread::spawn(move || {
            nix::unistd::setfsuid(nix::unistd::Uid::from_raw(65534));
            (load(&keys).unwrap_err().to_string(), issue(&keys, &order("b"), &other).unwrap_err().to_string())
        })
        .join()
        .unwrap();
        assert!(told.contains("no permission") && !told.contains("keys init"), "{told}");
        assert!(made.contains("no permission") && !made.contains("is not here"), "{made}");
    }
}

#[test]
fn an_operator_has_keys_of_its_own_and_no_host_has_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let [keys, alice, again] = ["keys", "alice", "again"].map(|name| dir.path().join(name));
    let operator = |name: &str| Order { grant: Grant::OPERATOR, ..order(name) };
    init(&keys, &order("hosta")).unwrap();
    let made = issue(&keys, &operator("alice"), &alice).unwrap();
    assert_eq!(
        (files(&alice), load(&alice).unwrap().host),
        ([CAS, HOST, REVOKED].map(String::from).to_vec(), made)
    );
    let pem = fs::read_to_string(alice.join(HOST)).unwrap();
    let der = load::certificates(&alice.join(HOST), pem.as_bytes()).unwrap().swap_remove(0);
    let (_, read) = x509_parser::parse_x509_certificate(&der).unwrap();
    let usage = read.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.client_auth && !usage.server_auth, "nobody answers with it");
    for (order, whose) in [(operator("hosta"), "a host"), (order("alice"), "an operator")] {
        let refused = issue(&keys, &order, &again).unwrap_err();
        assert!(
            matches!(refused, MakeError::NameTaken { .. }) && refused.to_string().contains(whose),
            "{refused}"
        );
    }
    assert!(!again.exists());
    // New keys of the same one, and of another one once the old ones count no longer.
    issue(&keys, &operator("alice"), &again).unwrap();
    assert_eq!(revoke(&keys, "alice").unwrap().len(), 2);
    issue(&keys, &order("alice"), &dir.path().join("host")).unwrap();
}
