//! The values of options: how they are written, and one line for each mistake.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use outlive_epoch::Wiring;
use outlive_machine::SectorSize;
use outlive_record::Keep;

use crate::standby::{FenceCheckError, check_fence};

/// A network card: `tap=NAME[,bridge=BR][,mac=MAC][,queues=N][,mtu=N][,vlan=N]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetSpec {
    /// Name of the tap interface, 1 to 15 characters.
    pub tap: String,
    /// Bridge that the tap joins.
    pub bridge: Option<String>,
    /// The card's address; without it, one is made from the VM's id, or from the built-in guest's `--ip`.
    pub mac: Option<[u8; 6]>,
    /// Pairs of queues, 1 to 8.
    pub queues: u8,
    /// The largest packet that the guest is told it may send.
    pub mtu: Option<u16>,
    /// The VLAN of the bridge's port.
    pub vlan: Option<u16>,
}

/// What a guest boots: `disk`, or `disk=` with the disk's serial number or its position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootFrom(pub Option<String>);

impl FromStr for BootFrom {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None if text == "disk" => Ok(Self(None)),
            Some(("disk", which)) if !which.is_empty() => Ok(Self(Some(which.to_owned()))),
            _ => Err(format!(
                "'{text}' is not disk, disk=N or disk=SERIAL; a kernel's file is given with --kernel"
            )),
        }
    }
}

impl NetSpec {
    /// What both hosts must have alike.
    pub fn wiring(&self) -> Wiring {
        Wiring { mtu: self.mtu, vlan: self.vlan }
    }
}

impl FromStr for NetSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (tap, bridge, mac, mtu, vlan) = Default::default();
        let mut spec = Self { tap, bridge, mac, queues: 1, mtu, vlan };
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("tap", name)) => spec.tap = interface_name(name)?,
                Some(("bridge", name)) => spec.bridge = Some(interface_name(name)?),
                Some(("mac", mac)) => spec.mac = Some(parse_mac(mac)?),
                Some(("queues", number)) => spec.queues = parse_queues(number, 8)?,
                Some(("mtu", bytes)) => spec.mtu = Some(parse_mtu(bytes)?),
                Some(("vlan", number)) => spec.vlan = Some(parse_vlan(number)?),
                _ => {
                    return Err(format!(
                        "'{part}' is not tap=NAME, bridge=NAME, mac=MAC, queues=N, mtu=N or vlan=N"
                    ));
                }
            }
        }
        if spec.tap.is_empty() {
            return Err("tap=NAME is missing".into());
        }
        if spec.vlan.is_some() && spec.bridge.is_none() {
            return Err("vlan= is the VLAN of a bridge's port: give bridge=NAME as well".into());
        }
        Ok(spec)
    }
}

/// The largest MTU of a tap.
const MAX_MTU: u16 = 65_521;

fn parse_mtu(text: &str) -> Result<u16, String> {
    // 1280 is what IPv6 needs; a Linux guest gives it up below that.
    let mtu = text.parse().ok().filter(|mtu| (1280..=MAX_MTU).contains(mtu));
    mtu.ok_or_else(|| format!("'{text}' is not an MTU from 1280 to {MAX_MTU}, for example 9000"))
}

fn parse_vlan(text: &str) -> Result<u16, String> {
    let vlan = text.parse().ok().filter(|vlan| (1..=Wiring::MAX_VLAN).contains(vlan));
    vlan.ok_or_else(|| format!("'{text}' is not a VLAN from 1 to {}", Wiring::MAX_VLAN))
}

fn interface_name(name: &str) -> Result<String, String> {
    let good = !name.is_empty()
        && name.len() <= 15
        && name.bytes().all(|b| b.is_ascii_graphic() && !b"/:%".contains(&b))
        && name != "."
        && name != "..";
    if good {
        Ok(name.into())
    } else {
        Err(format!("'{name}' is not an interface name of 1 to 15 characters"))
    }
}

pub(super) fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let wrong = || format!("'{text}' is not a MAC address like 02:00:00:00:00:01");
    let mut mac = [0u8; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
        let part = part.ok_or_else(wrong)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    if parts.next().is_some() {
        return Err(wrong());
    }
    if mac[0] & 1 == 1 || mac == [0; 6] {
        return Err(format!("'{text}' is a multicast or zero address, which no network card can have"));
    }
    Ok(mac)
}

/// An IPv4 address with its prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpSpec {
    /// The address.
    pub address: Ipv4Addr,
    /// The prefix length, 1 to 30.
    pub prefix: u8,
}

impl FromStr for IpSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is not ADDRESS/LENGTH, for example 10.77.0.2/24");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address: Ipv4Addr = address.parse().map_err(|_| wrong())?;
        let prefix = prefix.parse().ok().filter(|p| (1..=30).contains(p)).ok_or_else(wrong)?;
        let hosts = u32::MAX >> prefix;
        match address.to_bits() & hosts {
            0 => Err(format!(
                "'{text}' is the address of a network: give one of its hosts, for example with .2 at the end"
            )),
            host if host == hosts => {
                Err(format!("'{text}' is the broadcast address of its network: give one of its hosts"))
            }
            _ => Ok(Self { address, prefix }),
        }
    }
}

/// A size in bytes: a number with an optional K, M, G or T (powers of 1024).
///
/// # Errors
/// One line that shows a right one.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is not a size like 256M, 1.5G or 2G");
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift: u32 = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(wrong()),
    };
    // At most three decimals; a number of bytes has none.
    let (whole, decimals) = digits.split_once('.').unwrap_or((digits, "0"));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(whole) || !is_number(decimals) || decimals.len() > 3 {
        return Err(wrong());
    }
    let whole: u64 = whole.parse().map_err(|_| wrong())?;
    let thousandths: u64 = format!("{decimals:0<3}").parse().map_err(|_| wrong())?;
    let part = (thousandths << shift) / 1000;
    if shift == 0 && thousandths > 0 {
        return Err(wrong());
    }
    whole.checked_mul(1 << shift).and_then(|bytes| bytes.checked_add(part)).ok_or_else(wrong)
}

/// A time: a number with us, ms, s, m or h.
///
/// # Errors
/// One line that shows a right one.
pub fn parse_time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("'{text}' is not a time like 500us, 1ms, 2s, 5m or 1h");
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    match &text[digits.len()..] {
        "us" => Ok(Duration::from_micros(number)),
        "ms" => Ok(Duration::from_millis(number)),
        "s" => Ok(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs).ok_or_else(wrong),
        "h" => number.checked_mul(3600).map(Duration::from_secs).ok_or_else(wrong),
        _ => Err(wrong()),
    }
}

/// An age: any sum of times from seconds to years.
pub(super) fn parse_age(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| format!("'{text}' is not an age like 12h or 30days"))
}

pub(super) fn parse_host_port(text: &str) -> Result<String, String> {
    let good = text.rsplit_once(':').is_some_and(|(host, port)| {
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    if good { Ok(text.into()) } else { Err(format!("'{text}' is not HOST:PORT, for example hostb:7000")) }
}

pub(super) fn parse_listen(text: &str) -> Result<String, String> {
    let good = text
        .rsplit_once(':')
        .is_some_and(|(address, port)| !address.is_empty() && port.parse::<u16>().is_ok());
    if good { Ok(text.into()) } else { Err(format!("'{text}' is not ADDR:PORT, for example 0.0.0.0:7000")) }
}

pub(super) fn parse_standby_card(text: &str) -> Result<NetSpec, String> {
    let spec: NetSpec = text.parse()?;
    if spec.mac.is_some() || text.contains("queues=") || spec.mtu.is_some() || spec.vlan.is_some() {
        return Err(
            "mac=, queues=, mtu= and vlan= belong to outlive run: a standby's card is like the VM's".into()
        );
    }
    Ok(spec)
}

pub(super) fn parse_interval(text: &str) -> Result<Duration, String> {
    let time = parse_time(text)?;
    // Output waits for the end of its epoch; beyond a second not even an address would be resolved.
    if time < Duration::from_micros(100) || time > Duration::from_secs(1) {
        return Err(format!("'{text}' is out of range: give 100us to 1s"));
    }
    Ok(time)
}

pub(super) fn parse_dead_after(text: &str) -> Result<Duration, String> {
    let time = parse_time(text)?;
    if time < Duration::from_millis(20) || time > Duration::from_secs(60) {
        return Err(format!("'{text}' is out of range: give 20ms to 60s"));
    }
    Ok(time)
}

pub(super) fn parse_stop_within(text: &str) -> Result<Duration, String> {
    let time = parse_time(text)?;
    if time < Duration::from_millis(100) || time > Duration::from_secs(3600) {
        return Err(format!("'{text}' is out of range: give 100ms to 1h"));
    }
    Ok(time)
}

pub(super) fn parse_max_pause(text: &str) -> Result<Duration, String> {
    let time = parse_time(text)?;
    if time < Duration::from_millis(5) || time > Duration::from_secs(10) {
        return Err(format!("'{text}' is out of range: give 5ms to 10s"));
    }
    Ok(time)
}

pub(super) fn parse_uplink_timeout(text: &str) -> Result<Duration, String> {
    let time = parse_time(text)?;
    if time < Duration::from_millis(100) || time > Duration::from_secs(60) {
        return Err(format!("'{text}' is out of range: give 100ms to 60s"));
    }
    Ok(time)
}

pub(super) fn parse_events_max(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    if bytes < 64 << 10 {
        return Err(format!("'{text}' is too small: give 64K or more"));
    }
    Ok(bytes)
}

pub(super) fn parse_fence(text: &str) -> Result<String, FenceCheckError> {
    check_fence(text).map(|()| text.to_owned())
}

pub(super) fn parse_fence_timeout(text: &str) -> Result<Duration, String> {
    let time = parse_time(text)?;
    if time < Duration::from_millis(100) || time > Duration::from_secs(3600) {
        return Err(format!("'{text}' is out of range: give 100ms to 1h"));
    }
    Ok(time)
}

/// How long a disk may take to answer; `None`: as long as it likes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskTimeout(pub Option<Duration>);

impl FromStr for DiskTimeout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self(None));
        }
        let time = parse_time(text)?;
        if time < Duration::from_secs(1) || time > Duration::from_secs(3600) {
            return Err(format!("'{text}' is out of range: give 1s to 1h, or off"));
        }
        Ok(Self(Some(time)))
    }
}

pub(super) fn parse_vcpus(text: &str) -> Result<u8, String> {
    let number = text.parse().ok().filter(|number| (1..=32).contains(number));
    number.ok_or_else(|| format!("'{text}' is not a number from 1 to 32"))
}

pub(super) fn parse_name(text: &str) -> Result<String, String> {
    let good = (1..=64).contains(&text.len()) && text.chars().all(|c| c.is_ascii_graphic());
    if good { Ok(text.into()) } else { Err("a name has 1 to 64 visible ASCII characters".into()) }
}

/// A disk: `path=FILE[,readonly][,shared][,thin][,serial=TEXT][,queues=N][,sector=BYTES]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// A raw image or a block device.
    pub path: PathBuf,
    /// The guest may only read it.
    pub readonly: bool,
    /// Both hosts see the same disk, so its writes wait for their commit and nothing is copied.
    pub shared: bool,
    /// The file system of a standby's copy need not have room for all of it.
    pub thin: bool,
    /// What the guest reads as the disk's serial number, up to 20 characters.
    pub serial: Option<String>,
    /// Size of the guest's sectors; 512 bytes if not given.
    pub sectors: Option<SectorSize>,
    /// Request queues, 1 to 16.
    pub queues: u8,
}

impl FromStr for DiskSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (readonly, shared, thin) = (false, false, false);
        let mut spec =
            Self { path: PathBuf::new(), readonly, shared, thin, serial: None, sectors: None, queues: 1 };
        for part in text.split(',') {
            match (part, part.split_once('=')) {
                ("readonly", _) => spec.readonly = true,
                ("shared", _) => spec.shared = true,
                ("thin", _) => spec.thin = true,
                (_, Some(("path", path))) => spec.path = path.into(),
                (_, Some(("serial", serial))) => spec.serial = Some(parse_serial(serial)?),
                (_, Some(("queues", number))) => spec.queues = parse_queues(number, 16)?,
                (_, Some(("sector", bytes))) => spec.sectors = Some(parse_sector(bytes)?),
                _ => {
                    return Err(format!(
                        "'{part}' is not path=FILE, readonly, shared, thin, serial=TEXT, queues=N or sector=BYTES"
                    ));
                }
            }
        }
        if spec.path.as_os_str().is_empty() {
            return Err("path=FILE is missing".into());
        }
        if spec.thin && (spec.shared || spec.readonly) {
            return Err(
                "thin is about a standby's copy of a disk, and a shared or read-only one is not copied"
                    .into(),
            );
        }
        if spec.shared && spec.readonly {
            return Err("a disk that nobody writes does not need shared: give readonly alone".into());
        }
        Ok(spec)
    }
}

fn parse_serial(text: &str) -> Result<String, String> {
    if (1..=20).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic()) {
        Ok(text.into())
    } else {
        Err(format!("'{text}' is not a serial number of 1 to 20 visible ASCII characters"))
    }
}

fn parse_sector(text: &str) -> Result<SectorSize, String> {
    let size = text.parse().ok().and_then(SectorSize::from_bytes);
    size.ok_or_else(|| format!("sector={text}: give 512 or 4096"))
}

fn parse_queues(text: &str, most: u8) -> Result<u8, String> {
    text.parse().ok().filter(|n| (1..=most).contains(n)).ok_or(format!("'{text}' queues: give 1 to {most}"))
}

/// A standby's disk: `path=FILE[,overwrite][,thin]`. Everything else comes from the primary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StandbyDisk {
    /// The image.
    pub path: PathBuf,
    /// It is overwritten whatever it holds.
    pub overwrite: bool,
    /// Its file system need not have room for all of it.
    pub thin: bool,
    /// What the disk is, where an operator has said it on this host, as for a VM that ran here before. Otherwise the
    /// primary says it.
    pub said: Option<DiskUse>,
}

/// What a disk is to its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskUse {
    /// The guest cannot write to it.
    pub readonly: bool,
    /// All hosts have the same one.
    pub shared: bool,
}

impl FromStr for StandbyDisk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut disk = Self { path: PathBuf::new(), overwrite: false, thin: false, said: None };
        for part in text.split(',') {
            match (part, part.strip_prefix("path=")) {
                ("overwrite", _) => disk.overwrite = true,
                ("thin", _) => disk.thin = true,
                (_, Some(path)) => disk.path = path.into(),
                _ => {
                    return Err(format!(
                        "'{part}' is not path=FILE, overwrite or thin; the rest of a disk belongs to outlive run"
                    ));
                }
            }
        }
        if disk.path.as_os_str().is_empty() { Err("path=FILE is missing".into()) } else { Ok(disk) }
    }
}

/// Where a standby records its VM, and how much of it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordSpec {
    /// The directory.
    pub directory: PathBuf,
    /// How much.
    pub keep: Keep,
}

impl FromStr for RecordSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = text.rsplit_once(",keep=").map_or(text, |(directory, _)| directory);
        if let Some((_, option)) = known.rsplit_once(',')
            && option.contains('=')
        {
            return Err(format!("'{option}' is no option of a record: there is keep=TIME|SIZE"));
        }
        let (directory, keep) = match text.rsplit_once(",keep=") {
            Some((directory, keep)) => (directory, parse_keep(keep)?),
            None => (text, Keep::Time(Duration::from_secs(600))),
        };
        if directory.is_empty() || directory.starts_with("keep=") {
            return Err("the directory is missing: give DIR or DIR,keep=10m".into());
        }
        Ok(Self { directory: directory.into(), keep })
    }
}

/// A time like `10m`, or a size like `20G`. `5m` is a time and `5M` a size.
fn parse_keep(text: &str) -> Result<Keep, String> {
    let day = text.strip_suffix('d').and_then(|days| days.parse::<u64>().ok());
    let time = day.and_then(|days| days.checked_mul(86_400)).map(Duration::from_secs);
    if let Some(time) = time.or_else(|| parse_time(text).ok()) {
        let fits = (Duration::from_secs(10)..=Duration::from_secs(30 * 86_400)).contains(&time);
        return fits
            .then_some(Keep::Time(time))
            .ok_or_else(|| format!("'{text}' is out of range: give 10s to 30d"));
    }
    match parse_size(text) {
        Ok(bytes) if bytes >= 64 << 20 => Ok(Keep::Bytes(bytes)),
        Ok(_) => Err(format!("'{text}' is too little: give 64M or more")),
        Err(_) => Err(format!("'{text}' is neither a time like 10m, 2h or 7d nor a size like 20G")),
    }
}

/// Where the guest's serial port and console go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleSpec {
    /// To this process's terminal.
    Stdio,
    /// To sockets in this directory.
    Directory(PathBuf),
}

impl FromStr for ConsoleSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" => Err("give a directory, or stdio".into()),
            "stdio" => Ok(Self::Stdio),
            directory => Ok(Self::Directory(directory.into())),
        }
    }
}
