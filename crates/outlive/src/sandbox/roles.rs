//! Which system calls a thread may make.
//!
//! A thread's name says what it is for ([`Role::of`]). Filters add up: the main thread's holds for all threads, because
//! they are its children, and a role's own is narrower. What a thread starts is never wider than itself.
//!
//! A call that is missing here ends the process (SIGSYS), and the other host takes the VM over. So a call that is rare
//! and harmless is allowed; a call by which a thread would become something else, or reach what it was not given, is
//! not.

use std::collections::BTreeMap;

use libc::{SYS_ioctl, c_long};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    /// Decides, makes machines and connections, opens files: the main thread and its helpers.
    Control,
    /// Runs a vCPU, takes its state, answers its ports.
    Vcpu,
    /// Carries a device's requests out.
    Device,
    /// Sends checkpoints; takes strays, or sends them.
    Sender,
    /// Reads acknowledgements at the primary, and lets output out.
    Receiver,
    /// Reads a connection at the standby: the handshake, checkpoints. It makes the VM's copy.
    Reader,
    /// Writes checkpoints into the copy.
    Applier,
    /// Reads and writes images, sidecars and journals.
    Files,
    /// Writes the log and the events.
    Writer,
    /// Watches times and signals, counts.
    Watcher,
    /// Tells numbers at a socket, and hears nothing.
    Teller,
    /// Keeps a pipe until the process ends.
    Keeper,
    /// The child that ends a dead host's links.
    Sentinel,
}

impl Role {
    /// All of them.
    pub(super) const ALL: [Self; 13] = [
        Self::Control,
        Self::Vcpu,
        Self::Device,
        Self::Sender,
        Self::Receiver,
        Self::Reader,
        Self::Applier,
        Self::Files,
        Self::Writer,
        Self::Watcher,
        Self::Teller,
        Self::Keeper,
        Self::Sentinel,
    ];

    /// The role of the thread of this name. One that is not known stays what its parent is.
    pub(super) fn of(name: &str) -> Self {
        match name {
            "sender" | "strays" => Self::Sender,
            "receiver" => Self::Receiver,
            "session" => Self::Reader,
            "applier" => Self::Applier,
            "disks" | "disk-sync" | "sidecars" | "self-check" | "audit" | "boot-disk" => Self::Files,
            "log" | "events" => Self::Writer,
            "watchdog" | "signals" | "hangup" | "stdin" | "stats" | "progress" => Self::Watcher,
            "metrics" => Self::Teller,
            "keeper-1" | "keeper-2" => Self::Keeper,
            _ if name.starts_with("vcpu") => Self::Vcpu,
            _ if name.starts_with("outlive-") => Self::Device,
            _ => Self::Control,
        }
    }

    fn calls(self) -> Vec<Call> {
        let parts: &[&[Call]] = match self {
            Self::Control => &[
                ANY,
                THREADS,
                DEVICES,
                LINKS,
                CONNECT,
                LISTEN,
                FILES,
                WATCH,
                MACHINE,
                KEEP,
                IOCTLS,
                &[LIBRARY, OWN_MASK],
            ],
            Self::Vcpu => &[&[IOCTL_KVM], ANY, DEVICES, &[IOCTL_TAP_OFFLOAD, IOCTL_TAP_QUEUE]],
            Self::Device => &[ANY, DEVICES, &[IOCTL_KVM, IOCTL_TAP_OFFLOAD, IOCTL_TAP_QUEUE]],
            Self::Sender => &[ANY, LINKS],
            Self::Receiver => &[ANY, DEVICES, LINKS, &[IOCTL_KVM]],
            Self::Reader => {
                &[ANY, THREADS, DEVICES, LINKS, CONNECT, FILES, WATCH, MACHINE, IOCTLS, &[LIBRARY]]
            }
            Self::Applier => &[ANY, THREADS, DEVICES, LINKS, FILES, MACHINE, IOCTLS],
            Self::Files => &[ANY, THREADS, DEVICES, LINKS, FILES, IOCTLS],
            Self::Writer => &[ANY, FILES],
            Self::Watcher => &[ANY, LINKS, FILES, WATCH],
            Self::Teller => &[ANY, FILES, &[free(libc::SYS_accept4)]],
            Self::Keeper => &[ANY, KEEP],
            Self::Sentinel => &[ANY, LINKS, WATCH],
        };
        let backtraces: &[Call] = if wants_backtraces() { BACKTRACE } else { &[] };
        parts.iter().copied().chain([backtraces]).flatten().copied().collect()
    }

    /// The filter, as the kernel takes it. `process` is this process' number.
    ///
    /// # Errors
    /// A rule that cannot be one.
    pub(super) fn filter(self, process: u32, otherwise: SeccompAction) -> Result<BpfProgram, BackendError> {
        let mut rules = BTreeMap::<c_long, Vec<SeccompRule>>::new();
        for Call(number, tests) in self.calls() {
            let rule = rules.entry(number);
            if tests.is_empty() {
                // Whatever else is said of it.
                rule.and_modify(Vec::clear).or_default();
                continue;
            }
            let known_free =
                matches!(&rule, std::collections::btree_map::Entry::Occupied(it) if it.get().is_empty());
            if known_free {
                continue;
            }
            let conditions = tests.iter().map(|test| test.condition(process)).collect::<Result<_, _>>()?;
            rule.or_default().push(SeccompRule::new(conditions)?);
        }
        SeccompFilter::new(rules, otherwise, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
    }
}

/// `clone3` cannot be looked into, because its flags are in memory. The answer that it does not exist makes the C library
/// take `clone`, which can.
///
/// # Errors
/// A rule that cannot be one.
pub(super) fn no_clone3() -> Result<BpfProgram, BackendError> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let answer = SeccompAction::Errno(libc::ENOSYS as u32);
    SeccompFilter::new(rules, SeccompAction::Allow, answer, TargetArch::x86_64)?.try_into()
}

/// A system call, and what its arguments must be.
#[derive(Clone, Copy)]
struct Call(c_long, &'static [Test]);

/// A test of an argument, by its position.
#[derive(Clone, Copy)]
enum Test {
    Is(u8, u64),
    IsNot(u8, u64),
    /// All these bits are set.
    Has(u8, u64),
    /// None of these bits is set.
    Lacks(u8, u64),
    /// The type of an ioctl.
    OfType(u8, u64),
    /// The type of a socket, whatever its flags are.
    Kind(u8, u64),
    /// This process.
    Own(u8),
}

impl Test {
    fn condition(self, process: u32) -> Result<SeccompCondition, BackendError> {
        use SeccompCmpOp::{Eq, MaskedEq, Ne};
        let (at, operator, value) = match self {
            Self::Is(at, value) => (at, Eq, value),
            Self::IsNot(at, value) => (at, Ne, value),
            Self::Has(at, bits) => (at, MaskedEq(bits), bits),
            Self::Lacks(at, bits) => (at, MaskedEq(bits), 0),
            Self::OfType(at, kind) => (at, MaskedEq(0xff00), kind << 8),
            Self::Kind(at, kind) => (at, MaskedEq(0xf), kind),
            Self::Own(at) => (at, Eq, process.into()),
        };
        SeccompCondition::new(at, SeccompCmpArgLen::Dword, operator, value)
    }
}

const fn free(number: c_long) -> Call {
    Call(number, &[])
}

const KVM: u64 = 0xae;
const IOCTL_KVM: Call = Call(SYS_ioctl, &[Test::OfType(1, KVM)]);
const IOCTL_TAP_OFFLOAD: Call = Call(SYS_ioctl, &[Test::Is(1, libc::TUNSETOFFLOAD)]);
const IOCTL_TAP_QUEUE: Call = Call(SYS_ioctl, &[Test::Is(1, libc::TUNSETQUEUE)]);
const IOCTL_FIONBIO: Call = Call(SYS_ioctl, &[Test::Is(1, libc::FIONBIO)]);
/// Taps and terminals: anything but typing on somebody's, leaving a tap to others, and being sent signals by one. Of devices
/// it reaches those that this process has open, and Landlock says which it may open.
const IOCTL_TAP: Call = Call(
    SYS_ioctl,
    &[
        Test::OfType(1, TAPS_AND_TERMINALS),
        Test::IsNot(1, libc::TIOCSTI),
        Test::IsNot(1, TIOCLINUX),
        Test::IsNot(1, libc::FIOASYNC),
        Test::IsNot(1, libc::TUNSETPERSIST),
        Test::IsNot(1, libc::TUNSETOWNER),
        Test::IsNot(1, libc::TUNSETGROUP),
    ],
);
const TAPS_AND_TERMINALS: u64 = 0x54;
const TIOCLINUX: u64 = 0x541c;
/// Sockets and interfaces: what the C library asks. Not whom a socket sends signals to.
const IOCTL_SOCKET: Call =
    Call(SYS_ioctl, &[Test::OfType(1, 0x89), Test::IsNot(1, FIOSETOWN), Test::IsNot(1, SIOCSPGRP)]);
const FIOSETOWN: u64 = 0x8901;
const SIOCSPGRP: u64 = 0x8902;
/// Block devices.
const IOCTL_BLOCK: Call = Call(SYS_ioctl, &[Test::OfType(1, 0x12)]);
/// All kinds of descriptors that Outlive asks so. Those of file systems are not among them: by such calls the owner of a file
/// that is open to read changes its attributes, seals it, or makes directories, and Landlock has no say.
const IOCTLS: &[Call] = &[IOCTL_KVM, IOCTL_TAP, IOCTL_SOCKET, IOCTL_BLOCK];

const EXECUTABLE: u64 = libc::PROT_EXEC as u64;

/// A library is loaded: the C library may need one to find a host's address.
const LIBRARY: Call = Call(
    libc::SYS_mmap,
    &[Test::Lacks(2, libc::PROT_WRITE as u64), Test::Lacks(3, libc::MAP_ANONYMOUS as u64)],
);

/// Of Linux; libc has no names for them.
const F_SETSIG: u64 = 10;
const F_SETOWN_EX: u64 = 15;
const F_SETLEASE: u64 = 1024;
const F_NOTIFY: u64 = 1026;
const F_SET_RW_HINT: u64 = 1036;

/// Memory, time, locks, an end: what any thread does.
const ANY: &[Call] = &[
    free(libc::SYS_read),
    free(libc::SYS_write),
    free(libc::SYS_readv),
    free(libc::SYS_writev),
    free(libc::SYS_close),
    free(libc::SYS_futex),
    free(libc::SYS_clock_gettime),
    free(libc::SYS_clock_getres),
    free(libc::SYS_clock_nanosleep),
    free(libc::SYS_nanosleep),
    free(libc::SYS_gettimeofday),
    free(libc::SYS_time),
    // Nothing becomes code.
    Call(libc::SYS_mmap, &[Test::Lacks(2, EXECUTABLE)]),
    Call(libc::SYS_mprotect, &[Test::Lacks(2, EXECUTABLE)]),
    free(libc::SYS_munmap),
    free(libc::SYS_mremap),
    free(libc::SYS_madvise),
    free(libc::SYS_mlock),
    free(libc::SYS_mlock2),
    free(libc::SYS_munlock),
    free(libc::SYS_mincore),
    free(libc::SYS_msync),
    free(libc::SYS_brk),
    free(libc::SYS_sched_yield),
    free(libc::SYS_sched_getaffinity),
    free(libc::SYS_getcpu),
    free(libc::SYS_getrandom),
    free(libc::SYS_rt_sigprocmask),
    free(libc::SYS_rt_sigaction),
    free(libc::SYS_rt_sigreturn),
    free(libc::SYS_sigaltstack),
    free(libc::SYS_restart_syscall),
    Call(libc::SYS_tgkill, &[Test::Own(0)]),
    free(libc::SYS_gettid),
    free(libc::SYS_getpid),
    free(libc::SYS_exit),
    free(libc::SYS_exit_group),
    free(libc::SYS_set_robust_list),
    free(libc::SYS_rseq),
    free(libc::SYS_membarrier),
    free(libc::SYS_poll),
    free(libc::SYS_ppoll),
    free(libc::SYS_epoll_wait),
    free(libc::SYS_epoll_pwait),
    free(libc::SYS_epoll_pwait2),
    free(libc::SYS_epoll_ctl),
    // Names, timer slack, capabilities: all of it about the thread itself, and none of it gives anything back.
    free(libc::SYS_prctl),
    // It can only become narrower.
    free(libc::SYS_seccomp),
    free(libc::SYS_getrusage),
    free(libc::SYS_sysinfo),
    free(libc::SYS_uname),
    // By a descriptor's owner and signal, a process is sent signals without `kill`. By a lease the owner of a file that is open
    // to read keeps others waiting, and a hint is the file's for all.
    Call(
        libc::SYS_fcntl,
        &[
            Test::IsNot(1, libc::F_SETFL as u64),
            Test::IsNot(1, libc::F_SETOWN as u64),
            Test::IsNot(1, F_SETSIG),
            Test::IsNot(1, F_SETOWN_EX),
            Test::IsNot(1, F_SETLEASE),
            Test::IsNot(1, F_NOTIFY),
            Test::IsNot(1, F_SET_RW_HINT),
        ],
    ),
    Call(libc::SYS_fcntl, &[Test::Is(1, libc::F_SETFL as u64), Test::Lacks(2, libc::O_ASYNC as u64)]),
    free(libc::SYS_fstat),
    free(libc::SYS_dup),
    // A thread that panics gives a person's terminal back. One by one: of the same type are others' keyboards and all that
    // a tap can be told, and what one rule allows no other one forbids.
    Call(SYS_ioctl, &[Test::Is(1, libc::TCGETS)]),
    Call(SYS_ioctl, &[Test::Is(1, libc::TCSETS)]),
    Call(SYS_ioctl, &[Test::Is(1, libc::TCSETSW)]),
    Call(SYS_ioctl, &[Test::Is(1, libc::TCSETSF)]),
    Call(SYS_ioctl, &[Test::Is(1, libc::TIOCGWINSZ)]),
    // About the thread's own descriptors.
    IOCTL_FIONBIO,
    Call(SYS_ioctl, &[Test::Is(1, libc::FIONREAD)]),
    Call(SYS_ioctl, &[Test::Is(1, libc::FIOCLEX)]),
    Call(SYS_ioctl, &[Test::Is(1, libc::FIONCLEX)]),
    // The service manager is told what happens, by whoever does it. No address of a network is reached without a
    // connection, and none is made here.
    free(libc::SYS_sendto),
];

/// Whoever debugs wants to see where a thread has panicked: it reads the symbols of the program.
fn wants_backtraces() -> bool {
    // The second is asked first, and counts for what this program writes into its log.
    ["RUST_BACKTRACE", "RUST_LIB_BACKTRACE"]
        .iter()
        .any(|name| std::env::var_os(name).is_some_and(|it| it != "0"))
}

const BACKTRACE: &[Call] = &[
    free(libc::SYS_openat),
    free(libc::SYS_statx),
    free(libc::SYS_newfstatat),
    free(libc::SYS_lseek),
    free(libc::SYS_readlink),
    free(libc::SYS_readlinkat),
    free(libc::SYS_getcwd),
    free(libc::SYS_stat),
    free(libc::SYS_lstat),
];

/// Starts threads, and no processes.
const THREADS: &[Call] = &[
    Call(
        libc::SYS_clone,
        &[Test::Has(0, (libc::CLONE_THREAD | libc::CLONE_VM | libc::CLONE_SIGHAND) as u64)],
    ),
    // `no_clone3` answers it.
    free(libc::SYS_clone3),
    free(libc::SYS_set_tid_address),
];

/// The descriptors of devices: files, taps, eventfds, rings.
const DEVICES: &[Call] = &[
    free(libc::SYS_pread64),
    free(libc::SYS_pwrite64),
    free(libc::SYS_preadv),
    free(libc::SYS_pwritev),
    free(libc::SYS_preadv2),
    free(libc::SYS_pwritev2),
    free(libc::SYS_lseek),
    free(libc::SYS_fsync),
    free(libc::SYS_fdatasync),
    free(libc::SYS_sync_file_range),
    free(libc::SYS_fallocate),
    free(libc::SYS_ftruncate),
    free(libc::SYS_fadvise64),
    free(libc::SYS_io_uring_enter),
    free(libc::SYS_copy_file_range),
    // Of an open file, too.
    free(libc::SYS_statx),
];

/// Connections that are there already.
const LINKS: &[Call] = &[
    free(libc::SYS_sendmsg),
    free(libc::SYS_recvfrom),
    free(libc::SYS_recvmsg),
    free(libc::SYS_shutdown),
    free(libc::SYS_setsockopt),
    free(libc::SYS_getsockopt),
    free(libc::SYS_getsockname),
    free(libc::SYS_getpeername),
];

/// Makes connections of the kinds that Outlive speaks.
const CONNECT: &[Call] = &[
    Call(libc::SYS_socket, &[Test::Is(0, libc::AF_INET as u64)]),
    Call(libc::SYS_socket, &[Test::Is(0, libc::AF_INET6 as u64)]),
    // As resolvers, consoles and the status speak; and what the C library takes to ask the kernel for an interface's number.
    // The device manager and others speak in packets.
    Call(libc::SYS_socket, &[Test::Is(0, libc::AF_UNIX as u64), Test::Kind(1, libc::SOCK_STREAM as u64)]),
    Call(libc::SYS_socket, &[Test::Is(0, libc::AF_UNIX as u64), Test::Kind(1, libc::SOCK_DGRAM as u64)]),
    // Links and addresses: what the C library, and the watch over the uplink, ask the kernel.
    Call(libc::SYS_socket, &[Test::Is(0, libc::AF_NETLINK as u64), Test::Is(2, libc::NETLINK_ROUTE as u64)]),
    // To the steward. A pair of datagram sockets could be connected elsewhere.
    Call(
        libc::SYS_socketpair,
        &[Test::Is(0, libc::AF_UNIX as u64), Test::Kind(1, libc::SOCK_SEQPACKET as u64)],
    ),
    free(libc::SYS_connect),
    free(libc::SYS_sendmmsg),
    free(libc::SYS_recvmmsg),
    free(libc::SYS_bind),
];

/// Takes connections.
const LISTEN: &[Call] = &[free(libc::SYS_listen), free(libc::SYS_accept), free(libc::SYS_accept4)];

/// Files, where Landlock allows it. What Landlock has no right for is not here: modes, owners, times and attributes of files
/// that are open to read, or only have a name. Root without capabilities owns every program of the host.
const FILES: &[Call] = &[
    free(libc::SYS_open),
    free(libc::SYS_openat),
    free(libc::SYS_openat2),
    free(libc::SYS_creat),
    free(libc::SYS_stat),
    free(libc::SYS_lstat),
    free(libc::SYS_newfstatat),
    free(libc::SYS_statx),
    free(libc::SYS_statfs),
    free(libc::SYS_fstatfs),
    free(libc::SYS_access),
    free(libc::SYS_faccessat),
    free(libc::SYS_faccessat2),
    free(libc::SYS_readlink),
    free(libc::SYS_readlinkat),
    free(libc::SYS_getdents64),
    free(libc::SYS_getcwd),
    free(libc::SYS_mkdir),
    free(libc::SYS_mkdirat),
    free(libc::SYS_rmdir),
    free(libc::SYS_unlink),
    free(libc::SYS_unlinkat),
    free(libc::SYS_rename),
    free(libc::SYS_renameat),
    free(libc::SYS_renameat2),
    free(libc::SYS_link),
    free(libc::SYS_linkat),
    free(libc::SYS_umask),
    free(libc::SYS_flock),
    free(libc::SYS_fsync),
    free(libc::SYS_fdatasync),
    free(libc::SYS_lseek),
    free(libc::SYS_pread64),
    free(libc::SYS_pwrite64),
    free(libc::SYS_ftruncate),
    free(libc::SYS_fallocate),
    free(libc::SYS_sendfile),
    free(libc::SYS_syncfs),
];

/// Signals, clocks and limits of this process.
const WATCH: &[Call] = &[
    free(libc::SYS_signalfd4),
    free(libc::SYS_rt_sigtimedwait),
    free(libc::SYS_rt_sigpending),
    free(libc::SYS_timerfd_create),
    free(libc::SYS_timerfd_settime),
    free(libc::SYS_timerfd_gettime),
    free(libc::SYS_getuid),
    free(libc::SYS_geteuid),
    free(libc::SYS_getgid),
    free(libc::SYS_getegid),
    free(libc::SYS_getppid),
    free(libc::SYS_getpgrp),
    free(libc::SYS_getpgid),
    free(libc::SYS_getsid),
    free(libc::SYS_getresuid),
    free(libc::SYS_getresgid),
    free(libc::SYS_getgroups),
    free(libc::SYS_capget),
    free(libc::SYS_times),
    free(libc::SYS_select),
    free(libc::SYS_pselect6),
    Call(libc::SYS_prlimit64, &[Test::Is(0, 0)]),
    free(libc::SYS_getrlimit),
];

/// Makes machines: memory, eventfds, rings, the look whether KVM has a dirty ring.
const MACHINE: &[Call] = &[
    free(libc::SYS_eventfd2),
    free(libc::SYS_epoll_create1),
    free(libc::SYS_pipe2),
    free(libc::SYS_dup3),
    free(libc::SYS_memfd_create),
    free(libc::SYS_mlockall),
    free(libc::SYS_io_uring_setup),
    free(libc::SYS_io_uring_register),
    Call(libc::SYS_process_vm_readv, &[Test::Own(0)]),
    free(libc::SYS_sched_setaffinity),
    free(libc::SYS_set_mempolicy),
    free(libc::SYS_get_mempolicy),
    free(libc::SYS_mbind),
];

/// A table of descriptors of its own, and the first place in the queue for a core.
const KEEP: &[Call] = &[
    Call(libc::SYS_unshare, &[Test::Is(0, libc::CLONE_FILES as u64)]),
    free(libc::SYS_sched_setscheduler),
    free(libc::SYS_setpriority),
];

/// A mask for files of its own: a socket has its mode from the first moment on.
const OWN_MASK: Call = Call(libc::SYS_unshare, &[Test::Is(0, libc::CLONE_FS as u64)]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_role_has_a_filter_that_the_kernel_can_take() {
        for role in Role::ALL {
            let filter = role.filter(1, SeccompAction::KillProcess).unwrap();
            assert!((50..2000).contains(&filter.len()), "{role:?}: {}", filter.len());
        }
        no_clone3().unwrap();
    }

    /// What a filter costs a vCPU's thread for each of its calls.
    #[test]
    #[ignore = "measures"]
    fn the_cost_of_filters() {
        const CALLS: u32 = 1_000_000;
        let (reading, _writing) = std::io::pipe().unwrap();
        let measure = || {
            let time = |work: &dyn Fn()| {
                let began = std::time::Instant::now();
                (0..CALLS).for_each(|_| work());
                began.elapsed().as_nanos() as f64 / f64::from(CALLS)
            };
            let ioctl = time(&|| {
                std::hint::black_box(rustix::io::ioctl_fionread(&reading)).ok();
            });
            let other = time(&|| {
                std::hint::black_box(rustix::thread::gettid());
            });
            println!("ioctl {ioctl:.1} ns, another call {other:.1} ns");
        };
        for _ in 0..3 {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    measure();
                    for filter in [no_clone3().unwrap()].into_iter().chain(
                        [Role::Control, Role::Reader, Role::Vcpu]
                            .map(|role| role.filter(std::process::id(), SeccompAction::KillProcess).unwrap()),
                    ) {
                        seccompiler::apply_filter(&filter).unwrap();
                        measure();
                    }
                });
            });
        }
    }

    #[test]
    fn threads_get_the_role_that_their_name_says() {
        let of = |names: &[&str]| names.iter().map(|name| Role::of(name)).collect::<Vec<_>>();
        assert_eq!(of(&["vcpu0", "vcpu31"]), [Role::Vcpu; 2]);
        assert_eq!(of(&["outlive-net", "outlive-blk-io", "outlive-serial"]), [Role::Device; 3]);
        assert_eq!(of(&["session", "sender", "arbiter"]), [Role::Reader, Role::Sender, Role::Control]);
        assert_eq!(
            of(&["audit", "disks", "self-check"]),
            [Role::Files; 3],
            "they read the guest and its images"
        );
    }

    /// Whether a role may make this call with these arguments.
    fn allows(role: Role, number: c_long, arguments: [u64; 3]) -> bool {
        let holds = |test: &Test| match *test {
            Test::Is(at, value) => arguments[usize::from(at)] == value,
            Test::IsNot(at, value) => arguments[usize::from(at)] != value,
            Test::Has(at, bits) => arguments[usize::from(at)] & bits == bits,
            Test::Lacks(at, bits) => arguments[usize::from(at)] & bits == 0,
            Test::OfType(at, kind) => arguments[usize::from(at)] & 0xff00 == kind << 8,
            Test::Kind(at, kind) => arguments[usize::from(at)] & 0xf == kind,
            Test::Own(at) => arguments[usize::from(at)] == 1,
        };
        role.calls().iter().any(|Call(its, tests)| *its == number && tests.iter().all(holds))
    }

    /// Rules of one call add up: what one of them forbids another one may allow.
    #[test]
    fn no_role_types_for_others_leaves_a_tap_behind_or_sends_signals_by_a_descriptor() {
        for role in Role::ALL {
            for request in
                [libc::TIOCSTI, TIOCLINUX, libc::TUNSETPERSIST, libc::TUNSETOWNER, libc::TUNSETGROUP]
            {
                assert!(!allows(role, SYS_ioctl, [3, request, 0]), "{role:?} {request:#x}");
            }
            let of_file = [F_SETLEASE, F_NOTIFY, F_SET_RW_HINT];
            for command in [libc::F_SETOWN as u64, F_SETSIG, F_SETOWN_EX].into_iter().chain(of_file) {
                assert!(!allows(role, libc::SYS_fcntl, [3, command, 9]), "{role:?} {command}");
            }
            let set_flags = |flags| allows(role, libc::SYS_fcntl, [3, libc::F_SETFL as u64, flags]);
            assert!(!set_flags(libc::O_ASYNC as u64) && set_flags(libc::O_NONBLOCK as u64), "{role:?}");
            assert!(allows(role, SYS_ioctl, [2, libc::TCGETS, 0]), "{role:?}");
        }
        for role in [Role::Vcpu, Role::Device] {
            assert!(allows(role, SYS_ioctl, [3, libc::TUNSETOFFLOAD, 0]), "{role:?}");
        }
    }

    /// Landlock has no right for any of it.
    #[test]
    fn no_role_changes_what_a_file_is_for_others_or_when_it_was_made() {
        const FCHMODAT2: c_long = 452;
        const SETXATTRAT: c_long = 463;
        const REMOVEXATTRAT: c_long = 466;
        const FILE_SETATTR: c_long = 469;
        let modes = [libc::SYS_chmod, libc::SYS_fchmod, libc::SYS_fchmodat, FCHMODAT2];
        let owners = [libc::SYS_chown, libc::SYS_fchown, libc::SYS_lchown, libc::SYS_fchownat];
        let times = [libc::SYS_utime, libc::SYS_utimes, libc::SYS_futimesat, libc::SYS_utimensat];
        let attributes = [
            [libc::SYS_setxattr, libc::SYS_lsetxattr, libc::SYS_fsetxattr, SETXATTRAT],
            [libc::SYS_removexattr, libc::SYS_lremovexattr, libc::SYS_fremovexattr, REMOVEXATTRAT],
        ];
        let others =
            [libc::SYS_mknod, libc::SYS_mknodat, libc::SYS_truncate, libc::SYS_quotactl, FILE_SETATTR];
        let all = [modes, owners, times].into_iter().chain(attributes).flatten().chain(others);
        for (role, number) in Role::ALL.into_iter().flat_map(|role| all.clone().map(move |it| (role, it))) {
            assert!(role.calls().iter().all(|call| call.0 != number), "{role:?} {number}");
        }
        // FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR, FS_IOC_ENABLE_VERITY, FS_IOC_SET_ENCRYPTION_POLICY, FS_IOC_SETVERSION,
        // BTRFS_IOC_SUBVOL_CREATE, FIOASYNC, FIOSETOWN, SIOCSPGRP
        let requests = [0x4008_6602, 0x401c_5820, 0x4080_6685, 0x800c_6613, 0x4008_7602, 0x5000_940e];
        for request in requests.into_iter().chain([libc::FIOASYNC, FIOSETOWN, SIOCSPGRP]) {
            for role in Role::ALL {
                assert!(!allows(role, SYS_ioctl, [3, request, 0]), "{role:?} {request:#x}");
            }
        }
        // As taps and interfaces are asked.
        for request in [libc::TUNSETIFF, libc::SIOCGIFINDEX, 0x8004_ae00] {
            assert!(allows(Role::Reader, SYS_ioctl, [3, request, 0]), "{request:#x}");
        }
    }

    #[test]
    fn sockets_are_of_the_kinds_that_are_spoken() {
        const DATAGRAM: u64 = libc::SOCK_DGRAM as u64;
        const PACKETS: u64 = libc::SOCK_SEQPACKET as u64;
        const CLOEXEC: u64 = libc::SOCK_CLOEXEC as u64;
        let (unix, netlink) = (libc::AF_UNIX as u64, libc::AF_NETLINK as u64);
        for role in Role::ALL {
            let connects = [Role::Control, Role::Reader].contains(&role);
            let makes = |arguments| allows(role, libc::SYS_socket, arguments);
            for kind in [libc::SOCK_STREAM as u64, DATAGRAM] {
                assert_eq!(makes([unix, kind | CLOEXEC, 0]), connects, "{role:?}");
            }
            assert!(!makes([unix, PACKETS, 0]), "{role:?}");
            let protocols = (0..64).filter(|it| makes([netlink, libc::SOCK_RAW as u64 | CLOEXEC, *it]));
            assert_eq!(protocols.count(), usize::from(connects), "{role:?}");
            let pairs = |kind| allows(role, libc::SYS_socketpair, [unix, kind, 0]);
            assert!(pairs(PACKETS | CLOEXEC) == connects && !pairs(DATAGRAM), "{role:?}");
        }
    }

    /// A thread that runs a guest's code, or reads what a guest or a stranger has written, opens and reaches nothing.
    #[test]
    fn those_who_are_near_a_guest_or_a_stranger_open_nothing() {
        let may = |role: Role, number| role.calls().iter().any(|call| call.0 == number);
        let started =
            [libc::SYS_execve, libc::SYS_execveat, libc::SYS_fork, libc::SYS_vfork, libc::SYS_ptrace];
        let rights = [libc::SYS_setuid, libc::SYS_capset, libc::SYS_mount, libc::SYS_bpf, libc::SYS_kill];
        for role in Role::ALL {
            for number in started.iter().chain(&rights) {
                assert!(!may(role, *number), "{role:?} {number}");
            }
        }
        for role in [Role::Vcpu, Role::Device, Role::Sender, Role::Receiver] {
            for number in [libc::SYS_openat, libc::SYS_socket, libc::SYS_connect, libc::SYS_clone] {
                let for_a_backtrace = number == libc::SYS_openat && wants_backtraces();
                assert!(!may(role, number) || for_a_backtrace, "{role:?} {number}");
            }
        }
    }
}
