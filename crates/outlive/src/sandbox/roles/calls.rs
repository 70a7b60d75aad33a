//! The system calls that threads make, by what they are for, and what their arguments must be.

use libc::{SYS_ioctl, c_long};
use seccompiler::{BackendError, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition};

/// A system call, and what its arguments must be.
#[derive(Clone, Copy)]
pub(super) struct Call(pub(super) c_long, pub(super) &'static [Test]);

/// A test of an argument, by its position.
#[derive(Clone, Copy)]
pub(super) enum Test {
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
    pub(super) fn condition(self, process: u32) -> Result<SeccompCondition, BackendError> {
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

pub(super) const fn free(number: c_long) -> Call {
    Call(number, &[])
}

pub(super) const KVM: u64 = 0xae;
pub(super) const IOCTL_KVM: Call = Call(SYS_ioctl, &[Test::OfType(1, KVM)]);
pub(super) const IOCTL_TAP_OFFLOAD: Call = Call(SYS_ioctl, &[Test::Is(1, libc::TUNSETOFFLOAD)]);
pub(super) const IOCTL_TAP_QUEUE: Call = Call(SYS_ioctl, &[Test::Is(1, libc::TUNSETQUEUE)]);
pub(super) const IOCTL_FIONBIO: Call = Call(SYS_ioctl, &[Test::Is(1, libc::FIONBIO)]);
/// Taps and terminals: anything but typing on somebody's, leaving a tap to others, and being sent signals by one. Of devices
/// it reaches those that this process has open, and Landlock says which it may open.
pub(super) const IOCTL_TAP: Call = Call(
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
pub(super) const TAPS_AND_TERMINALS: u64 = 0x54;
pub(super) const TIOCLINUX: u64 = 0x541c;
/// Sockets and interfaces: what the C library asks. Not whom a socket sends signals to.
pub(super) const IOCTL_SOCKET: Call =
    Call(SYS_ioctl, &[Test::OfType(1, 0x89), Test::IsNot(1, FIOSETOWN), Test::IsNot(1, SIOCSPGRP)]);
pub(super) const FIOSETOWN: u64 = 0x8901;
pub(super) const SIOCSPGRP: u64 = 0x8902;
/// Block devices.
pub(super) const IOCTL_BLOCK: Call = Call(SYS_ioctl, &[Test::OfType(1, 0x12)]);
/// All kinds of descriptors that Outlive asks so. Those of file systems are not among them: by such calls the owner of a file
/// that is open to read changes its attributes, seals it, or makes directories, and Landlock has no say.
pub(super) const IOCTLS: &[Call] = &[IOCTL_KVM, IOCTL_TAP, IOCTL_SOCKET, IOCTL_BLOCK];

pub(super) const EXECUTABLE: u64 = libc::PROT_EXEC as u64;

/// A library is loaded: the C library may need one to find a host's address.
pub(super) const LIBRARY: Call = Call(
    libc::SYS_mmap,
    &[Test::Lacks(2, libc::PROT_WRITE as u64), Test::Lacks(3, libc::MAP_ANONYMOUS as u64)],
);

/// Of Linux; libc has no names for them.
pub(super) const F_SETSIG: u64 = 10;
pub(super) const F_SETOWN_EX: u64 = 15;
pub(super) const F_SETLEASE: u64 = 1024;
pub(super) const F_NOTIFY: u64 = 1026;
pub(super) const F_SET_RW_HINT: u64 = 1036;
pub(super) const PR_SCHED_CORE: u64 = 62;

/// Memory, time, locks, an end: what any thread does.
pub(super) const ANY: &[Call] = &[
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
    // Names, timer slack, capabilities: about the thread itself, and none of it gives anything back. By cookies of cores,
    // which can be other processes', a thread would keep others away from the second half of its core.
    Call(libc::SYS_prctl, &[Test::IsNot(0, PR_SCHED_CORE)]),
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
pub(super) fn wants_backtraces() -> bool {
    // The second is asked first, and counts for what this program writes into its log.
    ["RUST_BACKTRACE", "RUST_LIB_BACKTRACE"]
        .iter()
        .any(|name| std::env::var_os(name).is_some_and(|it| it != "0"))
}

pub(super) const BACKTRACE: &[Call] = &[
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
pub(super) const THREADS: &[Call] = &[
    Call(
        libc::SYS_clone,
        &[Test::Has(0, (libc::CLONE_THREAD | libc::CLONE_VM | libc::CLONE_SIGHAND) as u64)],
    ),
    // `no_clone3` answers it.
    free(libc::SYS_clone3),
    free(libc::SYS_set_tid_address),
];

/// The descriptors of devices: files, taps, eventfds, rings.
pub(super) const DEVICES: &[Call] = &[
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
pub(super) const LINKS: &[Call] = &[
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
pub(super) const CONNECT: &[Call] = &[
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
pub(super) const LISTEN: &[Call] = &[free(libc::SYS_listen), free(libc::SYS_accept), free(libc::SYS_accept4)];

/// Files, where Landlock allows it. What Landlock has no right for is not here: modes, owners, times and attributes of files
/// that are open to read, or only have a name. Root without capabilities owns every program of the host.
pub(super) const FILES: &[Call] = &[
    // Whose file it is decides whether keys are believed.
    free(libc::SYS_geteuid),
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
pub(super) const WATCH: &[Call] = &[
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
pub(super) const MACHINE: &[Call] = &[
    free(libc::SYS_eventfd2),
    free(libc::SYS_epoll_create1),
    free(libc::SYS_pipe2),
    free(libc::SYS_dup3),
    free(libc::SYS_memfd_create),
    free(libc::SYS_mlockall),
    free(libc::SYS_io_uring_setup),
    free(libc::SYS_io_uring_register),
    Call(libc::SYS_process_vm_readv, &[Test::Own(0)]),
    free(libc::SYS_set_mempolicy),
    free(libc::SYS_get_mempolicy),
    free(libc::SYS_mbind),
];

/// A table of descriptors of its own, and the first place in the queue for a core. For the calling thread alone: a process
/// or a thread that has a number may be another VM's, which would wait for its turn for ever.
pub(super) const KEEP: &[Call] = &[
    Call(libc::SYS_unshare, &[Test::Is(0, libc::CLONE_FILES as u64)]),
    Call(libc::SYS_close_range, &[Test::Is(2, 0)]),
    Call(libc::SYS_sched_setscheduler, &[Test::Is(0, 0)]),
    Call(libc::SYS_setpriority, &[Test::Is(0, libc::PRIO_PROCESS as u64), Test::Is(1, 0)]),
];

/// A mask for files of its own: a socket has its mode from the first moment on.
pub(super) const OWN_MASK: Call = Call(libc::SYS_unshare, &[Test::Is(0, libc::CLONE_FS as u64)]);
