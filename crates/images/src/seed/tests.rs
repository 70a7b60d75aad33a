//! Seeds, as others read them.

use std::path::Path;
use std::process::Command;

use super::kinds::MistakeError;
use super::{BYTES, MOST, Seed, SeedError};

const USER: &[u8] = b"#cloud-config\npassword: x\n";

fn seed<'a>() -> Seed<'a> {
    Seed { user_data: USER, ..Seed::default() }
}

/// The output of a program of Debian. `None` if it is not installed.
fn output(program: &str, package: &str, arguments: &[&str]) -> Option<Vec<u8>> {
    let Ok(output) = Command::new(program).args(arguments).output() else {
        println!("skipped: no {program} (apt-get install {package})");
        return None;
    };
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    Some(output.stdout)
}

fn largest() -> Vec<u8> {
    let mut text = b"#cloud-config\n# ".to_vec();
    text.extend((0..MOST - 200_000).map(|at| b'a' + (at % 23) as u8));
    text
}

#[test]
fn other_programs_find_the_files_by_their_names_and_whole() {
    let (large, network) = (largest(), vec![b'#'; 5000]);
    let network = [b"version: 2\n", &network[..]].concat();
    let seed = Seed { user_data: &large, network_config: Some(&network), vendor_data: Some(USER), ..seed() };
    let file = tempfile::NamedTempFile::new().unwrap();
    let image = seed.image().unwrap();
    assert_eq!(image.len() as u64, BYTES);
    std::fs::write(file.path(), image).unwrap();
    let path = file.path().to_str().unwrap();
    let arguments = ["-p", "-o", "export", path];
    let Some(said) = output("/usr/sbin/blkid", "util-linux", &arguments) else { return };
    let said = String::from_utf8(said).unwrap();
    for line in ["LABEL=CIDATA", "TYPE=vfat", "VERSION=FAT12"] {
        assert!(said.lines().any(|it| it == line), "{said}");
    }
    let Some(said) = output("fsck.fat", "dosfstools", &["-n", "-v", path]) else { return };
    let said = String::from_utf8(said).unwrap();
    assert!(said.contains(" 5 files, ") || said.contains(" 4 files, "), "{said}");
    for (name, contents) in [("user-data", &large[..]), ("network-config", &network), ("vendor-data", USER)] {
        let Some(read) = output("mcopy", "mtools", &["-i", path, &format!("::{name}"), "-"]) else { return };
        assert!(read == contents, "{name}");
    }
    let list = output("mdir", "mtools", &["-i", path, "-b", "::"]).unwrap();
    let list = String::from_utf8(list).unwrap();
    let names: Vec<_> = list.lines().map(|line| line.trim_start_matches("::/")).collect();
    assert_eq!(names, ["user-data", "meta-data", "network-config", "vendor-data"]);
}

/// What the kernel of a guest does.
#[test]
fn the_kernel_mounts_it() {
    let directory = tempfile::tempdir().unwrap();
    let (image, mount) = (directory.path().join("seed.img"), directory.path().join("mount"));
    std::fs::write(&image, seed().image().unwrap()).unwrap();
    std::fs::create_dir(&mount).unwrap();
    let mounted =
        Command::new("mount").args(["-o", "loop,ro", "-t", "vfat"]).arg(&image).arg(&mount).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        return println!("skipped: mounts of FAT file systems");
    }
    let read = |name: &str| std::fs::read(Path::new(&mount).join(name));
    let (user, meta) = (read("user-data"), read("meta-data"));
    assert!(Command::new("umount").arg(&mount).status().unwrap().success());
    assert_eq!(user.unwrap(), USER);
    assert!(meta.unwrap().starts_with(b"instance-id: outlive-"));
}

#[test]
fn the_same_input_makes_the_same_seed_and_another_one_a_new_instance() {
    assert!(seed().image().unwrap() == seed().image().unwrap());
    let id = |seed: &Seed<'_>| seed.made_meta_data().lines().next().unwrap().to_owned();
    let named = Seed { hostname: Some("web-1.example.org"), ..seed() };
    let other = Seed { user_data: b"#!/bin/sh\n", ..seed() };
    let network = Seed { network_config: Some(b"version: 2"), ..seed() };
    let vendor = Seed { vendor_data: Some(b"version: 2"), ..seed() };
    let ids: std::collections::HashSet<_> = [seed(), named, other, network, vendor].iter().map(id).collect();
    assert_eq!(ids.len(), 5);
    assert!(named.made_meta_data().ends_with("\nlocal-hostname: \"web-1.example.org\"\n"));
    let empty = Seed { meta_data: Some(b"instance-id: mine"), ..seed() };
    let image = empty.image().unwrap();
    assert!(image.windows(17).any(|it| it == b"instance-id: mine"));
    assert!(!image.windows(8).any(|it| it == b"outlive-"));
}

#[test]
fn what_cloud_init_would_pass_over_is_refused() {
    let image = |user_data: &[u8]| Seed { user_data, ..seed() }.image();
    for good in [
        &b"#cloud-config\r\nusers: []\r\n"[..],
        b"\n\n#cloud-config",
        b"#!/bin/sh\ntrue\n",
        b"#!/bin/sh\n\ttrue\n",
        b"#include\nhttps://example.org/x\n",
        b"#include-once\nhttps://example.org/x\n",
        b"#cloud-boothook\n",
        b"#cloud-config-archive\n",
        b"## template: jinja\n#cloud-config\n",
        b"Content-Type: multipart/mixed; boundary=\"=\"\n",
        b"MIME-Version: 1.0\n",
        b"\x1f\x8b\x08\xff\xfe",
    ] {
        image(good).unwrap_or_else(|why| panic!("{}: {why}", String::from_utf8_lossy(good)));
    }
    let mistake = |text: &[u8]| match image(text) {
        Err(SeedError::Mistake { file: "user-data", mistake }) => mistake,
        other => panic!("{}: {:?}", String::from_utf8_lossy(text), other.err()),
    };
    assert_eq!(mistake(b""), MistakeError::Empty);
    assert_eq!(mistake(b" \n"), MistakeError::Empty);
    assert!(matches!(mistake(b"# cloud-config\nusers: []"), MistakeError::Space(_)));
    assert!(matches!(mistake(b"cloud-config\n"), MistakeError::Space(_)));
    assert!(matches!(mistake(b"users: []\n"), MistakeError::Unknown(_)));
    assert!(matches!(mistake(b"\xef\xbb\xbf#cloud-config\n"), MistakeError::Unknown(_)), "a byte order mark");
    assert_eq!(mistake(b"#cloud-config\nusers:\n\t- x\n"), MistakeError::Tab(3));
    assert_eq!(mistake(b"#!/bin/sh\r\ntrue\r\n"), MistakeError::Windows);
    assert_eq!(mistake(b"#cloud-config\n\xff"), MistakeError::NotText(14));
    assert_eq!(mistake(b"#cloud-config\n\0"), MistakeError::NotText(14));
    for (seed, why) in [
        (Seed { network_config: Some(b"ethernets: {}"), ..seed() }, "version: 2"),
        (Seed { meta_data: Some(b"local-hostname: x"), ..seed() }, "instance-id"),
        (Seed { vendor_data: Some(b"x"), ..seed() }, "vendor-data: "),
        (Seed { hostname: Some("-web"), ..seed() }, "is not a host name"),
        (Seed { hostname: Some("web\nx: y"), ..seed() }, "is not a host name"),
        (Seed { hostname: Some(""), ..seed() }, "is not a host name"),
        (Seed { user_data: &[&b"#!"[..], &vec![b' '; MOST]].concat(), ..seed() }, "the most"),
    ] {
        let said = seed.image().unwrap_err().to_string();
        assert!(said.contains(why) && !said.contains('\n'), "{said}");
    }
}
