use std::path::Path;
use std::time::Duration;

use clap::{CommandFactory, Parser};
use outlive_machine::SectorSize;

use super::values::{parse_interval, parse_mac};
use super::*;

#[test]
fn the_definition_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn sizes_and_times_are_read() {
    assert_eq!(parse_size("256M"), Ok(256 << 20));
    assert_eq!(parse_size("2GiB"), Ok(2 << 30));
    assert_eq!(parse_size("4096"), Ok(4096));
    assert_eq!((parse_size("1.5G"), parse_size("0.25MiB")), (Ok(3 << 29), Ok(1 << 18)));
    for bad in
        ["", "M", "-1", "1X", "99999999999T", "1.5", ".5G", "1.G", "1.2345G", "1.5.5G", "+1G", "1.+5G", "²G"]
    {
        assert!(parse_size(bad).is_err(), "{bad}");
    }
    assert_eq!(parse_time("500us"), Ok(Duration::from_micros(500)));
    for bad in ["", "ms", "1", "1d", "-1ms", "99999999999999999999h", "9999999999999999999h"] {
        assert!(parse_time(bad).is_err(), "{bad}");
    }
    assert_eq!(
        (parse_time("5m"), parse_time("1h")),
        (Ok(Duration::from_secs(300)), Ok(Duration::from_secs(3600)))
    );
    assert!(parse_interval("1us").is_err() && parse_interval("1ms").is_ok());
}

#[test]
fn cards_are_read() {
    let spec: NetSpec = "tap=t0,bridge=br0,mac=02:00:00:00:00:09".parse().unwrap();
    assert_eq!((spec.tap.as_str(), spec.bridge.as_deref()), ("t0", Some("br0")));
    assert_eq!(spec.mac, Some([2, 0, 0, 0, 0, 9]));
    for bad in
        ["", "bridge=br0", "tap=", "tap=sixteen-letters-", "tap=a/b", "tap=t,mac=1", "tap=t,colour=red"]
    {
        assert!(bad.parse::<NetSpec>().is_err(), "{bad}");
    }
    for bad in
        ["01:00:00:00:00:00", "00:00:00:00:00:00", "02:00:00:00:00:00:00", "2:0:0:0:0:0", "+2:00:00:00:00:00"]
    {
        assert!(parse_mac(bad).is_err(), "{bad}");
    }
}

#[test]
fn protection_needs_an_arbiter() {
    let parse = |args: &[&str]| Cli::try_parse_from(["outlive", "run"].iter().chain(args));
    assert!(parse(&[]).is_ok());
    assert!(parse(&["--standby", "b:7000"]).is_err());
    assert!(parse(&["--standby", "b:7000", "--arbiter", "file:/x"]).is_ok());
    for bad in ["10.0.0.1", "10.0.0.0/24", "10.0.0.255/24", "10.0.0.4/30", "10.0.0.7/30"] {
        assert!(parse(&["--ip", bad]).is_err(), "{bad}");
    }
    assert!(parse(&["--ip", "10.0.1.255/23"]).is_err() && parse(&["--ip", "10.0.0.255/23"]).is_ok());
    assert!(parse(&["--nonsense"]).is_err());
    for bad in ["b", "b:", ":7000", "b:0", "b:70000", ""] {
        assert!(parse(&["--standby", bad, "--arbiter", "file:/x"]).is_err(), "{bad}");
    }
    assert!(parse(&["--standby", "[::1]:7000", "--arbiter", "file:/x"]).is_ok());
    let standby = |args: &[&str]| {
        Cli::try_parse_from(["outlive", "standby", "--arbiter", "file:/x"].iter().chain(args))
    };
    assert!(standby(&["--listen", "0.0.0.0:7000", "--net", "tap=t"]).is_ok());
    assert!(standby(&["--listen", "7000"]).is_err() && standby(&["--listen", ":7000"]).is_err());
    assert!(standby(&["--listen", "0.0.0.0:7000", "--net", "tap=t,mac=02:00:00:00:00:01"]).is_err());
}

/// A heading holds for all options after it, so those of a flattened struct may take others along.
#[test]
fn only_dangers_stand_under_their_heading() {
    let cli = Cli::command();
    for command in ["run", "standby"] {
        let command = cli.find_subcommand(command).unwrap();
        for option in command.get_arguments() {
            let danger = option.get_id().as_str().starts_with("accept_");
            assert_eq!(option.get_help_heading().is_some(), danger, "{option}");
        }
    }
}

#[test]
fn a_standby_that_is_its_own_is_refused() {
    let refused = |listen: &str, standby: &str| {
        let words = ["outlive", "standby", "--arbiter", "file:/x", "--listen", listen, "--standby", standby];
        let Command::Standby(options) = Cli::try_parse_from(words).unwrap().command else { unreachable!() };
        options.refuse_itself().is_err()
    };
    for (listen, standby) in [
        ("10.0.0.5:7000", "10.0.0.5:7000"),
        ("0.0.0.0:7000", "127.0.0.1:7000"),
        ("[::]:7000", "[::1]:7000"),
        ("0.0.0.0:7000", "localhost:7000"),
        ("127.0.0.1:7000", "LocalHost:7000"),
        ("127.0.0.1:7000", "0.0.0.0:7000"),
        ("hosta:7000", "HostA:7000"),
    ] {
        assert!(refused(listen, standby), "{listen} {standby}");
    }
    let own = format!("{}:7000", crate::process::host_name());
    assert!(refused("0.0.0.0:7000", &own), "{own}");
    for (listen, standby) in [
        ("0.0.0.0:7000", "127.0.0.1:7001"),
        // TEST-NET-1, which no host has (RFC 5737).
        ("0.0.0.0:7000", "192.0.2.1:7000"),
        ("10.0.0.5:7000", "10.0.0.6:7000"),
        ("0.0.0.0:7000", "no-such-host.invalid:7000"),
        ("0.0.0.0:0", "127.0.0.1:7000"),
    ] {
        assert!(!refused(listen, standby), "{listen} {standby}");
    }
}

#[test]
fn disks_are_read() {
    let disk: DiskSpec = "path=/srv/a.img,readonly,serial=db-1,queues=4".parse().unwrap();
    assert_eq!((disk.path.as_path(), disk.readonly, disk.shared), (Path::new("/srv/a.img"), true, false));
    assert_eq!((disk.serial.as_deref(), disk.queues), (Some("db-1"), 4));
    let disk: DiskSpec = "path=b.img,shared".parse().unwrap();
    assert_eq!((disk.shared, disk.queues), (true, 1));
    assert_eq!(disk.sectors, None);
    let disk: DiskSpec = "path=c.img,sector=4096".parse().unwrap();
    assert_eq!(disk.sectors, Some(SectorSize::Large));
    for bad in [
        "",
        "path=a,sector=1024",
        "path=a,sector=",
        "readonly",
        "path=",
        "path=a,size=3",
        "path=a,queues=0",
        "path=a,queues=17",
        "path=a,serial=twenty-one-characters",
        "path=a,serial=\u{e9}",
        "path=a,shared,readonly",
        "a.img",
    ] {
        assert!(bad.parse::<DiskSpec>().is_err(), "{bad}");
    }
}

#[test]
fn a_linux_guest_has_its_options() {
    let parse = |args: &[&str]| Cli::try_parse_from(["outlive", "run"].iter().chain(args));
    assert!(parse(&["--kernel", "vmlinuz"]).is_ok());
    assert!(parse(&["--kernel", "vmlinuz", "--initrd", "i", "--append", "a b", "--disk", "path=d"]).is_ok());
    assert!(parse(&["--kernel", "vmlinuz", "--vcpus", "32"]).is_ok());
    for bad in ["x", "0", "33", "-1"] {
        let error = parse(&["--vcpus", bad]).unwrap_err().to_string();
        assert!(bad == "-1" || error.contains(&format!("'{bad}' is not a number from 1 to 32")), "{error}");
    }
    for bad in [&["--initrd", "i"][..], &["--append", "a"], &["--vcpus", "33"]] {
        assert!(parse(bad).is_err(), "{bad:?}");
    }
    assert!(parse(&["--kernel", "k", "--ip", "10.0.0.1/24"]).is_err(), "Linux sets its addresses itself");
    assert_eq!("stdio".parse(), Ok(ConsoleSpec::Stdio));
    assert_eq!("./stdio".parse(), Ok(ConsoleSpec::Directory("./stdio".into())));
    assert!("".parse::<ConsoleSpec>().is_err());
}

#[test]
fn an_operators_word_names_a_generation() {
    for command in ["take-over", "go-on-alone", "give-up"] {
        assert!(Cli::try_parse_from(["outlive", command, "--generation", "2"]).is_ok());
        assert!(Cli::try_parse_from(["outlive", command]).is_err());
        // The first is won by whoever makes the VM.
        assert!(Cli::try_parse_from(["outlive", command, "--generation", "1"]).is_err());
    }
}

#[test]
fn a_guest_boots_from_one_of_its_disks_or_from_a_file() {
    let run = |args: &[&str]| match Cli::try_parse_from(["outlive", "run"].iter().chain(args)) {
        Ok(Cli { command: Command::Run(options), .. }) => Ok(options),
        Ok(_) => unreachable!("it is run"),
        Err(error) => Err(error.to_string()),
    };
    let disks = ["--disk", "path=/a", "--disk", "path=/b,serial=system", "--disk", "path=/c,serial=0"];
    let boots = |boot: &str| run(&[&["--boot", boot][..], &disks].concat()).unwrap().boot_disk();
    assert_eq!((boots("disk"), boots("disk=1"), boots("disk=system")), (Some(0), Some(1), Some(1)));
    assert_eq!(
        (boots("disk=0"), boots("disk=3"), boots("disk=none")),
        (Some(2), None, None),
        "serial numbers first"
    );
    let options = run(&[&["--boot", "disk"][..], &disks].concat()).unwrap();
    assert_eq!((options.memory_bytes(), options.append), (1 << 30, None));
    for bad in ["", "disk=", "kernel", "disk1"] {
        assert!(run(&[&["--boot", bad][..], &disks].concat()).unwrap_err().contains("disk=SERIAL"), "{bad}");
    }
    for with in [["--kernel", "/k"], ["--initrd", "/i"], ["--ip", "10.0.0.2/24"]] {
        assert!(run(&[&["--boot", "disk"][..], &with, &disks].concat()).is_err(), "{with:?}");
    }
    assert!(run(&["--boot", "disk"]).is_err(), "no disk");
    assert!(run(&["--append", "quiet"]).is_err() && run(&["--kernel", "/k", "--append", "quiet"]).is_ok());
    assert_eq!(run(&["--kernel", "/k"]).unwrap().command_line(), "console=ttyS0");
}

#[test]
fn a_node_is_asked_here_or_on_another_host() {
    let parse = |words: &[&str]| Cli::try_parse_from(["outlive"].iter().chain(words)).map(drop);
    for good in [
        &["vm", "list", "--host", "hosta", "--keys", "/k"][..],
        &["vm", "stop", "web", "--host", "hosta@[::1]:7021"],
        &["node", "drain", "--host", "10.0.0.1"],
        &["node", "run", "--listen", "0.0.0.0:7020", "--keys", "/k", "--host", "hosta"],
        &["keys", "operator", "alice", "--days", "90"],
        &["top"],
        &["top", "web", "--once", "--host", "hosta", "--keys", "/k"],
    ] {
        parse(good).unwrap_or_else(|why| panic!("{good:?}: {why}"));
    }
    for bad in [
        &["vm", "list", "--host", "hosta", "--socket", "/s"][..],
        &["vm", "list", "--host", "hosta:0"],
        &["vm", "list", "--host", "::1"],
        &["node", "run", "--listen", "7020"],
        &["node", "run", "--keys", "/k"],
        &["keys", "operator"],
        &["top", "--socket", "/s", "--host", "hosta"],
        &["top", "--json"],
    ] {
        parse(bad).expect_err(&bad.join(" "));
    }
}
