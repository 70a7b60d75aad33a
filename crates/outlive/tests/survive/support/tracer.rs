//! A debugger's hold on a process under test: it stops a thread, or makes the process take memory away from
//! itself. Only a broken host does either.

use std::fs;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::libc::{AT_FDCWD, PROT_NONE, SYS_connect, SYS_mprotect, SYS_openat};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use super::{Process, wait_until};

/// A stopped thread. It continues when this is dropped, if it still exists.
pub(crate) struct Held {
    thread: Pid,
    /// It is the first thread of its process, whose end belongs to whoever started the process.
    first: bool,
}

impl Held {
    /// Stops the thread of this name.
    pub(crate) fn thread(process: &Process, name: &str) -> Held {
        Held::find(process, name).unwrap_or_else(|| panic!("no thread {name} that can be stopped"))
    }

    /// Stops the thread of this name, if there is one that can be stopped.
    pub(crate) fn find(process: &Process, name: &str) -> Option<Held> {
        let tasks = fs::read_dir(format!("/proc/{}/task", process.pid())).ok()?;
        let named = tasks.filter_map(Result::ok).find(|task| {
            fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim_end() == name)
        })?;
        Held::try_stop(process, named.file_name().to_str()?.parse().ok()?).ok()
    }

    /// Stops the first thread of a process that somebody else has started, if it can be stopped.
    pub(crate) fn of(process: Pid) -> Option<Held> {
        // Whoever started it hears of its end only when it is reaped here.
        Held::stop_first(Held { thread: process, first: false })
    }

    /// Stops the first thread of a process that the test has started, if it can be stopped.
    pub(crate) fn child(process: Pid) -> Option<Held> {
        Held::stop_first(Held { thread: process, first: true })
    }

    fn stop_first(held: Held) -> Option<Held> {
        if ptrace::attach(held.thread).is_err() {
            std::mem::forget(held);
            return None;
        }
        held.wait_until_stopped().ok().map(|()| held)
    }

    /// Stops the first thread of the process.
    pub(crate) fn first(process: &Process) -> Held {
        Held::try_stop(process, process.pid() as i32).unwrap()
    }

    /// Stops any thread; the number picks which. Also returns its name, or nothing if it has just ended.
    pub(crate) fn any(process: &Process, number: u64) -> Option<(Held, String)> {
        let tasks = fs::read_dir(format!("/proc/{}/task", process.pid())).ok()?;
        let mut tasks: Vec<i32> =
            tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok()).collect();
        tasks.sort_unstable();
        let task = *tasks.get((number % tasks.len().max(1) as u64) as usize)?;
        let name = fs::read_to_string(format!("/proc/{}/task/{task}/comm", process.pid())).ok()?;
        Some((Held::try_stop(process, task).ok()?, name.trim_end().to_owned()))
    }

    fn try_stop(process: &Process, thread: i32) -> nix::Result<Held> {
        let held = Held { thread: Pid::from_raw(thread), first: thread == process.pid() as i32 };
        if let Err(error) = ptrace::attach(held.thread) {
            std::mem::forget(held);
            return Err(error);
        }
        held.wait_until_stopped()?;
        Ok(held)
    }

    /// Takes a stop, and leaves an end where it is.
    fn wait_until_stopped(&self) -> nix::Result<()> {
        let id = || Id::Pid(self.thread);
        let all = WaitPidFlag::__WALL | WaitPidFlag::WSTOPPED;
        match waitid(id(), all | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
            // A signal that has no name stops it: a vCPU's thread was kicked.
            Err(Errno::EINVAL) => match waitid(id(), all | WaitPidFlag::WNOHANG) {
                Err(Errno::EINVAL) => Ok(()),
                _ => Err(Errno::ESRCH),
            },
            Err(error) => Err(error),
            Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) => Err(Errno::ESRCH),
            // Nothing is there any more if it has just been killed.
            Ok(_) => match waitid(id(), all | WaitPidFlag::WNOHANG)? {
                WaitStatus::StillAlive => Err(Errno::ESRCH),
                _ => Ok(()),
            },
        }
    }

    /// Waits for the end of a thread that was killed. Until it is reaped nobody hears of the end of its process.
    fn wait_for_its_end(&self) {
        if self.first {
            let flags = WaitPidFlag::__WALL | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
            waitid(Id::Pid(self.thread), flags).ok();
        } else {
            waitpid(self.thread, Some(WaitPidFlag::__WALL)).ok();
        }
    }

    /// Lets the thread continue until it is about to open this file.
    pub(crate) fn wait_until_it_opens(&self, file: &str) {
        loop {
            ptrace::syscall(self.thread, None).unwrap();
            self.wait_until_stopped().unwrap();
            let registers = ptrace::getregs(self.thread).unwrap();
            if registers.orig_rax as i64 == SYS_openat
                && self.text(registers.rsi, file.len()) == file.as_bytes()
            {
                return;
            }
        }
    }

    /// So many bytes of the thread's memory, or fewer if it has no more.
    fn text(&self, at: u64, length: usize) -> Vec<u8> {
        let word = |number| ptrace::read(self.thread, (at + number * 8) as *mut _).map(i64::to_ne_bytes);
        let words = (0..length.div_ceil(8) as u64).map_while(|number| word(number).ok());
        let mut bytes: Vec<u8> = words.flatten().collect();
        bytes.truncate(length);
        bytes
    }

    /// Lets the thread continue with this signal, as if it had caused it.
    pub(crate) fn strike(self, signal: Signal) {
        // Fails if it was killed meanwhile; then dropping it reaps it.
        if ptrace::detach(self.thread, signal).is_ok() {
            std::mem::forget(self);
        }
    }

    /// Makes the stopped thread do a system call, if it is in one itself. A process that ends meanwhile counts
    /// as having done it.
    pub(crate) fn call(&self, number: i64, arguments: [u64; 3]) -> Option<i64> {
        match self.try_call(number, arguments) {
            Err(Errno::ESRCH) => Some(0),
            result => result.unwrap(),
        }
    }

    /// Makes the stopped thread open a file, if it is in a system call itself. Returns what the kernel answers.
    pub(crate) fn open(&self, path: &str, flags: i32) -> Option<i64> {
        let text = [path.as_bytes(), &[0]].concat();
        self.call_about(SYS_openat, &text, |at| [AT_FDCWD as u64, at, flags as u64])
    }

    /// Makes the stopped thread connect one of its sockets, if it is in a system call itself. Returns what the kernel
    /// answers.
    pub(crate) fn connect(&self, socket: i64, address: &[u8]) -> Option<i64> {
        self.call_about(SYS_connect, address, |at| [socket as u64, at, address.len() as u64])
    }

    /// A call with something in the thread's memory.
    fn call_about(&self, number: i64, bytes: &[u8], arguments: impl Fn(u64) -> [u64; 3]) -> Option<i64> {
        // Far below what the thread uses of its stack.
        let at = (ptrace::getregs(self.thread).unwrap().rsp - 8192) & !7;
        let mut bytes = bytes.to_vec();
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        for (number, word) in bytes.chunks_exact(8).enumerate() {
            let word = i64::from_ne_bytes(word.try_into().unwrap());
            ptrace::write(self.thread, (at + 8 * number as u64) as *mut _, word).unwrap();
        }
        self.call(number, arguments(at))
    }

    fn try_call(&self, number: i64, arguments: [u64; 3]) -> nix::Result<Option<i64>> {
        /// `syscall`
        const INSTRUCTION: u64 = 0x050f;
        let before = ptrace::getregs(self.thread)?;
        let at = before.rip - 2;
        if ptrace::read(self.thread, at as *mut _)? as u64 & 0xffff != INSTRUCTION {
            return Ok(None);
        }
        let mut call = before;
        (call.rip, call.rax, call.orig_rax) = (at, number as u64, u64::MAX);
        (call.rdi, call.rsi, call.rdx) = (arguments[0], arguments[1], arguments[2]);
        ptrace::setregs(self.thread, call)?;
        // A signal may come before the instruction.
        while ptrace::getregs(self.thread)?.rip == at {
            ptrace::step(self.thread, None)?;
            self.wait_until_stopped()?;
        }
        let result = ptrace::getregs(self.thread)?.rax as i64;
        ptrace::setregs(self.thread, before)?;
        Ok(Some(result))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if ptrace::detach(self.thread, None) == Err(Errno::ESRCH) {
            self.wait_for_its_end();
        }
    }
}

/// Takes the memory behind its guest's program away from a process: the host can no longer provide it.
pub(crate) fn take_program_memory(process: &Process, memory: u64) {
    let guest = guest_memory(process, memory).expect("the guest's memory").start;
    let program = program();
    take(process, guest + program.start..guest + program.end);
}

/// Takes all memory of the guest, or of its copy, away from a process. Does nothing if it has none at the
/// moment.
pub(crate) fn take_all_memory(process: &Process, memory: u64) {
    if let Some(guest) = guest_memory(process, memory) {
        take(process, guest);
    }
}

/// Changes a bit of the guest's program in a host's copy of the guest's memory. The guest does not write there, so
/// no checkpoint repairs it.
pub(crate) fn flip_program_bit(process: &Process, memory: u64) {
    let guest = guest_memory(process, memory).expect("the guest's memory").start;
    let at = guest + program().start + 77;
    let path = format!("/proc/{}/mem", process.pid());
    let copy = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    copy.read_exact_at(&mut byte, at).unwrap();
    copy.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

fn guest_memory(process: &Process, memory: u64) -> Option<Range<u64>> {
    let maps = fs::read_to_string(format!("/proc/{}/maps", process.pid())).unwrap();
    maps.lines().filter_map(anonymous).find(|range| range.end - range.start == memory)
}

fn take(process: &Process, range: Range<u64>) {
    let (start, length) = (range.start, range.end - range.start);
    wait_until("the process is in a system call", || {
        let main = match Held::try_stop(process, process.pid() as i32) {
            // A process that has ended meanwhile has no memory.
            Err(Errno::ESRCH) => return true,
            held => held.unwrap(),
        };
        match main.call(SYS_mprotect, [start, length, PROT_NONE as u64]) {
            None => false,
            Some(result) => {
                assert_eq!(result, 0, "mprotect");
                true
            }
        }
    });
}

/// A line of `/proc/PID/maps` for memory that belongs to no file.
fn anonymous(line: &str) -> Option<Range<u64>> {
    let mut words = line.split_whitespace();
    let (range, rights) = (words.next()?, words.next()?);
    let (start, end) = range.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    (rights == "rw-p" && words.nth(2)? == "0").then_some(number(start)?..number(end)?)
}

/// Guest addresses of the pages that hold only the payload's code: the guest does not write them, so no
/// checkpoint copies them.
fn program() -> Range<u64> {
    const PAGE: u64 = 4096;
    let elf = outlive_guest::PAYLOAD;
    let word = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap());
    let half = |at: usize| u16::from_le_bytes(elf[at..at + 2].try_into().unwrap());
    let mut headers = (0..half(56)).map(|index| word(32) as usize + usize::from(index * half(54)));
    // {type, flags}: PT_LOAD, executable.
    let code = headers.find(|&at| word(at) as u32 == 1 && word(at) >> 32 & 1 == 1);
    let code = code.expect("a segment of code");
    let (start, end) = (word(code + 16), word(code + 16) + word(code + 40));
    start.next_multiple_of(PAGE)..end / PAGE * PAGE
}
