//! The pause of a checkpoint as the guest's vCPUs see it, compared with its floor: `cargo xtask bench pause`, or
//! `cargo bench -p outlive-machine --bench pause -- [--quick] [--json FILE]`.
//!
//! The pause is from a vCPU's last exit to its next entry, for the vCPU that was away longest. The floor is
//! what no checkpoint can do without, measured in the same rounds on bare KVM: the kick that takes the vCPUs out
//! of the guest, the system calls that read the state of one, and a copy of the pages that bypasses the cache,
//! divided among the vCPUs. No link and no standby is involved.

#[path = "../../tests/support/elf.rs"]
mod elf;
mod floor;

use std::fs::File;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outlive_dirty::BackendChoice;
use outlive_machine::{
    After, CaptureReport, Host, InPause, Machine, Options, Outgoing, OutputMode, PayloadOptions, SpillError,
};

use elf::elf;
use floor::Floor;

/// The first page that it writes.
const DATA: u64 = 0x40_0000;
const MEMORY: u64 = 64 << 20;
const PAGE: usize = 4096;
/// A machine's staging and lists have room for this many pages.
const MOST: usize = 8192;
/// The time between two checkpoints; longer if the guest needs longer to write its pages.
const EPOCH: Duration = Duration::from_millis(1);

struct Case {
    vcpus: u8,
    pages: usize,
}

struct Nothing;

impl InPause for Nothing {
    fn counted(&mut self, _pages: usize) {}

    fn spill(&mut self, _staging: &mut Outgoing) -> Result<(), SpillError> {
        Err("there are more pages than the guest writes".into())
    }
}

/// A program that writes a word of each of `pages` pages of its own, again and again.
fn guest(pages: u32) -> Vec<u8> {
    let mut code = vec![0x48, 0xc7, 0xc3]; // mov rbx, DATA
    code.extend((DATA as u32).to_le_bytes());
    code.extend([0x48, 0x69, 0xf6]); // imul rsi, rsi, pages * 4096 (rsi is the vCPU's number)
    code.extend((pages * PAGE as u32).to_le_bytes());
    code.extend([0x48, 0x01, 0xf3]); // add rbx, rsi
    code.push(0xb9); // again: mov ecx, pages
    code.extend(pages.to_le_bytes());
    code.extend([0x48, 0x89, 0xd8]); // mov rax, rbx
    code.extend([0x48, 0xff, 0x00]); // next: inc qword [rax]
    code.extend([0x48, 0x05, 0x00, 0x10, 0x00, 0x00]); // add rax, 4096
    code.extend([0xff, 0xc9, 0x75, 0xf3]); // dec ecx; jnz next
    code.extend([0xeb, 0xe9]); // jmp again
    elf(&code)
}

/// A protected machine that runs the guest.
fn machine(host: &Arc<Host>, case: &Case) -> Machine {
    let options = Options {
        vcpus: case.vcpus,
        memory: MEMORY,
        firmware_bytes: 0,
        output: OutputMode::PassThrough,
        net: None,
        disks: Vec::new(),
        rng: false,
        console: None,
        serial: None,
        tracker: BackendChoice::Auto,
        trigger: MOST,
        max_dirty: MOST,
        events: Arc::new(|_| ()),
    };
    let mut machine = Machine::new(host.clone(), &options).expect("a machine");
    let of_each = case.pages / usize::from(case.vcpus);
    let boot = PayloadOptions { ipv4: [10, 0, 0, 2], prefix: 24, gateway: [0; 4], random_seed: [0; 32] };
    machine.boot_payload(&guest(of_each as u32), &boot).expect("a guest");
    machine.resume();
    machine.enable_tracking().expect("dirty tracking");
    machine
}

/// Takes a checkpoint when the guest has written all its pages.
fn checkpoint(machine: &mut Machine, staging: &mut Outgoing, case: &Case) -> CaptureReport {
    let began = Instant::now();
    loop {
        std::thread::sleep(EPOCH);
        let pages = machine.tracker().estimate();
        // A bitmap is not counted.
        let written = pages.logged.map(|logged| logged + pages.hot);
        let all = written.is_none_or(|written| written >= case.pages);
        if all || began.elapsed() > Duration::from_secs(1) {
            return machine.checkpoint(staging, After::Resume, &mut Nothing).expect("a checkpoint");
        }
    }
}

/// What the rounds of one case have shown, in microseconds.
#[derive(Default)]
struct Measured {
    pause: Vec<f64>,
    /// Stop, state, harvest, handover, rearm, decide, copy, resume.
    phases: [Vec<f64>; 8],
    pages: Vec<f64>,
    floor: Vec<f64>,
    /// Kick, state, copy.
    floor_parts: [Vec<f64>; 3],
}

const PHASES: [&str; 8] = ["stop", "state", "harvest", "handover", "rearm", "decide", "copy", "resume"];

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn measure(host: &Arc<Host>, case: &Case, rounds: usize) -> Measured {
    let mut machine = machine(host, case);
    let mut staging = Outgoing::new(MOST, 0).expect("staging");
    let mut floor = floor(&mut machine, &mut staging, case);
    let mut measured = Measured::default();
    // Of the first ones some are late: the guest touches its memory, and hot pages become known.
    let warm = 20;
    let batch = 25;
    let mut last = None;
    for round in 0..warm + rounds {
        if round % batch == 0 {
            // In turns, because what else this machine does changes all the time.
            machine.pause();
            for _ in 0..batch {
                let found = floor.round(EPOCH).map(us);
                if round > 0 {
                    measured.floor.push(found.iter().sum());
                    measured.floor_parts.iter_mut().zip(found).for_each(|(all, one)| all.push(one));
                }
            }
            machine.resume();
            // The next one says how long the guest was stopped for the floor.
            checkpoint(&mut machine, &mut staging, case);
            last = None;
        }
        let report = checkpoint(&mut machine, &mut staging, case);
        if round < warm {
            continue;
        }
        let before: Option<CaptureReport> = last.replace(report);
        if let (Some(before), Some(returned)) = (before, report.returned) {
            measured.pause.push(us(returned.vcpu_pause));
            let phases = [
                before.stop,
                before.state,
                before.harvest,
                before.handover,
                before.rearm,
                before.decide,
                before.copy,
                returned.resume,
            ];
            measured.phases.iter_mut().zip(phases).for_each(|(all, one)| all.push(us(one)));
            measured.pages.push(before.pages as f64);
        }
    }
    measured
}

/// A VM that runs the same guest for the floor.
fn floor(machine: &mut Machine, staging: &mut Outgoing, case: &Case) -> Floor {
    checkpoint(machine, staging, case);
    machine.pause();
    let of_each = case.pages / usize::from(case.vcpus);
    let floor = Floor::new(machine, staging, of_each).expect("a VM");
    machine.resume();
    floor
}

fn quantile(values: &[f64], of_hundred: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get((sorted.len() * of_hundred / 100).min(sorted.len().saturating_sub(1))).copied().unwrap_or(0.0)
}

/// Prints the case, and returns its rows.
fn report(case: &Case, measured: &Measured) -> String {
    let (floor, pages) = (quantile(&measured.floor, 50), quantile(&measured.pages, 50));
    let of = |percent| quantile(&measured.pause, percent);
    println!(
        "{:2} {:5} {pages:7.0} {:9.1} {:9.1} {:9.1} {floor:9.1} {:7.2}",
        case.vcpus,
        case.pages,
        of(50),
        of(90),
        of(99),
        of(50) / floor
    );
    let phases = PHASES.iter().zip(&measured.phases);
    let phases = phases.map(|(name, all)| format!("{name} {:.1}", quantile(all, 50)));
    println!("          {}", phases.collect::<Vec<_>>().join(", "));
    let [kick, state, copy] = measured.floor_parts.each_ref().map(|all| quantile(all, 50));
    println!("          floor: kick {kick:.1}, state {state:.1}, copy {copy:.1}");
    let row = |percent: usize| {
        format!(
            "{{\"bench\":\"pause.vcpu\",\"case\":{{\"vcpus\":{},\"pages\":{},\"percentile\":{percent}}},\
             \"value\":{:.3},\"unit\":\"us\",\"peer\":\"floor\",\"peer_value\":{floor:.3}}}\n",
            case.vcpus,
            case.pages,
            of(percent)
        )
    };
    [50, 90, 99].map(row).concat()
}

/// The options; `cargo bench` adds `--bench`.
fn options() -> Result<(bool, Option<String>), String> {
    let (mut quick, mut json) = (false, None);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--quick" => quick = true,
            "--json" => json = Some(words.next().ok_or("--json needs a FILE")?),
            "--bench" => {}
            other => return Err(format!("unknown option {other}; there are --quick and --json FILE")),
        }
    }
    Ok((quick, json))
}

fn run() -> Result<(), String> {
    let (quick, json) = options()?;
    let host = Arc::new(Host::open().map_err(|error| error.to_string())?);
    let (sizes, rounds): (&[usize], usize) =
        if quick { (&[16, 300], 300) } else { (&[16, 100, 300, 1000, 3000], 2000) };
    println!("µs    dirty  copied       p50       p90       p99     floor   ratio of p50");
    let mut rows = String::new();
    for vcpus in [1, 2] {
        for &pages in sizes {
            let case = Case { vcpus, pages };
            // A round of many pages takes longer, and varies less.
            let rounds = (rounds * 100 / pages.max(100)).max(rounds / 10);
            rows += &report(&case, &measure(&host, &case, rounds));
        }
    }
    let written = json.map(|file| File::create(file)?.write_all(rows.as_bytes()));
    written.unwrap_or(Ok(())).map_err(|error: io::Error| format!("the rows cannot be written: {error}"))
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::from(2)
        }
    }
}
