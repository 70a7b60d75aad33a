//! Every metric: its name, its unit, what it means, and where it comes from.
//!
//! `docs/metrics.md` lists the same table; a test compares the two.

use std::time::SystemTime;

use super::ask::{Process, Scrape};
use super::histogram::Buckets;
use super::report::{AuditedDisk, Report, Running, unix};
use crate::events::{PageCounts, Role};

/// The size of a page, in bytes.
const PAGE: u64 = 4096;

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A number of now.
    Gauge,
    /// A number that only grows, until the process begins anew.
    Counter,
    /// How many values were in which range.
    Histogram,
}

/// What its numbers are, if they are no mere numbers: a base unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    Seconds,
    Bytes,
}

impl Unit {
    /// As names end with it.
    #[cfg(test)]
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Seconds => "seconds",
            Self::Bytes => "bytes",
        }
    }
}

/// A metric for all processes.
pub(super) struct Family {
    /// Its name without what the formats add: the unit, and `_total`.
    pub(super) name: &'static str,
    pub(super) unit: Option<Unit>,
    pub(super) kind: Kind,
    /// What it means.
    pub(super) help: &'static str,
    pub(super) read: fn(&Scrape) -> Vec<Sample>,
}

impl Family {
    #[cfg(test)]
    /// Its whole name, as a user writes it in a query. A histogram's has further endings.
    pub(super) fn full_name(&self) -> String {
        let unit = self.unit.map_or_else(String::new, |unit| format!("_{}", unit.name()));
        let total = if self.kind == Kind::Counter { "_total" } else { "" };
        format!("{}{unit}{total}", self.name)
    }
}

/// A number with its labels.
#[derive(Debug)]
pub(super) struct Sample {
    pub(super) labels: Vec<(&'static str, String)>,
    pub(super) value: Value,
}

/// A number.
#[derive(Debug)]
pub(super) enum Value {
    Number(f64),
    /// The sum of all values, and how many are up to each bound and above the one before.
    Histogram {
        sum: f64,
        buckets: Vec<(f64, u64)>,
    },
}

const NS: f64 = 1e-9;

fn flag(is: bool) -> Value {
    Value::Number(f64::from(u8::from(is)))
}

fn number(value: u64) -> Value {
    // Exact up to 2^53, which no counter reaches.
    Value::Number(value as f64)
}

fn histogram(of: &Buckets, scale: f64) -> Option<Value> {
    let bounds = of.bounds.iter().map(|&bound| bound as f64 * scale).chain([f64::INFINITY]);
    // A process of a release that does not have it.
    (!of.counts.is_empty()).then(|| Value::Histogram {
        sum: of.sum as f64 * scale,
        buckets: bounds.zip(of.counts.iter().copied()).collect(),
    })
}

/// What names a process: nothing that it says can take the place of its socket.
fn process_labels(process: &Process) -> Vec<(&'static str, String)> {
    vec![("vm", process.vm.clone()), ("socket", process.socket.display().to_string())]
}

fn role(role: Role) -> &'static str {
    match role {
        Role::Primary => "primary",
        Role::Standby => "standby",
    }
}

impl Scrape {
    /// Numbers of each process that has answered, with further labels.
    fn each(&self, read: impl Fn(&Report) -> Vec<(Vec<(&'static str, &str)>, Value)>) -> Vec<Sample> {
        let mut samples = Vec::new();
        for process in &self.processes {
            let Ok(report) = &process.report else { continue };
            for (more, value) in read(report) {
                let mut labels = process_labels(process);
                labels.push(("role", role(report.role).to_owned()));
                labels.extend(more.into_iter().map(|(name, value)| (name, value.to_owned())));
                samples.push(Sample { labels, value });
            }
        }
        samples
    }

    /// One number of each, if it has it.
    fn one(&self, read: impl Fn(&Report) -> Option<Value>) -> Vec<Sample> {
        self.each(|report| read(report).map(|value| (Vec::new(), value)).into_iter().collect())
    }

    /// Several numbers of each that differ in one label.
    fn by<const N: usize>(
        &self,
        label: &'static str,
        read: impl Fn(&Report) -> Option<[(&'static str, Value); N]>,
    ) -> Vec<Sample> {
        self.each(|report| {
            let all = read(report).into_iter().flatten();
            all.map(|(which, value)| (vec![(label, which)], value)).collect()
        })
    }

    /// One number of each disk that the audit compares, where the VM runs.
    fn disks(&self, read: impl Fn(&AuditedDisk) -> Option<Value>) -> Vec<Sample> {
        let mut samples = Vec::new();
        for process in &self.processes {
            let Ok(Report { role: of, running: Some(running), .. }) = &process.report else { continue };
            for disk in &running.disks {
                let mut labels = process_labels(process);
                labels.extend([("role", role(*of).to_owned()), ("disk", disk.disk.to_string())]);
                samples.extend(read(disk).map(|value| Sample { labels, value }));
            }
        }
        samples
    }

    /// One number of the VM that runs at each.
    fn running(&self, read: impl Fn(&Running) -> Option<Value>) -> Vec<Sample> {
        self.one(|report| report.running.as_ref().and_then(&read))
    }
}

const fn gauge(name: &'static str, help: &'static str, read: fn(&Scrape) -> Vec<Sample>) -> Family {
    Family { name, unit: None, kind: Kind::Gauge, help, read }
}

const fn counter(name: &'static str, help: &'static str, read: fn(&Scrape) -> Vec<Sample>) -> Family {
    Family { name, unit: None, kind: Kind::Counter, help, read }
}

const fn counts(name: &'static str, help: &'static str, read: fn(&Scrape) -> Vec<Sample>) -> Family {
    Family { name, unit: None, kind: Kind::Histogram, help, read }
}

impl Family {
    const fn seconds(self) -> Self {
        Self { unit: Some(Unit::Seconds), ..self }
    }

    const fn bytes(self) -> Self {
        Self { unit: Some(Unit::Bytes), ..self }
    }
}

/// The time between now and a time of the day; less than nothing after it.
fn until(at: f64, now: SystemTime) -> f64 {
    at - unix(now)
}

/// All of them, in the order in which they are shown.
pub(super) static FAMILIES: &[Family] = &[
    // Whom there is to ask.
    gauge("outlive_build_info", "The release of outlive metrics", |_| {
        vec![Sample { labels: vec![("version", env!("CARGO_PKG_VERSION").into())], value: flag(true) }]
    }),
    gauge("outlive_folder_readable", "Whether processes can be looked for in this folder", |s| {
        let sample = |(folder, can): &(std::path::PathBuf, bool)| Sample {
            labels: vec![("folder", folder.display().to_string())],
            value: flag(*can),
        };
        s.folders.iter().map(sample).collect()
    }),
    gauge("outlive_processes_ignored", "Processes that were not asked because there are more than 128", |s| {
        vec![Sample { labels: Vec::new(), value: number(s.ignored as u64) }]
    }),
    gauge("outlive_up", "Whether the process of the VM, or its standby, answers: 0 if it has died or stands still", |s| {
        let sample = |it: &Process| Sample { labels: process_labels(it), value: flag(it.report.is_ok()) };
        s.processes.iter().map(sample).collect()
    }),
    gauge("outlive_answer_duration", "How long the process took to answer", |s| {
        let sample = |it: &Process| Sample {
            labels: process_labels(it),
            value: Value::Number(it.took.as_secs_f64()),
        };
        s.processes.iter().map(sample).collect()
    })
    .seconds(),
    gauge("outlive_start_time", "When the process began, since 1970", |s| {
        let sample = |it: &Process| {
            let value = Value::Number(it.report.as_ref().ok()?.started);
            Some(Sample { labels: process_labels(it), value })
        };
        s.processes.iter().filter_map(sample).collect()
    })
    .seconds(),
    gauge("outlive_info", "The release of the process and the id of its VM", |s| {
        s.each(|r| {
            let id = r.id.as_deref().unwrap_or_default();
            vec![(vec![("version", &*r.release), ("vm_id", id)], flag(true))]
        })
    }),
    // Protection.
    gauge("outlive_protected", "Whether a whole checkpoint is committed and every later one follows", |s| {
        s.one(|r| Some(flag(r.protected)))
    }),
    gauge("outlive_protection_change_time", "Since when outlive_protected is what it is, since 1970", |s| {
        s.one(|r| Some(Value::Number(r.since)))
    })
    .seconds(),
    counter("outlive_protection_losses", "How often a protection has ended", |s| {
        s.one(|r| Some(number(r.protection_losses)))
    }),
    gauge(
        "outlive_loss_survived",
        "Whether the VM would go on, without anybody's help, if this host (host=this) or the other one (host=other) were lost now",
        |s| {
            s.by("host", |r| {
                let [this, other] = [r.loss_of_this_host, r.loss_of_other_host].map(|it| flag(it.survived));
                Some([("this", this), ("other", other)])
            })
        },
    ),
    gauge(
        "outlive_loss_lost",
        "How much of the guest's work would be lost with that host, about; none of it was answered to anyone",
        |s| {
            s.each(|r| {
                let both = [("this", r.loss_of_this_host.lost), ("other", r.loss_of_other_host.lost)];
                let lost = both.into_iter().filter_map(|(host, lost)| Some((host, lost?)));
                lost.map(|(host, lost)| (vec![("host", host)], Value::Number(lost))).collect()
            })
        },
    )
    .seconds(),
    gauge("outlive_active", "Whether the VM runs here and its output may leave", |s| s.one(|r| Some(flag(r.active)))),
    gauge(
        "outlive_waiting",
        "Whether the VM waits here: the arbiter, an operator or the fence command has not answered yet",
        |s| s.one(|r| Some(flag(r.waits))),
    ),
    gauge("outlive_generation", "The generation that runs the VM", |s| s.one(|r| r.generation.map(number))),
    counter("outlive_runs_twice", "How often the other host said that it runs this VM, or one of its name, too", |s| {
        s.one(|r| Some(number(r.counted.runs_twice)))
    }),
    counter("outlive_link_losses", "How often the other host was lost", |s| {
        s.one(|r| Some(number(r.counted.link_losses)))
    }),
    gauge("outlive_link_encrypted", "Whether TLS protects the links of the process", |s| s.one(|r| r.tls.map(flag))),
    gauge("outlive_certificate_expiry", "Until this host's certificate ends; less than 0 after that", |s| {
        s.one(|r| r.certificate_until.map(|at| Value::Number(until(at, s.at))))
    })
    .seconds(),
    gauge("outlive_sandbox", "Whether the process is confined", |s| s.one(|r| Some(flag(r.sandbox)))),
    // How far behind the standby is.
    gauge("outlive_checkpoint", "Number of the newest committed checkpoint", |s| s.one(|r| r.checkpoint.map(number))),
    gauge("outlive_commit_age", "Since the last commit", |s| s.one(|r| r.since_commit.map(Value::Number))).seconds(),
    gauge("outlive_checkpoints_in_flight", "Checkpoints that are sent and not committed", |s| {
        s.one(|r| r.in_flight.map(number))
    }),
    gauge("outlive_in_flight", "Sent since the last commit", |s| s.one(|r| r.bytes_in_flight.map(number))).bytes(),
    counter("outlive_checkpoints", "Checkpoints committed", |s| s.running(|r| Some(number(r.checkpoints)))),
    counter("outlive_standby_slow", "How often no commit came for a second although checkpoints waited for one", |s| {
        s.one(|r| Some(number(r.counted.standby_slow)))
    }),
    counts("outlive_pause", "The time for which the vCPUs do not run in a checkpoint", |s| {
        s.running(|r| histogram(&r.pause, NS))
    })
    .seconds(),
    counts("outlive_vcpu_pause", "The same as the vCPU saw it that was away longest", |s| {
        s.running(|r| histogram(&r.vcpu_pause, NS))
    })
    .seconds(),
    counts("outlive_commit", "From the end of the pause until the standby has said that it holds the checkpoint", |s| {
        s.running(|r| histogram(&r.commit, NS))
    })
    .seconds(),
    counts("outlive_apply", "How long the standby took to apply a checkpoint to its copy of memory", |s| {
        s.one(|r| (r.role == Role::Standby).then(|| histogram(&r.apply, NS)).flatten())
    })
    .seconds(),
    counts("outlive_checkpoint_phase", "The steps of a checkpoint (docs/measuring.md)", |s| {
        s.each(|r| {
            let mut phases = Vec::new();
            for (name, it) in r.running.iter().flat_map(|running| &running.phases) {
                phases.extend(histogram(it, NS).map(|value| (vec![("phase", name.as_str())], value)));
            }
            phases
        })
    })
    .seconds(),
    counts("outlive_dirty_pages", "Pages that a checkpoint has", |s| s.running(|r| histogram(&r.dirty_pages, 1.0))),
    counts("outlive_checkpoint_size", "Bytes sent for a checkpoint, with what was sent between it and the one before", |s| {
        s.running(|r| histogram(&r.checkpoint_bytes, 1.0))
    })
    .bytes(),
    counts("outlive_backlog_checkpoints", "Checkpoints in flight, at the end of each that was sent", |s| {
        s.running(|r| histogram(&r.backlog, 1.0))
    }),
    counts("outlive_backlog", "Bytes in flight, at the end of each checkpoint that was sent", |s| {
        s.running(|r| histogram(&r.backlog_bytes, 1.0))
    })
    .bytes(),
    counter("outlive_link_sent", "Sent to the standby", |s| s.running(|r| Some(number(r.bytes)))).bytes(),
    counter("outlive_pages", "Pages of checkpoints, by how they were written down for the standby", |s| {
        s.by("codec", |r| {
            let PageCounts { raw, zero, granules, unchanged, .. } = r.running.as_ref()?.pages;
            Some(
                [("raw", raw), ("zero", zero), ("granules", granules), ("unchanged", unchanged)]
                    .map(|(codec, pages)| (codec, number(pages))),
            )
        })
    }),
    counter("outlive_page", "Contents of pages that were written down for the standby, by how", |s| {
        s.by("codec", |r| {
            let PageCounts { raw, granule_bytes, .. } = r.running.as_ref()?.pages;
            Some([("raw", number(raw * PAGE)), ("granules", number(granule_bytes))])
        })
    })
    .bytes(),
    counter("outlive_guest_held", "How long the guest was held because it wrote faster than the link carries", |s| {
        s.running(|r| Some(Value::Number(r.guest_held_ns as f64 * NS)))
    })
    .seconds(),
    counter("outlive_base_stalls", "How often a new copy of the VM could not be finished because the guest writes too fast", |s| {
        s.one(|r| Some(number(r.counted.base_stalls)))
    }),
    // Held output.
    gauge("outlive_output_held_frames", "Frames that wait for the commit of their checkpoint now", |s| {
        s.running(|r| Some(number(r.frames?.held)))
    }),
    gauge("outlive_output_held", "Bytes of those frames", |s| s.running(|r| Some(number(r.frames?.held_bytes)))).bytes(),
    counts("outlive_commit_held_frames", "Frames held when a commit came", |s| {
        s.running(|r| histogram(&r.held_frames, 1.0))
    }),
    counts("outlive_commit_held", "Bytes of frames held when a commit came", |s| {
        s.running(|r| histogram(&r.held_bytes, 1.0))
    })
    .bytes(),
    counter(
        "outlive_output_frames",
        "Frames of the guest, by what became of them: let out after their commit, let out without waiting, thrown away because another host has the VM, not taken by this host's network",
        |s| {
            s.by("fate", |r| {
                let frames = r.running.as_ref()?.frames?;
                Some([
                    ("released", number(frames.released)),
                    ("passed", number(frames.passed)),
                    ("discarded", number(frames.discarded)),
                    ("refused", number(frames.refused)),
                ])
            })
        },
    ),
    counter("outlive_output_full", "How often the guest had to keep a frame because so many were held", |s| {
        s.running(|r| Some(number(r.frames?.full)))
    }),
    // The arbiter.
    gauge("outlive_arbiter_lost", "Whether this host has lost the arbiter", |s| {
        s.one(|r| Some(flag(r.arbiter?.lost.is_some())))
    }),
    gauge("outlive_arbiter_lost_duration", "For how long; 0 if it has not", |s| {
        s.one(|r| Some(Value::Number(r.arbiter?.lost.unwrap_or(0.0))))
    })
    .seconds(),
    gauge("outlive_arbiter_answer_age", "Since the arbiter's last answer", |s| {
        s.one(|r| r.arbiter?.answered.map(Value::Number))
    })
    .seconds(),
    counter("outlive_arbiter_losses", "How often the arbiter was lost", |s| {
        s.one(|r| Some(number(r.counted.arbiter_losses)))
    }),
    counter("outlive_claims_unanswered", "How often a side asked who goes on, and the arbiter did not answer", |s| {
        s.one(|r| Some(number(r.counted.claims_unanswered)))
    }),
    gauge("outlive_standby_arbiter_lost", "Whether the standby has lost the arbiter, as it tells its primary", |s| {
        s.one(|r| (r.role == Role::Primary).then(|| flag(r.standby_without_arbiter.is_some())))
    }),
    gauge("outlive_standby_arbiter_lost_duration", "For how long; 0 if it has not", |s| {
        s.one(|r| (r.role == Role::Primary).then(|| Value::Number(r.standby_without_arbiter.unwrap_or(0.0))))
    })
    .seconds(),
    counter("outlive_standby_arbiter_losses", "How often the standby said that it has lost the arbiter", |s| {
        s.one(|r| Some(number(r.counted.standby_arbiter_losses)))
    }),
    // Takeovers.
    counter("outlive_takeovers", "How often the VM was taken over here", |s| {
        s.one(|r| Some(number(r.counted.takeovers)))
    }),
    counts("outlive_takeover", "From the last sign of life of the lost host until the VM ran here", |s| {
        s.one(|r| histogram(&r.takeovers.total, NS))
    })
    .seconds(),
    counts(
        "outlive_takeover_step",
        "The steps of a takeover: detect, settle, arbitrate, restore; and first_frame, from giving the lost host up until the VM's first frame",
        |s| {
            s.each(|r| {
                let steps = r.takeovers.steps().into_iter();
                steps.filter_map(|(step, it)| Some((vec![("step", step)], histogram(it, NS)?))).collect()
            })
        },
    )
    .seconds(),
    counter("outlive_hand_overs", "How often an operator had the VM go on at its standby", |s| {
        s.one(|r| Some(number(r.counted.hand_overs)))
    }),
    gauge("outlive_fencing", "Whether the VM waits here for the fence command", |s| {
        s.one(|r| Some(flag(r.fencing.is_some())))
    }),
    gauge("outlive_fencing_duration", "For how long; 0 if it does not", |s| {
        s.one(|r| Some(Value::Number(r.fencing.unwrap_or(0.0))))
    })
    .seconds(),
    counter("outlive_fence_failures", "How often the fence command has failed", |s| {
        s.one(|r| Some(number(r.counted.fence_failures)))
    }),
    // The guest, the host, the copy.
    counter("outlive_guest_restarts", "How often the guest has restarted", |s| {
        s.one(|r| Some(number(r.counted.guest_restarts)))
    }),
    counter("outlive_guest_panics", "How often the guest's kernel has panicked", |s| {
        s.one(|r| Some(number(r.counted.guest_panics)))
    }),
    counter("outlive_host_faults", "How often a part of this host failed while the VM ran on it", |s| {
        s.by("part", |r| {
            let it = &r.counted;
            let parts = [("vcpu", it.vcpu_faults), ("disk", it.disk_faults), ("network", it.network_faults)];
            Some(parts.map(|(part, times)| (part, number(times))))
        })
    }),
    counter("outlive_audit_pages", "Pages of both hosts that were compared", |s| s.one(|r| Some(number(r.audit.pages)))),
    counter("outlive_audit_rounds", "How often all pages of the VM have had their turn", |s| {
        s.one(|r| (r.role == Role::Primary).then(|| number(r.audit.rounds)))
    }),
    counter("outlive_audit_disk", "Bytes of the disk of both hosts that were compared", |s| {
        s.disks(|disk| Some(number(disk.compared)))
    })
    .bytes(),
    counter(
        "outlive_audit_disk_left_out",
        "Bytes of the disk that were left out of a round: they could not be compared, however often they were tried",
        |s| s.disks(|disk| Some(number(disk.left_out))),
    )
    .bytes(),
    gauge("outlive_audit_disk_size", "The length of the disk", |s| s.disks(|disk| Some(number(disk.size)))).bytes(),
    gauge(
        "outlive_audit_disk_compared_age",
        "Since the standby last compared some of the disk, or since it could have",
        |s| s.disks(|disk| disk.age.map(Value::Number)),
    )
    .seconds(),
    counter("outlive_audit_disk_rounds", "How often all of the disks have had their turn", |s| {
        s.one(|r| (r.role == Role::Primary).then(|| number(r.audit.disk_rounds)))
    }),
    counter("outlive_audit_differences", "How often the standby's copy was found to differ", |s| {
        s.one(|r| Some(number(r.audit.differences)))
    }),
    gauge("outlive_record_active", "Whether the standby writes the VM's record now", |s| {
        s.one(|r| r.record.map(|it| flag(it.active)))
    }),
    gauge("outlive_record_reach", "How far back the VM can be had from the record; 0 if it cannot", |s| {
        s.one(|r| r.record.map(|it| Value::Number(it.reach.unwrap_or(0.0))))
    })
    .seconds(),
    gauge("outlive_record_size", "What the record takes in its file system", |s| {
        s.one(|r| r.record.map(|it| number(it.bytes)))
    })
    .bytes(),
    counter("outlive_record_gaps", "How often the VM went on without being recorded", |s| {
        s.one(|r| r.record.map(|it| number(it.gaps)))
    }),
    counter("outlive_self_check_differences", "How often a self-check found that the copy differs", |s| {
        s.one(|r| Some(number(r.counted.self_check_differences)))
    }),
    counter("outlive_refusals", "What a standby refused: primaries, or the checkpoints of one", |s| {
        s.by("what", |r| {
            let it = &r.counted;
            Some([("primary", number(it.primaries_refused)), ("stream", number(it.streams_refused))])
        })
    }),
];
