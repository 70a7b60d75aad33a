//! `outlive keys` as a program: what it makes, says and refuses.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// `outlive keys` with these words.
fn keys(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_outlive")).arg("keys").args(words).output().unwrap()
}

/// What a command that must succeed has printed.
fn good(words: &[&str]) -> String {
    let output = keys(words);
    assert_eq!(output.status.code(), Some(0), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The one line of a command that must be refused.
fn refused(words: &[&str]) -> String {
    let output = keys(words);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && output.stdout.is_empty(), "{words:?}: {said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    said
}

fn show(keys: &str) -> Value {
    serde_json::from_str(&good(&["show", "--json", "--keys", keys])).unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// A pair needs two of them, and the first line of the quick start makes both.
#[test]
fn the_first_keys_come_with_those_of_the_other_host() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_outlive"));
    command.args(["keys", "init", "keys", "--host", "hosta", "--issue", "hostb"]).current_dir(folder.path());
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("hostb.keys has the keys of hostb: ") && !said.contains("NAME"), "{said}");
    let made = |name: &str| show(folder.path().join(name).to_str().unwrap());
    assert_eq!(
        (&made("keys")["host"]["name"], &made("hostb.keys")["host"]["name"]),
        (&"hosta".into(), &"hostb".into())
    );
    // It is copied as it is.
    assert_eq!(mode(&folder.path().join("hostb.keys")), 0o700);
}

/// The life of keys, from the first to the next ones.
#[test]
fn keys_are_made_shown_renewed_and_revoked() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (a, b, vm) = (path("keys"), path("hostb.keys"), "7".repeat(32));

    let said = good(&["init", &a, "--host", "hosta", "--days", "5"]);
    assert!(said.contains("hosta: may send any VM") || said.contains("has the keys of hosta: "), "{said}");
    assert!(said.contains(&format!("{a}-ca has the new CA's private key")), "{said}");
    for (file, expected) in
        [("host.pem", 0o600), ("ca.crt", 0o644), ("revoked", 0o600), ("../keys-ca/ca.pem", 0o600)]
    {
        assert_eq!(mode(&Path::new(&a).join(file)), expected, "{file}");
    }
    let said = good(&["issue", "--host", "hostb", "--keys", &a, "--to", &b, "--hold", "--vm", &vm]);
    assert!(said.contains(&format!("{b} has the keys of hostb: ")) && said.contains("scp -p "), "{said}");

    let shown = show(&a);
    assert_eq!((&shown["host"]["name"], &shown["makes_certificates"]), (&"hosta".into(), &true.into()));
    assert_eq!((&shown["host"]["send"], &shown["host"]["hold"]), (&["any"][..].into(), &["any"][..].into()));
    assert!((4..=5).contains(&shown["host"]["days_left"].as_u64().unwrap()), "{shown}");
    let warnings = shown["warnings"].as_array().unwrap();
    assert!(warnings.len() == 1 && warnings[0].as_str().unwrap().contains("hosta"), "{shown}");
    let issued = shown["issued"].as_array().unwrap();
    assert_eq!(issued.iter().map(|it| &it["name"]).collect::<Vec<_>>(), ["hosta", "hostb"]);
    let theirs = show(&b);
    assert_eq!((&theirs["makes_certificates"], &theirs["host"]["hold"]), (&false.into(), &[vm][..].into()));
    assert!(theirs["host"].get("send").is_none(), "{theirs}");
    assert!(theirs["host"]["days_left"].as_u64().unwrap() > 390);
    assert!(theirs["warnings"][0].as_str().unwrap().contains("may send no VM"), "{theirs}");
    let text = good(&["show", "--keys", &a]);
    for line in
        ["host     hosta: ", "CA       Outlive CA ", "key of   Outlive CA ", "made     hostb: ", "WARNING  "]
    {
        assert!(text.lines().any(|it| it.starts_with(line)), "{line}: {text}");
    }

    let before = shown["host"]["serial"].clone();
    let said = good(&["rotate", "--keys", &a]);
    assert!(said.contains("has new keys of hosta") && said.contains("links that are open go on"), "{said}");
    let renewed = show(&a);
    assert!(
        renewed["host"]["serial"] != before && renewed["host"]["days_left"].as_u64().unwrap() > 390,
        "{renewed}"
    );
    assert_eq!(renewed["warnings"].as_array().unwrap().len(), 0, "{renewed}");

    let said = good(&["rotate", "--ca", "--keys", &a]);
    assert!(said.contains("has a new CA") && said.contains("the old one still counts"), "{said}");
    assert_eq!(show(&a)["cas"].as_array().unwrap().len(), 2);
    assert!(refused(&["rotate", "--keys", &a]).contains("hostb: certificates of an old CA only"));
    let serial = theirs["host"]["serial"].as_str().unwrap();
    assert!(good(&["revoke", "hostb", "--keys", &a]).contains(&format!("revoked {serial}: copy ")));
    let after = show(&a);
    assert!(
        after["revoked"] == 1 && after["issued"].as_array().unwrap().iter().any(|it| it["revoked"] == true)
    );
    // A host that is revoked needs no new keys.
    good(&["rotate", "--keys", &a]);
    good(&["rotate", "--forget-old-cas", "--keys", &a]);
    assert_eq!(show(&a)["cas"].as_array().unwrap().len(), 1);
}

#[test]
fn what_would_lose_keys_or_cannot_be_read_is_refused_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (a, b) = (path("keys"), path("b"));
    good(&["init", &a, "--host", "hosta"]);
    good(&["issue", "--host", "hostb", "--keys", &a, "--to", &b]);
    for (words, remedy) in [
        (&["init", &a][..], "`outlive keys rotate` renews"),
        (&["issue", "--host", "hostb", "--keys", &a, "--to", &b], "another directory with --to"),
        (&["issue", "--host", "c", "--keys", &b], "certificates are made where the CA's private key is"),
        (&["issue", "--host", "c d", "--keys", &a, "--to", &path("c")], "use letters, digits"),
        (&["revoke", "nobody", "--keys", &a], "give its serial number"),
        (&["show", "--keys", &path("none")], "outlive keys init"),
    ] {
        let said = refused(words);
        assert!(said.contains(remedy), "{words:?}: {said}");
    }
}
