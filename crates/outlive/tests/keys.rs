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

/// What would be passed over is refused, and nothing is made.
#[test]
fn options_that_contradict_each_other_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (a, to, vm) = (path("keys"), path("to"), "7".repeat(32));
    good(&["init", &a, "--host", "hosta"]);
    let issue = ["issue", "--host", "hostb", "--keys", &a, "--to", &to];
    for (words, about) in [
        (&["--vm", "any", "--vm", &vm][..], "--vm any allows every VM"),
        (&["--vm", &vm, "--hold", "--vm", "any"], "give one of the two"),
        (&["--days", "0"], "1..=3650"),
        (&["--days", "99999"], "1..=3650"),
    ] {
        let said = refused(&[&issue, words].concat());
        assert!(said.contains(about), "{words:?}: {said}");
    }
    for (words, about) in [
        (&["rotate", "--ca", "--days", "5"][..], "'--days <N>'"),
        (&["rotate", "--forget-old-cas", "--days", "5"], "'--days <N>'"),
        (&["rotate", "--ca", "--forget-old-cas"], "'--forget-old-cas'"),
        (&["rotate", "--ca", "--force"], "'--force'"),
    ] {
        let said = refused(&[words, &["--keys", &a]].concat());
        assert!(said.contains("cannot be used with") && said.contains(about), "{words:?}: {said}");
    }
    let init = ["init", &path("other"), "--host", "hosta"];
    for (words, about) in [
        (&["--issue", "hostb", "--arbiter"][..], "'--arbiter'"),
        (&["--issue", "hostb", "--hold"], "'--hold'"),
        (&["--issue", "hosta"], "another host has this name"),
        (&["--issue", "hostb", "--issue", "hostb"], "another host has this name"),
        (&["--issue", "hostb", "--issue", "host c"], "use letters, digits"),
    ] {
        let said = refused(&[&init, words].concat());
        assert!(said.contains(about), "{words:?}: {said}");
    }
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|it| it.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

/// A file from elsewhere is told of by the command that meets it first, and so are rights that go on.
#[test]
fn keys_that_do_not_fit_and_certificates_that_go_on_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (a, b, narrow, other) = (path("keys"), path("b"), path("narrow"), path("other"));
    good(&["init", &a, "--host", "hosta"]);
    good(&["init", &other, "--host", "hostc"]);
    let said = good(&["issue", "--host", "hostb", "--keys", &a, "--to", &b]);
    assert!(!said.contains("still count"), "{said}");
    let wide = show(&b)["host"]["serial"].as_str().unwrap().to_owned();
    let said =
        good(&["issue", "--host", "hostb", "--keys", &a, "--to", &narrow, "--vm", &"7".repeat(32), "--hold"]);
    let ends = format!("outlive keys revoke {wide} --keys {a}    # may send and hold any VM");
    assert!(said.contains("still count") && said.contains(&ends), "{said}");

    let said = good(&["revoke", "00112233445566778899aabbccddeeff", "--keys", &a]);
    assert!(said.contains("no certificate with this serial number was made here"), "{said}");
    let said = good(&["revoke", &wide, "--keys", &a]);
    assert!(!said.contains("was made here") && !said.contains("itself"), "{said}");
    let said = good(&["revoke", "hosta", "--keys", &a]);
    assert!(said.contains("the certificate of this host itself, hosta: no host accepts it"), "{said}");
    let run = |keys: &str| {
        let words =
            ["run", "--standby", "127.0.0.1:9", "--arbiter", "file:/x", "--sandbox", "off", "--keys", keys];
        let output = Command::new(env!("CARGO_BIN_EXE_outlive")).args(words).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(run(&a).contains("of hosta is revoked"), "{}", run(&a));
    good(&["rotate", "--keys", &a]);

    fs::copy(format!("{other}/ca.crt"), format!("{b}/ca.crt")).unwrap();
    for said in [refused(&["show", "--keys", &b]), run(&b)] {
        assert!(said.contains(&format!("{b}/host.pem")) && said.contains("issue --host hostb"), "{said}");
    }
}

/// Who is not root's umask, and root's.
#[test]
fn keys_are_their_owners_whatever_the_umask() {
    let folder = tempfile::tempdir().unwrap();
    for umask in ["000", "022", "077", "277"] {
        let script = format!("umask {umask} && \"$0\" keys init {umask}/keys --host hosta --issue b{umask}");
        let program = env!("CARGO_BIN_EXE_outlive");
        let done =
            Command::new("sh").args(["-c", &script, program]).current_dir(folder.path()).status().unwrap();
        assert!(done.success(), "{umask}");
        let at = |name: &str| mode(&folder.path().join(name));
        let made = ["keys", "keys/host.pem", "keys/ca.crt", "keys-ca", "keys-ca/issued", "keys-ca/ca.pem"];
        assert_eq!(
            made.map(|name| at(&format!("{umask}/{name}"))),
            [0o700, 0o600, 0o644, 0o700, 0o700, 0o600],
            "{umask}"
        );
        assert_eq!(at(umask) & 0o022, 0, "{umask}");
        assert_eq!(at(&format!("b{umask}.keys")), 0o700);
    }
}

/// As in `outlive keys show | head -1`.
#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (keys, image) = (path("keys"), path("image"));
    fs::write(&image, [0; 4096]).unwrap();
    let arbiter = format!("file:{}", path("arbiter"));
    fs::create_dir(path("arbiter")).unwrap();
    for words in [
        &["keys", "init", &keys, "--host", "hosta"][..],
        &["keys", "issue", "--host", "hostb", "--keys", &keys, "--to", &path("hostb")],
        &["keys", "show", "--keys", &keys],
        &["keys", "show", "--json", "--keys", &keys],
        &["arbiter", "init", &arbiter],
        &["arbiter", "list", &arbiter, "--json"],
        &["image", "show", &image],
        &["completions", "bash"],
        &["man"],
        &["vm", "--help"],
        &["node", "check", "--vms", &path("arbiter"), "--json"],
    ] {
        let (read, write) = std::io::pipe().unwrap();
        drop(read);
        let command = Command::new(env!("CARGO_BIN_EXE_outlive")).args(words).stdout(write).output().unwrap();
        let said = String::from_utf8(command.stderr).unwrap();
        assert!(
            command.status.code() == Some(0) && said.is_empty(),
            "{words:?}: {:?} {said}",
            command.status
        );
    }
    assert!(fs::exists(path("hostb")).unwrap(), "it was made all the same");
    // A full disk is another matter.
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let words = ["keys", "show", "--keys", &keys];
    let command = Command::new(env!("CARGO_BIN_EXE_outlive")).args(words).stdout(full).output().unwrap();
    assert_eq!(command.status.code(), Some(2));
}
