//! Which system calls a thread may make.
//!
//! A thread's name says what it is for ([`Role::of`]). Filters add up: the main thread's holds for all threads, because
//! they are its children, and a role's own is narrower. What a thread starts is never wider than itself.
//!
//! A call that is missing here ends the process (SIGSYS), and the other host takes the VM over. So a call that is rare
//! and harmless is allowed; a call by which a thread would become something else, or reach what it was not given, is
//! not.

mod calls;

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{BackendError, BpfProgram, SeccompAction, SeccompFilter, SeccompRule, TargetArch};

use calls::*;

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
            "disks" | "disk-audit" | "disk-sync" | "sidecars" | "self-check" | "audit" | "boot-disk"
            | "recorder" | "record-base" => Self::Files,
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

#[cfg(test)]
mod tests {
    use libc::SYS_ioctl;

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
            of(&["audit", "disks", "disk-audit", "self-check"]),
            [Role::Files; 4],
            "they read the guest and its images"
        );
    }

    /// Keys are read by the thread that tells until when they count, too, and belong to a VM's own user.
    #[test]
    fn whoever_opens_files_may_ask_who_it_is() {
        for role in Role::ALL.into_iter().filter(|role| allows(*role, libc::SYS_getdents64, [0; 3])) {
            assert!(allows(role, libc::SYS_geteuid, [0; 3]), "{role:?}");
        }
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

    /// Root without capabilities may still do it to all processes of root's.
    #[test]
    fn no_role_says_when_others_run() {
        let others = [
            (libc::SYS_sched_setscheduler, [1, libc::SCHED_IDLE as u64, 0]),
            (libc::SYS_setpriority, [libc::PRIO_PROCESS as u64, 1, 19]),
            (libc::SYS_setpriority, [libc::PRIO_PGRP as u64, 0, 19]),
            (libc::SYS_setpriority, [libc::PRIO_USER as u64, 0, 19]),
            (libc::SYS_sched_setaffinity, [1, 8, 0]),
            (libc::SYS_sched_setparam, [1, 0, 0]),
            (libc::SYS_sched_setattr, [1, 0, 0]),
            (libc::SYS_ioprio_set, [1, 1, 0]),
            (libc::SYS_prlimit64, [2, libc::RLIMIT_CPU as u64, 0]),
            (libc::SYS_prctl, [PR_SCHED_CORE, 2, 1]),
            (libc::SYS_migrate_pages, [1, 0, 0]),
            (libc::SYS_move_pages, [1, 0, 0]),
            (libc::SYS_tgkill, [2, 2, 9]),
            (libc::SYS_tkill, [2, 9, 0]),
            (libc::SYS_rt_sigqueueinfo, [2, 9, 0]),
            (libc::SYS_rt_tgsigqueueinfo, [2, 2, 9]),
            (libc::SYS_pidfd_open, [2, 0, 0]),
            (libc::SYS_pidfd_send_signal, [3, 9, 0]),
            (libc::SYS_process_madvise, [3, 0, 0]),
            (libc::SYS_process_vm_readv, [2, 0, 0]),
            (libc::SYS_process_vm_writev, [1, 0, 0]),
            (libc::SYS_get_robust_list, [2, 0, 0]),
            (libc::SYS_kcmp, [1, 2, 0]),
        ];
        for (role, (number, arguments)) in Role::ALL.into_iter().flat_map(|role| others.map(|it| (role, it)))
        {
            assert!(!allows(role, number, arguments), "{role:?} {number} {arguments:?}");
        }
        // As the keepers do it.
        let first = (libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK) as u64;
        for role in [Role::Control, Role::Keeper] {
            assert!(allows(role, libc::SYS_sched_setscheduler, [0, first, 0]), "{role:?}");
            let nice = -20_i64 as u64;
            assert!(allows(role, libc::SYS_setpriority, [libc::PRIO_PROCESS as u64, 0, nice]), "{role:?}");
        }
        assert!(allows(Role::Control, libc::SYS_prlimit64, [0, libc::RLIMIT_RTPRIO as u64, 0]));
        for role in Role::ALL {
            assert!(allows(role, libc::SYS_prctl, [libc::PR_SET_TIMERSLACK as u64, 1000, 0]), "{role:?}");
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
