//! A host: a machine of QEMU's software emulation that runs a Debian kernel and has `/dev/kvm`.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::initramfs::{Initramfs, InitramfsError, read};
use super::kernel::{Kernel, KernelError};
use super::network::Network;
use crate::packages;
use crate::run::{Workspace, send_lines};

const PROGRAM: &str = "qemu-system-x86_64";
const INIT: &[u8] = include_bytes!("init");
/// Init prints this when it accepts commands.
const UP: &str = "outlive host is up";
/// It takes 5 s on two free cores.
const BOOT: Duration = Duration::from_secs(180);
const POWER_OFF: Duration = Duration::from_secs(20);
/// Lines of the console in an error.
const TAIL: usize = 30;
/// With nested paging, and without XSAVE and features that need it: QEMU 7.2 does not tell the host when a
/// guest sets XCR0. So a guest's kernel finds sizes that do not match (6.1 warns, 7.2 dies of it) and loses
/// its setting.
const PROCESSOR: &str = "max,+svm,+npt,-xsave,-avx,-avx2,-f16c,-fma";
/// All processors in one thread. With a thread each, a thread that translates guest code while another one
/// patches it (static keys: KVM has some) continues with half-patched code, and the kernel stops with "Oops:
/// int3": 6.12 and 7.2 on QEMU 7.2 within seconds, 7.2 on QEMU 10.0 after 33 s.
const EMULATION: &str = "tcg,thread=single";

/// With panic=-1 a panic reboots at once, which ends QEMU. The others are for a machine that is too busy for
/// the host: without the first its kernel stops when it counts too few timer interrupts at start; without the
/// second it takes its clock for unreliable, and then KVM has no good clock for guests.
const KERNEL_COMMAND_LINE: &str = "console=ttyS0 panic=-1 quiet no_timer_check tsc=reliable";
/// Time for an answer of a host that gave none.
const PROBE: Duration = Duration::from_secs(5);

/// Why a host does not work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HostError {
    /// There is nothing to emulate a machine with.
    #[error("no {PROGRAM} here; to get it: apt-get install qemu-system-x86")]
    NoQemu,
    /// Something could not be started.
    #[error("cannot start {program}: {source}")]
    Start {
        /// What.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// A file could not be used.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The host stopped by itself: a panic of its kernel, or an error of QEMU.
    #[error("the host stopped in {during}; its console ended with\n{console}")]
    Stopped {
        /// Its last task.
        during: String,
        /// The end of its console output.
        console: String,
    },
    /// It took too long.
    #[error("{during} did not end in {} s; {state}; the host's console ends with\n{console}", limit.as_secs())]
    TimeOut {
        /// What.
        during: String,
        /// How long that may take.
        limit: Duration,
        /// Whether the host still does anything.
        state: String,
        /// The end of its console output.
        console: String,
    },
    /// Its kernel's modules could not be put into the initramfs.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Modules(#[from] super::modules::ModuleError),
    /// Its initramfs could not be made.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
}

/// The QEMU of this machine, or the one unpacked below the target directory.
pub(crate) struct Qemu {
    program: PathBuf,
    environment: Vec<(&'static str, OsString)>,
    /// The directories of its firmware, if they are not where it was built for.
    data: Vec<PathBuf>,
}

impl Qemu {
    /// Finds it, and fetches it first if it is missing.
    pub(crate) fn get(workspace: &Workspace, fetch: bool) -> Result<Qemu, HostError> {
        let environment = packages::provide(workspace, &[packages::QEMU], fetch);
        let program = packages::find(workspace, PROGRAM).ok_or(HostError::NoQemu)?;
        let root = packages::unpacked(workspace);
        let data = if program.starts_with(&root) {
            ["usr/share/qemu", "usr/share/seabios"].map(|it| root.join(it)).to_vec()
        } else {
            Vec::new()
        };
        Ok(Qemu { program, environment, data })
    }
}

/// The parts of a host.
pub(crate) struct Machine<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) cpus: u32,
    /// A feature that its processor lacks.
    pub(crate) lacks: Option<&'a str>,
    pub(crate) memory_mib: u32,
    /// Kernel modules that are loaded at start, with what they depend on.
    pub(crate) modules: &'a [&'a str],
    /// Programs of this machine, by their path in the host.
    pub(crate) programs: &'a [(&'a str, PathBuf)],
    /// Further arguments for QEMU: network cards, disks.
    pub(crate) devices: &'a [String],
    /// Where its cables end; None: it has no network cards.
    pub(crate) network: Option<&'a Network>,
}

impl Machine<'_> {
    fn initramfs(&self) -> Result<Vec<u8>, HostError> {
        let mut archive = Initramfs::new();
        for directory in ["/bin", "/proc", "/sys", "/tmp", "/run", "/share", "/data"] {
            archive.directory(directory);
        }
        archive.script("/init", INIT)?;
        archive.script("/bin/busybox", &read(&self.kernel.busybox)?)?;
        self.kernel.modules()?.add(self.modules, &mut archive)?;
        for (path, local) in self.programs {
            archive.program(path, local)?;
        }
        Ok(archive.finish())
    }
}

/// A host. It is killed when this is dropped, and when the thread that started it ends.
pub(crate) struct Host {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    commands: u32,
    files: Files,
    /// Dropped last: the files of a host that nobody else keeps.
    _directory: Option<RunDirectory>,
}

impl Host {
    /// Starts it and waits until it takes commands.
    pub(crate) fn start(
        workspace: &Workspace,
        qemu: &Qemu,
        machine: &Machine<'_>,
    ) -> Result<Host, HostError> {
        let directory = RunDirectory::new(&workspace.target.join("nested"))?;
        let mut host = Host::switch_on(qemu, machine, &directory.path)?;
        host._directory = Some(directory);
        host.wait_until_up()?;
        Ok(host)
    }

    /// Starts it with its files in a directory, and does not wait.
    pub(crate) fn switch_on(qemu: &Qemu, machine: &Machine<'_>, directory: &Path) -> Result<Host, HostError> {
        let files = Files { directory: directory.to_path_buf() };
        let initramfs = files.path("initramfs");
        fs::write(&initramfs, machine.initramfs()?).map_err(file_error(&initramfs))?;
        let mut command = command(qemu, machine, &files);
        let errors = files.path("errors");
        command.stderr(File::create(&errors).map_err(file_error(&errors))?);
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child =
            spawned.map_err(|source| HostError::Start { program: PROGRAM.to_string(), source })?;
        let input = child.stdin.take().expect("it is piped");
        let output = child.stdout.take().expect("it is piped");
        let (sender, lines) = channel();
        thread::spawn(move || send_lines(output, &sender));
        Ok(Host { child, input, lines, commands: 0, files, _directory: None })
    }

    /// Waits until it takes commands.
    pub(crate) fn wait_until_up(&mut self) -> Result<(), HostError> {
        let start = Instant::now();
        while self.line("its start", start, BOOT)? != UP {}
        Ok(())
    }

    /// Stops all its processors, its clocks and its network at once.
    pub(crate) fn freeze(&self) -> Result<(), HostError> {
        self.signal(Signal::SIGSTOP)
    }

    /// Lets it continue as if nothing had happened.
    pub(crate) fn thaw(&self) -> Result<(), HostError> {
        self.signal(Signal::SIGCONT)
    }

    fn signal(&self, signal: Signal) -> Result<(), HostError> {
        let pid = Pid::from_raw(self.child.id().try_into().expect("a process id"));
        kill(pid, signal).map_err(|_| self.stopped(signal.as_str()))
    }

    /// Runs a line of shell and passes every line of its output to `line`. Returns the exit status.
    pub(crate) fn run(
        &mut self,
        command: &str,
        limit: Duration,
        mut line: impl FnMut(&str),
    ) -> Result<i32, HostError> {
        let start = Instant::now();
        self.commands += 1;
        let mark = format!("outlive-{}-{}", std::process::id(), self.commands);
        self.send(&format!("{mark} {command}\n"), command)?;
        // Init puts an empty line before the mark, which disappears if the output did not end with a newline.
        let mut empty = false;
        loop {
            let text = self.line(command, start, limit)?;
            if let Some(status) = text.strip_prefix(&mark) {
                return Ok(status.trim().parse().unwrap_or(-1));
            }
            if std::mem::replace(&mut empty, text.is_empty()) {
                line("");
            }
            if !text.is_empty() {
                line(&text);
            }
        }
    }

    /// Switches it off.
    pub(crate) fn power_off(mut self) -> Result<(), HostError> {
        self.send("off poweroff -f\n", "poweroff")?;
        let start = Instant::now();
        while start.elapsed() < POWER_OFF {
            if self.has_ended()? {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(50));
        }
        Err(self.timed_out("poweroff", POWER_OFF))
    }

    fn has_ended(&mut self) -> Result<bool, HostError> {
        let program = || "wait for QEMU".to_string();
        let ended =
            self.child.try_wait().map_err(|source| HostError::Start { program: program(), source })?;
        Ok(ended.is_some())
    }

    fn send(&mut self, text: &str, during: &str) -> Result<(), HostError> {
        assert_eq!(text.matches('\n').count(), 1, "a command is one line");
        let sent = self.input.write_all(text.as_bytes()).and_then(|()| self.input.flush());
        sent.map_err(|_| self.stopped(during))
    }

    /// The next line from the host.
    fn line(&mut self, during: &str, start: Instant, limit: Duration) -> Result<String, HostError> {
        match self.lines.recv_timeout(limit.saturating_sub(start.elapsed())) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Disconnected) => Err(self.stopped(during)),
            Err(RecvTimeoutError::Timeout) => Err(self.timed_out(during, limit)),
        }
    }

    /// Finds out as much as possible about a host that gives no answer: whether its processor works, and
    /// whether it answers something else. Afterwards the host is useless.
    fn timed_out(&mut self, during: &str, limit: Duration) -> HostError {
        let before = self.processor_time();
        let sent = self.input.write_all(b"\nprobe echo alive\n").and_then(|()| self.input.flush());
        let answer = sent.ok().and_then(|()| self.lines.recv_timeout(PROBE).ok());
        thread::sleep(PROBE);
        let used = self.processor_time().saturating_sub(before);
        let answer = answer.map_or("nothing".to_owned(), |line| format!("'{line}'"));
        let state = format!(
            "asked again it says {answer}, QEMU used {} ms of processor time meanwhile",
            used.as_millis()
        );
        HostError::TimeOut { during: during.to_string(), limit, state, console: self.files.tail() }
    }

    /// QEMU's CPU time so far.
    fn processor_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        // Its name, which may contain anything, is in brackets; user and system time are fields 14 and 15, in
        // ticks.
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
        let ticks: u64 = fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
        Duration::from_millis(ticks * 10)
    }

    fn stopped(&self, during: &str) -> HostError {
        HostError::Stopped { during: during.to_string(), console: self.files.tail() }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(qemu: &Qemu, machine: &Machine<'_>, files: &Files) -> Command {
    let mut command = match machine.network {
        Some(network) => network.command(&qemu.program),
        None => {
            // So that it dies with us, however we end.
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", "KILL", "--"]).arg(&qemu.program);
            command
        }
    };
    command.envs(qemu.environment.iter().cloned());
    for data in &qemu.data {
        command.arg("-L").arg(data);
    }
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
    // Memory that the share's file server can see.
    let memory = format!("memory-backend-memfd,id=memory,size={}M,share=on", machine.memory_mib);
    command.args(["-machine", "q35,memory-backend=memory", "-object", &memory]);
    let processor = machine.lacks.map_or(PROCESSOR.to_owned(), |feature| format!("{PROCESSOR},-{feature}"));
    command.args(["-cpu", &processor, "-accel", EMULATION]);
    command.args(["-smp", &machine.cpus.to_string(), "-m", &machine.memory_mib.to_string()]);
    command.arg("-kernel").arg(&machine.kernel.image).arg("-initrd").arg(files.path("initramfs"));
    command.args(["-append", KERNEL_COMMAND_LINE]);
    // The console, then the line for commands.
    let mut console = OsString::from("file:");
    console.push(files.path("console"));
    command.arg("-serial").arg(console).args(["-serial", "stdio"]).args(machine.devices);
    command
}

/// A directory for the files of hosts while they run. It is removed when this is dropped, and if we are
/// killed before that, when the next one is made.
pub(crate) struct RunDirectory {
    pub(crate) path: PathBuf,
}

impl RunDirectory {
    pub(crate) fn new(parent: &Path) -> Result<RunDirectory, HostError> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        remove_old(parent);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("run-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).map_err(file_error(&path))?;
        Ok(RunDirectory { path })
    }
}

impl Drop for RunDirectory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("xtask: {} is left: {error}", self.path.display());
        }
    }
}

/// Files of one host.
struct Files {
    directory: PathBuf,
}

impl Files {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The output of QEMU, and the end of that of the kernel and init.
    fn tail(&self) -> String {
        let text = |name| fs::read(self.path(name)).unwrap_or_default();
        let (errors, console) = (text("errors"), text("console"));
        let (errors, console) = (String::from_utf8_lossy(&errors), String::from_utf8_lossy(&console));
        let console: Vec<_> = console.lines().collect();
        let end = console[console.len().saturating_sub(TAIL)..].iter().copied();
        end.chain(errors.lines()).map(|line| format!("  {}", line.trim_end())).collect::<Vec<_>>().join("\n")
    }
}

/// Removes the files of a process that was killed.
fn remove_old(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let process = name.strip_prefix("run-").and_then(|rest| rest.split('-').next());
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> HostError {
    move |source| HostError::File { path: path.to_path_buf(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_go_with_the_host_and_those_of_the_dead_with_the_next() {
        let parent = std::env::temp_dir().join(format!("outlive-host-{}", std::process::id()));
        let dead = parent.join("run-4999999-0");
        fs::create_dir_all(&dead).unwrap();
        let run = RunDirectory::new(&parent).unwrap();
        let files = Files { directory: run.path.clone() };
        fs::write(files.path("errors"), "an error\n").unwrap();
        let console: String = (0..50).map(|number| format!("line {number}\r\n")).collect();
        fs::write(files.path("console"), console).unwrap();
        let tail = files.tail();
        assert!(tail.starts_with("  line 20\n") && tail.ends_with("line 49\n  an error"), "{tail}");
        assert!(run.path.exists() && !dead.exists());
        drop(run);
        assert_eq!(fs::read_dir(&parent).unwrap().count(), 0);
        fs::remove_dir(&parent).unwrap();
    }
}
