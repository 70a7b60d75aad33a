//! What `outlive status` tells, as JSON.

use std::sync::Weak;
use std::time::{Duration, SystemTime};

use outlive_record::{Recorder, Report};
use serde::{Deserialize, Serialize};

use super::standing::{Facts, Progress};
use super::survival::{Survival, survivals};
use crate::arbiter::Sight;
use crate::audit::AuditProgress;
use crate::events::Role;
use crate::heat::HeatMap;
use crate::link::LinkKind;
use crate::sandbox;

/// The state of one process. Times of the day are RFC 3339 in UTC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Name of the VM; `null` for a standby that no primary has come to yet.
    pub vm: Option<String>,
    /// The process.
    pub pid: u32,
    /// Whether the VM runs here.
    pub role: Role,
    /// Whether a whole checkpoint is committed and every later one follows.
    pub protected: bool,
    /// Why not.
    pub why: Option<String>,
    /// Since when.
    pub since: String,
    /// The generation that runs the VM.
    pub generation: Option<u64>,
    /// The other host's address: the standby's as the primary was given it, or where the primary's connection
    /// came from.
    pub peer: Option<String>,
    /// What protects the links of this process; `null` if it has none.
    #[serde(default)]
    pub link: Option<LinkKind>,
    /// Whether this process is confined: it has no rights of root, and no thread makes a system call that it does not
    /// need.
    #[serde(default)]
    pub sandbox: bool,
    /// The newest committed checkpoint.
    pub checkpoint: Option<u64>,
    /// Milliseconds since its commit.
    pub committed_ms_ago: Option<u64>,
    /// Checkpoints that are sent and not committed; only a protected primary knows it.
    pub in_flight: Option<u64>,
    /// Bytes sent since the last commit; likewise.
    pub bytes_in_flight: Option<u64>,
    /// What the audit has compared; `null` if it has compared nothing yet.
    #[serde(default)]
    pub audit: Option<Audited>,
    /// Where the guest's memory is written; `null` unless the VM runs here and is protected.
    #[serde(default)]
    pub heat: Option<HeatMap>,
    /// How far the VM's record is; `null` unless this standby was started with `--record`.
    #[serde(default)]
    pub record: Option<Recorded>,
    /// What is known of the arbiter; `null` if there is none.
    pub arbiter: Option<ArbiterSight>,
    /// Since when the standby cannot reach the arbiter, as it says; `null` if it can, or says nothing, and at a standby.
    #[serde(default)]
    pub standby_lost_arbiter_since: Option<String>,
    /// What the loss of this host would mean now.
    pub loss_of_this_host: Survival,
    /// What the loss of the other one would.
    pub loss_of_other_host: Survival,
}

/// What the audit, which compares pages of both hosts all the time, has done in this process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audited {
    /// Pages compared.
    pub pages: u64,
    /// How often all pages of the VM have had their turn. Only the host where the VM runs knows.
    pub rounds: u64,
    /// When they had the last time.
    pub round_ended: Option<String>,
    /// Milliseconds since then.
    pub round_ended_ms_ago: Option<u64>,
    /// Bytes of disks compared.
    #[serde(default)]
    pub disk_bytes: u64,
    /// How often all of the replicated disks have had their turn. Only the host where the VM runs knows.
    #[serde(default)]
    pub disk_rounds: u64,
    /// When they had the last time.
    #[serde(default)]
    pub disk_round_ended: Option<String>,
    /// Milliseconds since then.
    #[serde(default)]
    pub disk_round_ended_ms_ago: Option<u64>,
    /// Bytes that were left out of that round, because they could not be compared however often they were tried.
    #[serde(default)]
    pub disk_round_left_out: u64,
    /// How often a copy was found to differ.
    pub differences: u64,
}

impl Audited {
    fn new(progress: AuditProgress, now: SystemTime) -> Option<Self> {
        let AuditProgress { pages, rounds, round_ended, differences, .. } = progress;
        let AuditProgress { disk_bytes, disk_rounds, disk_round_ended, disk_round_left_out, .. } = progress;
        let ago = |at: SystemTime| millis(now.duration_since(at).unwrap_or_default());
        (pages > 0 || disk_bytes > 0 || differences > 0).then(|| Self {
            pages,
            rounds,
            round_ended: round_ended.map(time),
            round_ended_ms_ago: round_ended.map(ago),
            disk_bytes,
            disk_rounds,
            disk_round_ended: disk_round_ended.map(time),
            disk_round_ended_ms_ago: disk_round_ended.map(ago),
            disk_round_left_out,
            differences,
        })
    }
}

/// The record that a standby writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// Where it is.
    pub directory: String,
    /// The run that is being written; `null` without a VM, and in a gap.
    pub run: Option<u64>,
    /// The first checkpoint of that run that can be had; `null` before its base is whole.
    pub first: Option<u64>,
    /// When it was committed.
    pub first_at: Option<String>,
    /// Milliseconds since then.
    pub first_ms_ago: Option<u64>,
    /// The last one that is written.
    pub last: Option<u64>,
    /// Bytes of the whole record.
    pub bytes: u64,
    /// How often the VM went on without being recorded.
    pub gaps: u64,
    /// Why nothing is recorded, in a gap.
    pub why: Option<String>,
}

impl Recorded {
    fn new(recorder: &Recorder, now: SystemTime) -> Self {
        let Report { run, from, last, bytes, gaps, why } = recorder.report();
        Self {
            directory: recorder.directory().display().to_string(),
            run,
            first: from.map(|(number, _)| number),
            first_at: from.map(|(_, at)| time(at)),
            first_ms_ago: from.map(|(_, at)| millis(now.duration_since(at).unwrap_or_default())),
            last: last.map(|(number, _)| number),
            bytes,
            gaps,
            why: why.filter(|_| run.is_none()),
        }
    }
}

/// What is known of the arbiter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArbiterSight {
    /// When it was last written to.
    pub seen: Option<String>,
    /// Milliseconds since then.
    pub seen_ms_ago: Option<u64>,
    /// Why it is lost, if it is.
    pub lost: Option<String>,
    /// What protects the way to it; `null` for a directory, etcd (its URLs say it) and an operator.
    #[serde(default)]
    pub link: Option<LinkKind>,
    /// It is a person (`--arbiter manual`): nothing is tried while all is well.
    #[serde(default)]
    pub is_operator: bool,
}

impl Status {
    pub(super) fn new(facts: &Facts, sight: Option<&Sight>, progress: Progress, now: SystemTime) -> Self {
        let since_commit = progress.since_commit.map(millis);
        let [this, other] = survivals(facts, sight.is_some_and(|it| it.lost.is_some()), since_commit);
        let [this, other] = [this, other].map(|survival| match sight {
            Some(sight) if sight.is_a_person && facts.protected => survival.by_a_person(),
            _ => survival,
        });
        let [this, other] = match sight {
            Some(sight) if sight.is_a_person && facts.asking && facts.fencing.is_none() => {
                Survival::waiting_for_a_person(facts.role)
            }
            _ => [this, other],
        };
        let counts = facts.protected && facts.role == Role::Primary;
        Self {
            vm: facts.vm.clone(),
            pid: std::process::id(),
            role: facts.role,
            protected: facts.protected,
            why: (!facts.protected).then(|| facts.reason()),
            since: time(facts.since),
            generation: facts.generation,
            peer: facts.peer.clone(),
            link: facts.link,
            sandbox: sandbox::is_on(),
            checkpoint: (progress.checkpoint > 0).then_some(progress.checkpoint),
            committed_ms_ago: since_commit,
            in_flight: counts.then_some(progress.in_flight),
            bytes_in_flight: progress.bytes_in_flight.filter(|_| counts),
            audit: Audited::new(progress.audit, now),
            heat: facts.heat.as_ref().filter(|_| counts).and_then(|heat| heat.map()),
            record: facts.record.as_ref().and_then(Weak::upgrade).map(|it| Recorded::new(&it, now)),
            arbiter: sight.map(|sight| ArbiterSight {
                // Nobody looks whether a person is awake.
                seen: sight.seen.filter(|_| !sight.is_a_person).map(time),
                seen_ms_ago: sight
                    .seen
                    .filter(|_| !sight.is_a_person)
                    .map(|at| millis(now.duration_since(at).unwrap_or_default())),
                lost: sight.lost.clone(),
                link: sight.link,
                is_operator: sight.is_a_person,
            }),
            standby_lost_arbiter_since: facts.other.arbiter.lost().map(time),
            loss_of_this_host: this,
            loss_of_other_host: other,
        }
    }
}

fn millis(time: Duration) -> u64 {
    time.as_millis() as u64
}

pub(super) fn time(at: SystemTime) -> String {
    humantime::format_rfc3339_seconds(at).to_string()
}

pub(crate) fn span(ms: u64) -> String {
    // A long time needs no milliseconds.
    let ms = if ms >= 10_000 { ms / 1000 * 1000 } else { ms };
    humantime::format_duration(Duration::from_millis(ms)).to_string()
}

#[cfg(test)]
mod tests {
    use super::super::Standing;
    use super::super::standing::OtherSight;
    use super::*;
    use crate::arbiter::Site;
    use crate::heat::Heat;
    use crate::process;
    use outlive_dirty::{Gfn, MemorySlot};

    const CLEAR: Sight = Sight {
        seen: Some(SystemTime::UNIX_EPOCH),
        lost: None,
        lost_since: None,
        is_a_person: false,
        link: None,
    };

    fn counted() -> Progress {
        Progress {
            checkpoint: 812,
            since_commit: Some(Duration::from_millis(3)),
            in_flight: 2,
            bytes_in_flight: Some(12_000),
            audit: AuditProgress::default(),
        }
    }

    fn primary() -> std::sync::Arc<Standing> {
        let standing = Standing::new(Role::Primary, Some("web"), "starting");
        standing.runs_here("web", "00ff", 1, "no --standby is given", counted);
        standing
    }

    /// What is known of it, with a wall clock and an arbiter of the test's.
    fn at(standing: &Standing, sight: Option<&Sight>) -> Status {
        let mut facts = standing.facts();
        facts.since = SystemTime::UNIX_EPOCH;
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(61);
        let of_a_test = Status::new(&facts, sight, counted(), now);
        assert!(!of_a_test.sandbox);
        Status { sandbox: true, ..of_a_test }
    }

    /// Whoever shows the VMs of a node reads this by name, and takes what is missing for unknown.
    #[test]
    fn the_node_finds_all_that_it_reads() {
        let standing = primary();
        standing.peer("hostb:7000");
        standing.protected(1);
        let audit = AuditProgress { pages: 1, ..AuditProgress::default() };
        let progress = Progress { audit, ..counted() };
        let status = Status::new(&standing.facts(), Some(&CLEAR), progress, SystemTime::now());
        let said = serde_json::to_value(&status).unwrap();
        for pointer in outlive_node::READ_OF_STATUS {
            assert!(
                said.pointer(pointer).is_some(),
                "the node reads {pointer}, and a process does not say it"
            );
        }
    }

    /// The node takes the map of memory for itself, and draws none that it does not understand.
    #[test]
    fn the_node_finds_where_memory_is_written() {
        let slot = |id, base, pages| MemorySlot { id, base: Gfn(base), pages, host_addr: 0 };
        let heat = Heat::new(&[slot(0, 0, 33 << 8), slot(1, 1 << 20, 512)]);
        let mut counter = heat.counter();
        let standing = primary();
        standing.heats(&heat);
        counter.tell();
        counter.count(1 << 20);
        std::thread::sleep(Duration::from_millis(1001));
        counter.tell();
        assert_eq!(Standing::status(&standing).heat, None, "it is not protected");
        standing.protected(1);
        let status = Standing::status(&standing);
        let map = status.heat.as_ref().unwrap();
        assert_eq!(
            (map.cell_bytes, map.pages_per_s.len(), map.pages_per_s[132]),
            (256 << 10, 132 + 8, 1),
            "{map:?}"
        );
        let found = outlive_node::heat_in(&serde_json::to_vec(&status).unwrap());
        assert_eq!(found, Some(serde_json::to_value(map).unwrap()));
        standing.waits_here("why");
        assert_eq!(Standing::status(&standing).heat, None, "another host has the VM");
    }

    #[test]
    fn a_primary_says_what_protects_it_and_what_would_be_lost() {
        let standing = primary();
        let status = at(&standing, None);
        assert_eq!(
            status.to_string(),
            format!(
                "web: primary, UNPROTECTED; the loss of this host would NOT be survived now
  why:                no --standby is given
  since:              1970-01-01T00:00:00Z
  process:            {}
  generation:         1
  checkpoint:         812, committed 3ms ago
  arbiter:            none
  loss of this host:  NOT SURVIVED, all that is in the VM's memory would be lost
  loss of the other:  survived, the VM runs here and needs no other host",
                std::process::id()
            )
        );
        standing.peer("hostb:7000");
        standing.protected(1);
        let status = at(&standing, Some(&CLEAR));
        assert_eq!(
            status.lines(Some(80)),
            format!(
                "web: primary, protected; the loss of either host would be survived now
  since:              1970-01-01T00:00:00Z
  process:            {}
  standby:            hostb:7000
  generation:         1
  checkpoint:         812, committed 3ms ago
  in flight:          2 (12 KiB)
  arbiter:            seen 1m 1s ago
  loss of this host:  survived, the standby takes over from the last checkpoint
                      (about 3ms of its work is lost, none of it answered)
  loss of the other:  survived, the VM goes on here, unprotected
",
                std::process::id()
            )
        );
        standing.arbiter_at(Site::of("outlive:hostb:7010"));
        let status = at(&standing, Some(&CLEAR));
        assert!(status.loss_of_this_host.survived && !status.loss_of_other_host.survived, "{status}");
        let what = &status.loss_of_other_host.what;
        assert!(
            what.starts_with("the arbiter would be lost with it: the VM's output would be held"),
            "{what}"
        );
        standing.arbiter_at(Site::of(&format!("outlive:{}:7010", process::host_name())));
        let status = at(&standing, Some(&CLEAR));
        assert!(!status.loss_of_this_host.survived && status.loss_of_other_host.survived, "{status}");
        let what = &status.loss_of_this_host.what;
        assert!(what.starts_with("the arbiter would be lost with it: the standby would wait"), "{what}");
        standing.arbiter_at(Site::default());
        let lost = Sight { lost: Some("stale handle".into()), ..CLEAR };
        let status = at(&standing, Some(&lost));
        assert!(
            status.protected && !status.loss_of_this_host.survived && !status.loss_of_other_host.survived
        );
        assert!(
            status.to_string().contains("\n  arbiter:            LOST, seen 1m 1s ago: stale handle\n"),
            "{status}"
        );
        let person = Sight { is_a_person: true, ..CLEAR };
        let status = at(&standing, Some(&person));
        assert!(!status.loss_of_this_host.survived && !status.loss_of_other_host.survived);
        assert!(status.loss_of_this_host.what.starts_with("an operator must decide"), "{status}");
        assert!(status.to_string().contains("\n  arbiter:            an operator (manual)\n"), "{status}");
        let sight = status.arbiter.as_ref().unwrap();
        assert!(sight.is_operator && sight.seen.is_none(), "nobody looks whether a person is awake");
        let served = Sight { link: Some(LinkKind::Tls13), ..CLEAR };
        let status = at(&standing, Some(&served));
        assert!(
            status.to_string().contains("\n  arbiter:            seen 1m 1s ago over TLS 1.3\n"),
            "{status}"
        );
        assert_eq!(serde_json::to_value(&status).unwrap()["arbiter"]["link"], "tls1.3");
        standing.unprotected("the standby was lost");
        standing.asking("asking the arbiter");
        let status = at(&standing, Some(&person));
        let words = &status.loss_of_other_host.what;
        assert!(words.contains("`outlive go-on-alone`") && !words.contains("arbiter"), "{words}");
        let status = at(&standing, Some(&CLEAR));
        assert_eq!(status.why.as_deref(), Some("the standby was lost; asking the arbiter"));
        assert!(!status.loss_of_this_host.survived);
        standing.won(2);
        standing.now("not reachable");
        let status = at(&standing, Some(&CLEAR));
        assert_eq!((status.generation, status.in_flight), (Some(2), None));
        assert_eq!(status.why.as_deref(), Some("the standby was lost; not reachable"));
    }

    #[test]
    fn a_standby_without_the_arbiter_protects_nothing() {
        let standing = primary();
        standing.protected(1);
        standing.other_sees(OtherSight::Lost(SystemTime::UNIX_EPOCH));
        let status = at(&standing, Some(&CLEAR));
        let [this, other] = [&status.loss_of_this_host, &status.loss_of_other_host];
        assert!(!this.survived && other.survived, "{status}");
        assert!(
            this.what.contains("the standby has not reached the arbiter since 1970-01-01T00:00:00Z"),
            "{status}"
        );
        assert_eq!(status.standby_lost_arbiter_since.as_deref(), Some("1970-01-01T00:00:00Z"));
        standing.other_sees(OtherSight::Seen);
        assert!(at(&standing, Some(&CLEAR)).loss_of_this_host.survived);
        // The next standby has said nothing yet.
        standing.other_sees(OtherSight::Lost(SystemTime::UNIX_EPOCH));
        standing.unprotected("the standby was lost");
        standing.protected(1);
        assert!(at(&standing, Some(&CLEAR)).loss_of_this_host.survived);
    }

    /// Only the host that is left must reach the arbiter, and the guest's clients.
    #[test]
    fn each_loss_is_up_to_the_host_that_is_left() {
        let lost = Sight { lost: Some("gone".into()), ..CLEAR };
        let survived = |standing: &Standing, sight: &Sight| {
            let status = at(standing, Some(sight));
            [status.loss_of_this_host.survived, status.loss_of_other_host.survived]
        };
        for (role, standing) in
            [(Role::Primary, primary()), (Role::Standby, Standing::new(Role::Standby, Some("web"), "why"))]
        {
            standing.protected(1);
            assert_eq!(survived(&standing, &CLEAR), [true, true], "{role:?}: the other one has said nothing");
            assert_eq!(survived(&standing, &lost), [false, false], "{role:?}: the best guess");
            standing.other_sees(OtherSight::Seen);
            assert_eq!(survived(&standing, &lost), [true, false], "{role:?}");
            standing.other_sees(OtherSight::Lost(SystemTime::UNIX_EPOCH));
            assert_eq!(survived(&standing, &CLEAR), [false, true], "{role:?}");
            standing.other_sees(OtherSight::Seen);
            standing.other_reaches(Some(false));
            assert_eq!(survived(&standing, &CLEAR), [false, true], "{role:?}");
            let status = at(&standing, Some(&CLEAR));
            assert!(status.loss_of_this_host.what.contains("cut off from the clients' network"), "{status}");
            standing.other_reaches(Some(true));
            assert_eq!(survived(&standing, &CLEAR), [true, true], "{role:?}");
        }
    }

    #[test]
    fn a_vm_that_waits_for_the_fence_command_does_not_wait_for_the_arbiter() {
        let standing = Standing::new(Role::Standby, Some("web"), "the primary was lost");
        standing.asking("asking the arbiter");
        standing.won(2);
        standing.fencing(SystemTime::UNIX_EPOCH, Some("exit status: 1"));
        for sight in [CLEAR, Sight { is_a_person: true, ..CLEAR }] {
            let status = at(&standing, Some(&sight));
            let [this, other] = [&status.loss_of_this_host, &status.loss_of_other_host];
            assert!(!this.survived && !other.survived, "{status}");
            assert!(
                other.what.contains("waiting for the fence command since 1970-01-01T00:00:00Z"),
                "{status}"
            );
            let why = status.why.as_deref().unwrap();
            assert!(why.ends_with("the fence command since 1970-01-01T00:00:00Z: exit status: 1"), "{why}");
        }
        standing.fenced();
        assert!(!at(&standing, Some(&CLEAR)).to_string().contains("fence"));
    }

    #[test]
    fn a_standby_says_whether_it_can_take_over() {
        let standing = Standing::new(Role::Standby, None, "no primary has come yet");
        let status = standing.status();
        assert!(!status.protected && status.checkpoint.is_none() && status.arbiter.is_none());
        assert!(status.to_string().starts_with("(no VM yet): standby, UNPROTECTED; "), "{status}");
        standing.vm("web", "00ff", 4);
        standing.peer("10.0.0.1:555");
        standing.protected(4);
        standing.staged(77);
        let status = standing.status();
        assert_eq!((status.checkpoint, status.generation), (Some(77), Some(4)));
        assert!(status.loss_of_other_host.survived && status.loss_of_other_host.lost_ms.is_some());
        assert!(status.to_string().contains("\n  primary:            10.0.0.1:555\n"), "{status}");
        standing.unprotected("the primary was lost");
        standing.asking("asking the arbiter");
        standing.won(5);
        let status = standing.status();
        assert!(!status.loss_of_this_host.survived && status.loss_of_other_host.survived);
        standing.runs_here("web", "00ff", 5, "it was taken over", counted);
        let status = standing.status();
        assert_eq!((status.role, status.checkpoint, status.peer), (Role::Primary, Some(812), None));
    }

    #[test]
    fn the_json_has_every_field_and_comes_back() {
        let standing = primary();
        standing.peer("hostb:7000");
        standing.protected(1);
        let status = at(&standing, Some(&CLEAR));
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json["role"], "primary");
        assert_eq!(json["why"], serde_json::Value::Null);
        assert_eq!(json["since"], "1970-01-01T00:00:00Z");
        assert_eq!(json["bytes_in_flight"], 12_000);
        assert_eq!(json["arbiter"]["seen_ms_ago"], 61_000);
        assert_eq!(json["loss_of_this_host"]["lost_ms"], 3);
        assert_eq!(json["link"], serde_json::Value::Null);
        assert_eq!(json["sandbox"], true);
        assert_eq!(json["heat"], serde_json::Value::Null);
        assert_eq!(json["record"], serde_json::Value::Null);
        assert_eq!(json.as_object().unwrap().len(), 21);
        let mut newer = json.clone();
        newer["something"] = 1.into();
        assert_eq!(
            serde_json::from_value::<Status>(newer).unwrap(),
            status,
            "a newer release may add fields"
        );
    }

    #[test]
    fn the_audit_says_how_much_of_memory_and_of_disks_it_has_compared() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let ago = |seconds| Some(now - Duration::from_secs(seconds));
        let mut progress = AuditProgress { pages: 7, round_ended: ago(3), ..AuditProgress::default() };
        let said = |progress| Audited::new(progress, now).unwrap().to_string();
        let memory = format!("7 pages compared, all of them {} ago", span(3000));
        assert_eq!(said(progress), format!("{memory}, no difference"));
        (progress.disk_bytes, progress.disk_round_ended) = (5 << 20, ago(9));
        assert_eq!(
            said(progress),
            format!("{memory}; 5 MiB of disks, all of it {} ago, no difference", span(9000))
        );
        progress.disk_round_left_out = 128 << 10;
        let expected = format!("{memory}; 5 MiB of disks, all but 128 KiB {} ago, no difference", span(9000));
        assert_eq!(said(progress), expected);
        (progress.pages, progress.differences) = (0, 1);
        assert!(said(progress).ends_with(", COPY DIFFERED 1 TIMES"));
        assert_eq!(Audited::new(AuditProgress::default(), now), None);
    }
}
