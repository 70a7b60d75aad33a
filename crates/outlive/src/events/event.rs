//! The vocabulary of the stream: every event with its fields, and a line.

use serde::{Deserialize, Serialize};

use outlive_epoch::ChunkRange;

use super::counts::{Measured, Stats};
use crate::disk::DangerKind;
use crate::link::LinkKind;

/// Which of the two commands wrote a [`Event::Started`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// `outlive run`: it boots the VM.
    Primary,
    /// `outlive standby`: it waits for a VM to protect.
    Standby,
}

/// A part of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// A virtual CPU, or KVM.
    Vcpu,
    /// A disk's image.
    Disk,
    /// The network of the guest's clients.
    Network,
}

/// What a takeover waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SettlePart {
    /// The last commit is being written to the copy's memory.
    Memory,
    /// Memory is ready, and the images are not.
    Disk,
}

/// Where a standby's copy differs from the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "in", rename_all = "snake_case")]
pub enum Place {
    /// In memory.
    Memory {
        /// Frame number of the first of the 64 pages that were compared together.
        first_page: u64,
        /// Which of them were compared; bit 0 is the first. At least one of them differs.
        mask: u64,
    },
    /// On a disk.
    Disk {
        /// The disk's position among the VM's disks.
        disk: u16,
        /// The first byte that was compared.
        offset: u64,
        /// How many bytes were. At least one of them differs.
        bytes: u64,
    },
}

impl From<ChunkRange> for Place {
    fn from(chunks: ChunkRange) -> Self {
        Self::Disk { disk: chunks.disk, offset: chunks.offset(), bytes: chunks.len() }
    }
}

/// One thing that happened. Times are microseconds unless the name says otherwise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The process is set up. A standby does not know the VM yet, so it leaves its parts out.
    Started {
        /// Which command this is.
        role: Role,
        /// Name of the VM.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vm: Option<String>,
        /// Number of virtual CPUs.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vcpus: Option<u32>,
        /// Guest memory in bytes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        memory: Option<u64>,
        /// Name of the dirty tracker's back end, for example `ring`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tracker: Option<String>,
    },
    /// What confines the process.
    Confined {
        /// It has given up its rights, and its threads make no system calls that they do not need.
        sandbox: bool,
    },
    /// With `--or-standby`: what this host does with the VM.
    Decided {
        /// It starts the VM; if not, it waits as the VM's standby.
        starts: bool,
        /// Why, for a person.
        why: String,
    },
    /// An operator has accepted a danger, by an option.
    Accepted {
        /// Which danger, for example `stale_image`.
        danger: DangerKind,
        /// What it is about, for a person.
        about: String,
    },
    /// A standby accepts connections at `addr` (with the real port where port 0 was asked for).
    Listening {
        /// `HOST:PORT`.
        addr: String,
    },
    /// A primary has connected to a standby, and the standby has accepted it.
    StandbyAttached {
        /// The standby's `HOST:PORT`.
        addr: String,
        /// What protects the connection, as its ends have agreed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        link: Option<LinkKind>,
    },
    /// A connection to a standby's port was refused before it had introduced itself; at most one a second is told.
    ConnectionRefused {
        /// Where it came from.
        from: String,
        /// Why, for a person.
        why: String,
    },
    /// A standby has refused a primary; each reason is told once a minute while that lasts.
    PrimaryRefused {
        /// Why, for a person.
        why: String,
    },
    /// The other host runs this VM, too, or another VM of the same name. No VM is stopped by that; an operator must
    /// look.
    RunsTwice {
        /// Name of the VM there.
        vm: String,
        /// Its id.
        id: String,
        /// The generation in which it runs there.
        generation: u64,
        /// `HOST:PORT` of the other host; all of them where there are several.
        at: String,
        /// It is this very VM; else it only has the same name.
        same_vm: bool,
    },
    /// A primary reaches no standby, or is refused before it could introduce itself; told now and then while that
    /// lasts.
    StandbyUnreachable {
        /// Why, for a person.
        why: String,
    },
    /// A standby has accepted a primary; the base begins.
    PrimaryAttached {
        /// Where the primary connected from.
        addr: String,
        /// What protects the connection, as its ends have agreed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        link: Option<LinkKind>,
    },
    /// A standby has the base: from here on it can take the VM over.
    Ready {
        /// The generation that runs the VM.
        generation: u64,
        /// Number of the base checkpoint.
        checkpoint: u64,
    },
    /// A standby has refused what its primary sent, and can no longer take over.
    StreamRefused {
        /// Why, for a person.
        why: String,
    },
    /// The primary goes on without this standby, which can no longer take over.
    Dismissed,
    /// How far the base checkpoint is.
    BaseProgress {
        /// Pre-copy round, from 1.
        round: u32,
        /// Pages sent in all rounds so far.
        sent_pages: u64,
        /// Pages of the first round: all that the VM has touched.
        total_pages: u64,
        /// Pages of all rounds so far, sent or not.
        #[serde(default)]
        planned_pages: u64,
    },
    /// The base synchronisation cannot come to its end, because the guest writes faster than the link carries.
    /// The guest runs freely until the next attempt.
    BaseStalled {
        /// Pages that are left.
        pages: u64,
        /// Bytes that the link carries in a second.
        link_bytes_per_s: u64,
        /// How long the guest would have to stop for those pages, in milliseconds.
        stop_ms: u64,
        /// How long it may (`--max-pause`), in milliseconds.
        max_pause_ms: u64,
        /// The next attempt begins after this time, in milliseconds.
        again_ms: u64,
    },
    /// The guest's kernel panicked; what follows is its own decision.
    GuestPanicked,
    /// The guest restarted. It stays protected.
    GuestRestarted {
        /// How it asked for the restart.
        how: String,
    },
    /// The guest boots the kernel of its own disk (`--boot disk`): at its start, or at a restart.
    BootsFromDisk {
        /// The disk's position among the VM's disks.
        disk: u16,
        /// The entry's title.
        entry: String,
        /// The kernel's path on the disk.
        kernel: String,
        /// The command line, with the operator's words.
        command_line: String,
    },
    /// A guest that boots the kernel of its own disk has restarted with its last kernel, because the disk has none
    /// that can be read or started.
    BootsLastKernel {
        /// Why, for a person.
        why: String,
    },
    /// The standby has compared its copy with what a checkpoint says of the VM (`--self-check`).
    SelfCheck {
        /// The checkpoint.
        checkpoint: u64,
        /// How the copy differs; `null` when it is the same.
        difference: Option<String>,
    },
    /// The audit, which compares memory and disks all the time, has found that the standby's copy is not the VM. The
    /// copy is thrown away and made anew. Both hosts say so.
    AuditDiffers {
        /// The checkpoint at which they were compared.
        checkpoint: u64,
        /// Where they differ.
        #[serde(flatten)]
        place: Place,
    },
    /// How far the synchronisation of a disk is.
    DiskSync {
        /// The disk's position among the VM's disks.
        disk: u16,
        /// Bytes compared by their sums.
        done_bytes: u64,
        /// Bytes of the disk.
        total_bytes: u64,
        /// Bytes sent so far, of all disks.
        sent_bytes: u64,
        /// Bytes read so far to be compared, of all disks. What this process has read before is read again only if
        /// it was written since.
        #[serde(default)]
        read_bytes: u64,
    },
    /// The base checkpoint is committed: from here on the VM survives the loss of this host.
    Protected {
        /// The generation that runs the VM.
        generation: u64,
        /// Number of the committed base checkpoint.
        checkpoint: u64,
        /// How long the base took, in milliseconds.
        base_ms: u64,
        /// Rounds in which memory was sent.
        #[serde(default)]
        rounds: u32,
        /// For how long the guest was held meanwhile, in milliseconds, because it wrote faster than the link
        /// carries.
        #[serde(default)]
        held_ms: u64,
        /// The longest time that it stood still for that, or at the last stop.
        #[serde(default)]
        longest_stop_us: u64,
    },
    /// Totals since this process became the active side; sent every 200 ms at first, every 2 s in the long
    /// run, and at the end.
    Stats(Stats),
    /// What was measured since the last event of this kind; sent every second at first, every minute in the
    /// long run, and at the end. A standby sends it too, about its threads.
    Measured(Measured),
    /// The peer is considered dead.
    LinkLost {
        /// Why, for a person.
        reason: String,
    },
    /// This side tries to win `generation`.
    Arbitrating {
        /// The generation asked for.
        generation: u64,
    },
    /// The arbiter cannot be asked at the moment; this side waits and asks again.
    ArbiterUnreachable {
        /// Why, for a person.
        why: String,
    },
    /// The arbiter, which is probed while nobody needs it, cannot be written to. The VM runs on.
    ArbiterLost {
        /// Why, for a person.
        why: String,
    },
    /// The arbiter can be written to again.
    ArbiterBack {
        /// For how long it was lost, in milliseconds.
        lost_ms: u64,
    },
    /// This standby's host has less memory left than the VM may come to need here.
    StandbyMemoryShort {
        /// Bytes that the VM may still need here.
        missing: u64,
        /// Bytes that this host has left.
        available: u64,
    },
    /// It has enough again, or protects no VM any more.
    StandbyMemoryEnough,
    /// The standby says that it cannot write to the arbiter: it could not take the VM over now. The primary tells it.
    StandbyArbiterLost {
        /// For how long, in seconds.
        for_s: u64,
    },
    /// The standby can write to it again.
    StandbyArbiterBack {
        /// How long the primary knew of the loss, in milliseconds.
        lost_ms: u64,
    },
    /// An operator has decided about `generation`, because the arbiter is `manual`.
    OperatorDecided {
        /// The generation decided about.
        generation: u64,
        /// Whether it is this host's; else it is the other one's.
        here: bool,
    },
    /// This side won `generation` and may run the VM.
    Won {
        /// The generation won.
        generation: u64,
    },
    /// The other side won `generation`: this one stops its VM and drops its held output.
    Lost {
        /// The generation lost.
        generation: u64,
        /// Who has it, as the arbiter says.
        owner: String,
    },
    /// Another host has the VM: this process has dropped what it had of it and waits as the VM's standby.
    /// `Listening` follows once it does.
    BackToStandby {
        /// Why, for a person.
        why: String,
    },
    /// The VM runs, but nothing would take over if this host died.
    Unprotected {
        /// Why, for a person.
        why: String,
    },
    /// The VM is unprotected for a long time; said after a minute, and then every ten.
    StillUnprotected {
        /// Why, for a person.
        why: String,
        /// For how long, in seconds.
        for_s: u64,
    },
    /// A part of this host is broken, while the VM runs on it.
    HostFault {
        /// Which part.
        part: Part,
        /// What is wrong, for a person.
        why: String,
        /// Why the VM stays here, for a person; `null`: it is left to its standby, and this process ends, after
        /// a broken disk or network only when the arbiter has answered. (A process whose vCPU fails ends without
        /// a standby, too.)
        kept: Option<String>,
    },
    /// An operator wants the VM at its standby.
    HandOver {
        /// Why it stays here, for a person; `null`: it is left to its standby. A second one with a reason follows if that
        /// does not take it.
        kept: Option<String>,
    },
    /// The guest stands still after this checkpoint, because it is being handed over. It runs again where `takeover` or
    /// `won` follows.
    StandsStill {
        /// The checkpoint.
        checkpoint: u64,
    },
    /// It is well again.
    HostMended {
        /// Which part.
        part: Part,
    },
    /// A protected VM has had no commit for a second although checkpoints wait for one: its standby, or the link, is
    /// slow. Clients wait as long; the protection goes on. At most once in ten seconds.
    StandbySlow {
        /// Milliseconds since the last commit.
        behind_ms: u64,
        /// How many checkpoints wait.
        in_flight: u64,
    },
    /// Commits come again.
    StandbyCaughtUp {
        /// How many milliseconds that took.
        slow_ms: u64,
    },
    /// A takeover waits because the copy is not at its last commit yet. Told again every few seconds for as long as that
    /// lasts; the VM runs nowhere meanwhile, unless the lost host still has it.
    SettleSlow {
        /// For what.
        part: SettlePart,
        /// Milliseconds since the primary was lost.
        for_ms: u64,
        /// Milliseconds for which the disk has not finished its last request; 0 if it gets on, or if it is not the disk.
        hangs_ms: u64,
    },
    /// A standby takes no primary, because a copy that it has thrown away is not gone: most likely its disk does not answer.
    /// Told again every minute for as long as that lasts.
    CopyLingers {
        /// Milliseconds since it was thrown away.
        for_ms: u64,
    },
    /// The VM is another one as it was at a recorded moment (`outlive rewind`).
    Rewound {
        /// The id of that VM.
        from: String,
        /// The run of the record.
        run: u64,
        /// The generation in which that VM ran.
        generation: u64,
        /// The checkpoint.
        checkpoint: u64,
        /// When it was committed, as RFC 3339, by the clock of the host that recorded it.
        at: String,
    },
    /// The standby has begun to record the VM. Memory and disks are being copied.
    RecordBegan {
        /// The number of the run: checkpoints without a gap.
        run: u64,
    },
    /// The record has all that is needed to have the VM again as of this checkpoint and every later one.
    RecordWhole {
        /// The run.
        run: u64,
        /// The checkpoint.
        from: u64,
    },
    /// The VM goes on and is not recorded, until the next run begins.
    RecordGap {
        /// The run that has ended; 0 if none had begun.
        run: u64,
        /// Why, for a person.
        why: String,
    },
    /// The command of `--fence` has not cut the lost primary off; it is run again, and the VM waits.
    FenceFailed {
        /// Which run it was, from 1.
        attempt: u32,
        /// Why, for a person.
        why: String,
    },
    /// The command of `--fence` has cut the lost primary off.
    PeerFenced {
        /// Which run it was, from 1.
        attempt: u32,
        /// Time since the first run began, in milliseconds.
        took_ms: u64,
    },
    /// A standby resumed the VM from the last committed checkpoint.
    Takeover {
        /// The generation that runs the VM from now on.
        generation: u64,
        /// The checkpoint it was resumed from.
        checkpoint: u64,
        /// From the last byte heard of the primary until the link was declared dead.
        detect_us: u64,
        /// From then until memory and disks were at the last committed checkpoint.
        #[serde(default)]
        settle_us: u64,
        /// From then until the generation was won.
        arbitrate_us: u64,
        /// From then until the vCPUs ran.
        restore_us: u64,
        /// From the declaration until the VM's first frame left, if that is known already.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        first_packet_us: Option<u64>,
        /// Sum of the four times from detection to restore.
        total_us: u64,
        /// Frames of the lost primary's input that the guest is given here.
        #[serde(default)]
        input_given: u64,
        /// Frames of committed epochs that were sent again here, because they may not have left there.
        #[serde(default)]
        output_repeated: u64,
    },
    /// The resumed VM sent its first frame.
    FirstPacket {
        /// Time since the link was declared dead.
        after_us: u64,
    },
    /// Events are missing here: the stream could not be written, or its reader did not read.
    EventsLost {
        /// How many.
        count: u64,
    },
    /// Last line of a process that ends in order.
    Ended {
        /// Why, for a person.
        reason: String,
        /// The exit code.
        code: i32,
    },
    /// An event of a newer version.
    #[serde(other)]
    Unknown,
}

/// One line of the stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
    /// When: `CLOCK_MONOTONIC` in microseconds.
    pub t_us: u64,
    /// Who says so.
    pub pid: u32,
    /// When, on the clock of the wall: RFC 3339, UTC, with milliseconds.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub time: String,
    /// Which VM it is about, once that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_name: Option<String>,
    /// Its identity over all hosts and generations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_id: Option<String>,
}

impl Record {
    /// A line without what only people need.
    pub fn of(event: Event, t_us: u64, pid: u32) -> Self {
        Self { event, t_us, pid, time: String::new(), vm_name: None, vm_id: None }
    }
}
