//! `cargo xtask nested shell`: nested hosts for a person, with a prompt on each and control of their power
//! and cables.

use std::fmt;
use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use super::cluster::{ARBITER, BRIDGE, Cluster, ClusterError, DATA, Options};
use super::kernel::Series;
use super::network::Net;
use crate::run::{StepError, Workspace, step};

pub(crate) const EXAMPLES: &str = "\
Examples:
  cargo xtask nested shell                            two hosts with Debian 12's kernel
  cargo xtask nested shell --hosts 1 --kernel 6.12
  cargo xtask nested shell --kernel 6.1 --kernel newest   a host of each
  echo 'outlive check; poweroff' | cargo xtask nested shell --hosts 1 --no-guests

Hosts are machines of QEMU's software emulation: no /dev/kvm is needed, but root for their network. The first time it
fetches kernels and builds guest images (some 5 minutes, 3 GB in target/nested); then hosts are up in some 10 seconds.
Ctrl-] leaves a host for a menu, with which power and cables can be cut.";

/// Ctrl-].
const ESCAPE: u8 = 0x1d;
/// How long a host may still print after the end of a script.
const SILENCE_MS: u16 = 3000;

#[derive(clap::Args, Debug)]
pub(crate) struct ShellOptions {
    /// How many hosts
    #[arg(long, value_name = "NUMBER", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=4))]
    hosts: u8,
    /// A host's kernel; can be given once per host, and the last one applies to all further hosts
    #[arg(long, value_enum, value_name = "SERIES", default_value = "6.1")]
    kernel: Vec<Series>,
    /// MiB of memory of each host
    #[arg(long, value_name = "MIB", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(512..))]
    memory: u32,
    /// Processors of each host, all emulated by one thread
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    cpus: u32,
    /// Hosts without disks and guest images
    #[arg(long)]
    no_guests: bool,
    /// Use only what has been fetched and built before
    #[arg(long)]
    no_fetch: bool,
    /// The program that hosts have as /bin/outlive [default: built from this workspace]
    #[arg(long, value_name = "FILE")]
    outlive: Option<PathBuf>,
}

impl ShellOptions {
    fn kernels(&self) -> Vec<Series> {
        let last = *self.kernel.last().expect("it has a default");
        (0..usize::from(self.hosts)).map(|host| self.kernel.get(host).copied().unwrap_or(last)).collect()
    }
}

pub(crate) fn run(workspace: &Workspace, options: &ShellOptions) -> Result<(), StepError> {
    let outlive = match &options.outlive {
        Some(program) => program.clone(),
        None => {
            step(&mut workspace.cargo(["build", "--release", "--package", "outlive"]))?;
            workspace.target.join("release/outlive")
        }
    };
    let start = Instant::now();
    let options = Options {
        kernels: options.kernels(),
        cpus: options.cpus,
        last_lacks: None,
        memory_mib: options.memory,
        programs: vec![("/bin/outlive", outlive)],
        guests: !options.no_guests,
        shell: true,
        fetch: !options.no_fetch,
    };
    let guests = options.guests;
    let mut cluster = Cluster::start(workspace, options).map_err(step_error)?;
    println!("{} hosts are up after {:.1} s", cluster.len(), start.elapsed().as_secs_f64());
    for host in 1..=cluster.len() {
        let (link, clients) = (Net::Link.host(host), Net::Clients.host(host));
        println!("  host {host}: {link} between hosts, {clients} for clients, on the bridge {BRIDGE}");
    }
    println!("  arbiter: file:{ARBITER}, which all see");
    if guests {
        println!(
            "  guests:  {DATA}/root.img, and vmlinuz-KERNEL with initrd-KERNEL; see xtask/src/nested/guest/README.md"
        );
    }
    println!("Ctrl-] leaves a host for the menu.");
    session(&mut cluster).map_err(step_error)
}

/// Like an error on the command line.
pub(crate) fn step_error(error: ClusterError) -> StepError {
    if error.is_missing() {
        StepError::Unusable(error.to_string())
    } else {
        StepError::Failed(format!("nested hosts: {error};"))
    }
}

/// A person's choice in the menu.
#[derive(Debug, PartialEq, Eq)]
enum Wish {
    Go(usize),
    Cut(usize),
    On(usize),
    Freeze(usize),
    Thaw(usize),
    Unplug(usize, Vec<Net>),
    Plug(usize, Vec<Net>),
    Client(String),
    Back,
    Quit,
    Help,
}

const HELP: &str = "\
  N              go to host N (Enter: back to where you were)
  cut N          cut the power of host N          on N      switch it on again
  freeze N       stop host N, clocks and all      thaw N    let it go on
  unplug N [link|clients]   pull its cables       plug N [link|clients]
  ! COMMAND      run a command of this machine on the clients' network, for example: ! redis-cli -h 10.78.0.101 ping
  q              end";

fn wish(line: &str, hosts: usize) -> Wish {
    let line = line.trim();
    if let Some(command) = line.strip_prefix('!') {
        return Wish::Client(command.trim().to_string());
    }
    let words: Vec<&str> = line.split_whitespace().collect();
    let number = |word: &str| word.parse().ok().filter(|number| (1..=hosts).contains(number));
    let nets = |words: &[&str]| match words {
        [] => Some(Net::ALL.to_vec()),
        ["link"] => Some(vec![Net::Link]),
        ["clients"] => Some(vec![Net::Clients]),
        _ => None,
    };
    let wish = match words.as_slice() {
        [] => Some(Wish::Back),
        ["q" | "quit" | "exit"] => Some(Wish::Quit),
        ["cut", host] => number(host).map(Wish::Cut),
        ["on", host] => number(host).map(Wish::On),
        ["freeze", host] => number(host).map(Wish::Freeze),
        ["thaw", host] => number(host).map(Wish::Thaw),
        ["unplug", host, rest @ ..] => number(host).zip(nets(rest)).map(|(host, it)| Wish::Unplug(host, it)),
        ["plug", host, rest @ ..] => number(host).zip(nets(rest)).map(|(host, it)| Wish::Plug(host, it)),
        [host] => number(host).map(Wish::Go),
        _ => None,
    };
    wish.unwrap_or(Wish::Help)
}

/// Why a person has left a host.
enum Left {
    Escape,
    InputEnded,
    HostEnded,
}

fn session(cluster: &mut Cluster) -> Result<(), ClusterError> {
    let mut host = 1;
    let mut here = true;
    loop {
        if here {
            match attach(cluster, host)? {
                Left::InputEnded => return Ok(()),
                Left::Escape => println!(),
                Left::HostEnded => {
                    println!("\nhost {host} has ended");
                    let _ = cluster.cut_power(host);
                    if (1..=cluster.len()).all(|host| !cluster.has_power(host)) {
                        return Ok(());
                    }
                }
            }
        }
        print!("[menu; ? for help] ");
        let _ = io::stdout().flush();
        let mut line = String::new();
        if io::stdin().lock().read_line(&mut line).unwrap_or(0) == 0 {
            return Ok(());
        }
        let wish = wish(&line, cluster.len());
        here = match wish {
            Wish::Quit => return Ok(()),
            Wish::Go(number) => {
                host = number;
                cluster.has_power(host)
            }
            Wish::Back => cluster.has_power(host),
            _ => false,
        };
        if let Err(error) = grant(cluster, &wish) {
            println!("{error}");
        } else if !here && matches!(wish, Wish::Go(_) | Wish::Back) {
            println!("host {host} is off");
        }
    }
}

fn grant(cluster: &mut Cluster, wish: &Wish) -> Result<(), ClusterError> {
    match wish {
        Wish::Cut(host) => cluster.cut_power(*host),
        Wish::On(host) if cluster.has_power(*host) => Ok(()),
        Wish::On(host) => cluster.switch_on(&[*host]),
        Wish::Freeze(host) => cluster.freeze(*host),
        Wish::Thaw(host) => cluster.thaw(*host),
        Wish::Unplug(host, nets) => nets.iter().try_for_each(|&net| cluster.cut_link(*host, net)),
        Wish::Plug(host, nets) => nets.iter().try_for_each(|&net| cluster.restore_link(*host, net)),
        Wish::Client(command) => {
            if let Err(error) = cluster.client("sh").args(["-c", command]).status() {
                println!("{error}");
            }
            Ok(())
        }
        Wish::Help => {
            println!("{HELP}");
            Ok(())
        }
        Wish::Go(_) | Wish::Back | Wish::Quit => Ok(()),
    }
}

/// Connects this terminal to a host's serial line.
fn attach(cluster: &mut Cluster, host: usize) -> Result<Left, ClusterError> {
    let path = cluster.shell_socket(host);
    let file_error = |source| ClusterError::File { path: path.clone(), source };
    if let Some(size) = Size::of_terminal() {
        cluster.command(host, &format!("stty -F /dev/ttyS2 {size}"))?;
    }
    let mut line = UnixStream::connect(&path).map_err(file_error)?;
    // To get a prompt.
    line.write_all(b"\n").map_err(file_error)?;
    let _raw = RawTerminal::enter();
    copy(&mut line).map_err(file_error)
}

fn copy(line: &mut UnixStream) -> io::Result<Left> {
    let mut input = io::stdin().lock();
    let mut output = io::stdout().lock();
    let mut buffer = [0; 4096];
    let mut reading = true;
    loop {
        let mut ready = vec![PollFd::new(line.as_fd(), PollFlags::POLLIN)];
        if reading {
            ready.push(PollFd::new(input.as_fd(), PollFlags::POLLIN));
        }
        let patience = if reading { PollTimeout::NONE } else { PollTimeout::from(SILENCE_MS) };
        if poll(&mut ready, patience)? == 0 {
            return Ok(Left::InputEnded);
        }
        let is_ready = |at: usize| ready.get(at).is_some_and(|it| it.any().unwrap_or(false));
        let (from_host, from_us) = (is_ready(0), is_ready(1));
        if from_host {
            let length = line.read(&mut buffer)?;
            if length == 0 {
                return Ok(Left::HostEnded);
            }
            output.write_all(&buffer[..length])?;
            output.flush()?;
        }
        if from_us {
            let typed = input.fill_buf()?;
            let length = typed.len();
            reading = length > 0;
            let escape = typed.iter().position(|&byte| byte == ESCAPE);
            line.write_all(&typed[..escape.unwrap_or(length)])?;
            input.consume(escape.map_or(length, |at| at + 1));
            if escape.is_some() {
                return Ok(Left::Escape);
            }
        }
    }
}

/// A terminal that passes on every key at once. Restored when this is dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    /// `None` if the input is not a terminal.
    fn enter() -> Option<RawTerminal> {
        let input = io::stdin();
        let before = tcgetattr(&input).ok()?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&input, SetArg::TCSADRAIN, &raw).ok()?;
        Some(RawTerminal(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.0);
    }
}

/// The terminal's properties, which the host cannot know.
#[derive(Debug, PartialEq, Eq)]
struct Size {
    rows: u16,
    columns: u16,
}

impl Size {
    fn of_terminal() -> Option<Size> {
        if !io::stdin().is_terminal() {
            return None;
        }
        let output = Command::new("stty").arg("size").stdin(Stdio::inherit()).output().ok()?;
        Size::parse(&String::from_utf8_lossy(&output.stdout))
    }

    /// The two numbers of `stty size`. A terminal that does not know its size says 0.
    fn parse(text: &str) -> Option<Size> {
        let (rows, columns) = text.trim().split_once(' ')?;
        let size = Size { rows: rows.parse().ok()?, columns: columns.parse().ok()? };
        (size.rows > 0 && size.columns > 0).then_some(size)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rows {} cols {}", self.rows, self.columns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        options: ShellOptions,
    }

    #[test]
    fn hosts_get_their_kernels() {
        let kernels = |words: &[&str]| {
            Cli::try_parse_from([&["shell"], words].concat()).map(|cli| cli.options.kernels())
        };
        assert_eq!(kernels(&[]).unwrap(), [Series::Bookworm; 2]);
        let two = kernels(&["--hosts", "3", "--kernel", "5.10", "--kernel", "newest"]).unwrap();
        assert_eq!(two, [Series::Bullseye, Series::Sid, Series::Sid]);
        for words in [&["--hosts", "0"][..], &["--kernel", "4.19"], &["--memory", "100"]] {
            assert_eq!(kernels(words).unwrap_err().exit_code(), 2);
        }
    }

    #[test]
    fn wishes() {
        assert_eq!(wish("2\n", 2), Wish::Go(2));
        assert_eq!(wish("\n", 2), Wish::Back);
        assert_eq!(wish("cut 1", 2), Wish::Cut(1));
        assert_eq!(wish("unplug 2 link", 2), Wish::Unplug(2, vec![Net::Link]));
        assert_eq!(wish("plug 2", 2), Wish::Plug(2, Net::ALL.to_vec()));
        assert_eq!(wish("! redis-cli  ping", 2), Wish::Client("redis-cli  ping".into()));
        for wrong in ["3", "0", "cut", "cut 3", "plug 1 both", "what", "?"] {
            assert_eq!(wish(wrong, 2), Wish::Help, "{wrong}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(Size::parse("24 80\n").unwrap().to_string(), "rows 24 cols 80");
        assert_eq!((Size::parse("0 0\n"), Size::parse("")), (None, None));
    }
}
