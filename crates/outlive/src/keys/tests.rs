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
    let grant = Grant { send: Vms::NONE, hold: Vms::Only(vec![VmId([9; 16])]), arbiter: false };
    let made = issue(&here, &Order { grant: grant.clone(), ..order("hostb") }, &there).unwrap();
    let (a, b) = (load(&here).unwrap(), load(&there).unwrap());
    assert_eq!((a.host.name.as_str(), b.host.name.as_str()), ("hosta", "hostb"));
    assert_eq!((&b.host.grant, &b.host), (&grant, &made));
    assert_eq!(a.cas, b.cas);
    assert!(b.host.left(SystemTime::now()) > YEAR - Duration::from_secs(60));
    assert_eq!(files(&here), [CAS, CA_KEY, HOST, ISSUED, REVOKED].map(String::from).as_slice());
    assert_eq!(files(&there), [CAS, HOST, REVOKED].map(String::from).as_slice(), "no key of the CA");
    assert_eq!(files(dir.path()), ["a", "b"], "nothing else is left");
    assert!(matches!(issue(&there, &order("hostc"), &dir.path().join("c")), Err(MakeError::NoCa(_))));
    assert!(matches!(init(&here, &order("hosta")), Err(MakeError::Exists(_))));
    for bad in ["", "host a", "a/b", "-a", "\u{e9}"] {
        let refused = init(&dir.path().join("c"), &order(bad));
        assert!(matches!(refused, Err(MakeError::Name(_))), "{bad}");
    }
    assert_eq!(files(dir.path()), ["a", "b"]);
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
    assert!(matches!(load(&keys), Err(LoadError::Damaged { .. })));
    fs::remove_file(keys.join(REVOKED)).unwrap();
    load(&keys).unwrap();
    fs::write(keys.join(CAS), "").unwrap();
    assert!(matches!(load(&keys), Err(LoadError::Damaged { .. })));
}

#[test]
fn keys_and_cas_are_renewed_and_hosts_are_revoked() {
    let dir = tempfile::tempdir().unwrap();
    let (keys, there) = (dir.path().join("keys"), dir.path().join("b"));
    let first = init(&keys, &order("hosta")).unwrap();
    let second = rotate(&keys, YEAR).unwrap();
    assert_ne!(first.serial, second.serial);
    assert_eq!(load(&keys).unwrap().host, second);
    rotate_ca(&keys).unwrap();
    let loaded = load(&keys).unwrap();
    assert_eq!((loaded.cas.len(), &loaded.host), (2, &second));
    assert!(matches!(forget_old_cas(&keys), Err(MakeError::StillOld(_))));
    let third = rotate(&keys, YEAR).unwrap();
    forget_old_cas(&keys).unwrap();
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
