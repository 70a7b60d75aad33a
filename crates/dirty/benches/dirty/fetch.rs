//! `dirty.fetch`: two threads that fetch at once, compared with one.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use outlive_dirty::{Fetch, Gfn, Tracker};

use crate::machine::{Host, MAX_DIRTY, Machine, Method};
use crate::measure::{Effort, Samples};
use crate::options::Options;
use crate::quiet::{Pinned, preemptions, processors, undisturbed};
use crate::report::{Case, Report, Row};
use crate::workload::{Job, LOW, Pattern, Run, Workload};

const VCPUS: usize = 2;
/// Threads that do not begin together prove nothing.
const MAX_LATE: Duration = Duration::from_micros(10);
/// After this many turns a waiting loop yields the processor.
const PATIENCE: u32 = 20_000;

/// Whether the pages are re-armed too, and by how many threads.
type Mode = (bool, usize);
const MODES: [Mode; 4] = [(false, 1), (false, 2), (true, 1), (true, 2)];

pub(crate) fn measure(host: &Host, options: &Options, report: &mut Report) -> io::Result<()> {
    let scale = options.scale;
    if !host.has(Method::Ring) {
        return Ok(());
    }
    report.section(
        "dirty.fetch: all pages of two vCPUs' rings, half in each, fetched by two threads at once. Without rearm it is\n\
         the time of the taking alone. Peer: one thread. Median (10 %-90 %).",
    );
    let cpus = processors();
    if cpus.len() < 2 {
        println!("skipped: two threads want two processors");
        return Ok(());
    }
    for &dirty in scale.fetch_dirty {
        let mut machine = Machine::new(host, scale.fetch_gib, VCPUS as u64, Method::Ring);
        let workload = Workload::new(scale.fetch_gib, dirty, 0, Pattern::Scattered);
        let jobs = halves(workload.job(0).hot);
        machine.run_vcpus(&jobs);
        machine.enable();
        let samples = rounds(&mut machine, &jobs, &cpus, Effort::for_pages(scale.rounds, dirty));
        for rearm in [false, true] {
            let of = |threads| {
                samples[MODES.iter().position(|mode| *mode == (rearm, threads)).expect("a mode")].summary()
            };
            report.add(Row {
                bench: "dirty.fetch",
                case: Case {
                    backend: Method::Ring.name(),
                    vm_gib: scale.fetch_gib,
                    dirty,
                    pattern: Pattern::Scattered.name(),
                    hot: 0,
                    fetch: Some((2, rearm)),
                },
                value: of(2),
                peer: "1 thread".to_string(),
                peer_value: of(1),
                steps: String::new(),
            })?;
        }
    }
    Ok(())
}

/// Every other page for each vCPU.
fn halves(all: Run) -> [Job; VCPUS] {
    [0, 1].map(|half| {
        let count = (all.count + 1 - half) / 2;
        Job {
            hot: Run { count, start: all.start + half * all.stride, stride: 2 * all.stride },
            ..Job::default()
        }
    })
}

fn rounds(machine: &mut Machine, jobs: &[Job], cpus: &[usize], effort: Effort) -> [Samples; MODES.len()] {
    let mut samples = [const { Samples::new() }; MODES.len()];
    let mut buffers = [const { Vec::new() }; 2];
    buffers.iter_mut().for_each(|buffer| buffer.resize(MAX_DIRTY, Gfn(0)));
    for round in 0..effort.rounds {
        for turn in 0..MODES.len() {
            let mode = (turn + round) % MODES.len();
            // The first does not count, as elsewhere.
            for epoch in 0..=effort.epochs {
                let time = undisturbed(|| {
                    machine.run_vcpus(jobs);
                    fetch(machine.tracker(), MODES[mode], &mut buffers, jobs, cpus)
                });
                if epoch > 0 {
                    samples[mode].add(time);
                }
            }
        }
    }
    samples
}

/// Fetches the pages that the vCPUs wrote, ends the epoch, and returns how many microseconds the fetch took,
/// from the start of the first thread until the last had its pages; also whether a thread was disturbed.
fn fetch(
    tracker: &Tracker,
    (rearm, threads): Mode,
    buffers: &mut [Vec<Gfn>],
    jobs: &[Job],
    cpus: &[usize],
) -> (f64, bool) {
    let (ready, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let all_have = |counter: &AtomicUsize| {
        counter.fetch_add(1, Ordering::AcqRel);
        let mut turns = 0;
        while counter.load(Ordering::Acquire) < threads {
            turns += 1;
            if turns < PATIENCE { std::hint::spin_loop() } else { thread::yield_now() }
        }
    };
    let part = |cpu, buffer: &mut [Gfn]| {
        let _pinned = Pinned::to(cpu);
        all_have(&ready);
        let before = preemptions();
        let begin = Instant::now();
        let fetched = tracker.fetch(buffer, Fetch { rearm, ..Fetch::default() }).expect("fetch");
        let end = Instant::now();
        let disturbed = preemptions() != before;
        // Work outside the measurement must disturb nobody.
        all_have(&done);
        Part { begin, end, disturbed, pages: fetched.rearm().expect("rearm").to_vec() }
    };
    let part = &part;
    let parts: Vec<_> = thread::scope(|scope| {
        let (mine, others) = buffers[..threads].split_first_mut().expect("a thread");
        let others = others.iter_mut().zip(&cpus[1..]);
        let others: Vec<_> = others.map(|(buffer, &cpu)| scope.spawn(move || part(cpu, buffer))).collect();
        let mine = part(cpus[0], mine);
        others.into_iter().map(|other| other.join().expect("a thread that fetches")).chain([mine]).collect()
    });
    check(tracker, parts.iter().flat_map(|part| &part.pages).copied().collect(), jobs);
    let begin = parts.iter().map(|part| part.begin).min().expect("a thread");
    let end = parts.iter().map(|part| part.end).max().expect("a thread");
    let late = parts.iter().any(|part| part.begin - begin > MAX_LATE);
    ((end - begin).as_nanos() as f64 / 1e3, late || parts.iter().any(|part| part.disturbed))
}

/// The result of one thread.
struct Part {
    begin: Instant,
    end: Instant,
    disturbed: bool,
    pages: Vec<Gfn>,
}

/// Ends the epoch, which has nothing left, and checks that every page has come once.
fn check(tracker: &Tracker, mut pages: Vec<Gfn>, jobs: &[Job]) {
    let epoch = tracker.stopped().state_saved().harvest().expect("harvest").rearm().expect("rearm");
    pages.extend(epoch.pages());
    epoch.copied().run();
    pages.sort_unstable();
    let mut written: Vec<Gfn> = jobs.iter().flat_map(Job::pages).collect();
    written.sort_unstable();
    // The first epoch also has the guest's parameters: the guest has read them, and KVM has mapped them.
    pages.retain(|gfn| gfn.gpa() >= LOW);
    assert!(pages == written, "{} pages fetched, {} written", pages.len(), written.len());
}
