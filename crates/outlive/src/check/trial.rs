//! A VM runs for a moment, and what dirty tracking finds is compared with what its guest wrote.

use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant};

use outlive_dirty::{BackendChoice, DirtyKind, Gfn};
use outlive_machine::{
    Host, MIN_MEMORY, Machine, MachineEvent, Options, OutputMode, PAGE_SIZE, PayloadOptions,
};
use tracing::subscriber::{NoSubscriber, with_default};

use super::Finding;

const NAME: &str = "trial VM";
/// How many pages the guest writes over and over: every third page, beginning with the first.
const PAGES: u64 = 256;
const STRIDE: u64 = 3;
const FIRST: u64 = 0x80_0000 / PAGE_SIZE as u64;
/// How many rounds there are. Each waits until the guest has written all pages since the previous one.
const ROUNDS: usize = 3;
/// How long a pass may take. It takes a few milliseconds; on a machine where it takes this long, nothing
/// would work.
const PATIENCE: Duration = Duration::from_secs(10);

/// The guest: see the comments. Runs at `outlive_guest::abi::IMAGE_ADDR`, needs no stack.
const PROGRAM: [u8; 37] = [
    0xbb, 0x00, 0x00, 0x80, 0x00, //             again: mov  ebx, 0x800000
    0xb9, 0x00, 0x01, 0x00, 0x00, //                    mov  ecx, 256
    0x48, 0xff, 0x03, //                         page:  inc  qword ptr [rbx]
    0x48, 0x81, 0xc3, 0x00, 0x30, 0x00, 0x00, //        add  rbx, 0x3000
    0xff, 0xc9, //                                      dec  ecx
    0x75, 0xf2, //                                      jne  page
    0xba, 0x00, 0x05, 0x00, 0x00, //                    mov  edx, 0x500 (idle port)
    0xb8, 0xe8, 0x03, 0x00, 0x00, //                    mov  eax, 1000 microseconds
    0xef, //                                            out  dx, eax
    0xeb, 0xdb, //                                      jmp  again
];

/// What went wrong in the trial, with the cause.
type Wrong = String;

pub(super) fn finding() -> Finding {
    // The machine logs its choice of tracker; here that belongs in the finding, not between the lines of the
    // table.
    match with_default(NoSubscriber::default(), trial) {
        Ok((DirtyKind::Ring, took)) => Finding::ok(NAME, format!("{} with the dirty ring", verdict(took))),
        Ok((_, took)) => Finding::warning(
            NAME,
            format!("{}, but only with the dirty bitmap", verdict(took)),
            "use Linux 5.11 or newer, which has the dirty ring: it makes checkpoints of large VMs cheaper",
        ),
        Err(wrong) => Finding::error(NAME, wrong, "VMs cannot be protected on this kernel: use another one"),
    }
}

fn verdict(took: Duration) -> String {
    format!("found all {PAGES} written pages in {ROUNDS} of {ROUNDS} rounds ({} ms)", took.as_millis())
}

fn trial() -> Result<(DirtyKind, Duration), Wrong> {
    let start = Instant::now();
    let mut guest = Guest::start()?;
    let mut seen = guest.last_page()?;
    for round in 1..=ROUNDS {
        // The pass under way at the last harvest and one that began after it.
        seen = guest.wait_for(seen + 2)?;
        let mut dirty = Vec::new();
        guest.machine.take_dirty(&mut dirty).map_err(|error| error.to_string())?;
        let missed = written().filter(|gfn| !dirty.contains(gfn)).count();
        if missed > 0 {
            return Err(format!("dirty tracking missed {missed} of {PAGES} written pages in round {round}"));
        }
    }
    Ok((guest.machine.tracker().kind(), start.elapsed()))
}

fn written() -> impl Iterator<Item = Gfn> {
    (0..PAGES).map(|number| Gfn(FIRST + number * STRIDE))
}

struct Guest {
    machine: Machine,
    crash: Arc<Mutex<Option<Wrong>>>,
}

impl Guest {
    fn start() -> Result<Guest, Wrong> {
        let host = Host::open().map_err(|error| error.to_string())?;
        let crash = Arc::new(Mutex::new(None));
        let reported = Arc::clone(&crash);
        let events = Arc::new(move |event| {
            if let MachineEvent::Crashed { why, .. } | MachineEvent::HostFault { why, .. } = event {
                *reported.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(why);
            }
        });
        let options = Options {
            vcpus: 1,
            memory: MIN_MEMORY,
            firmware_bytes: 0,
            output: OutputMode::PassThrough,
            net: None,
            disks: Vec::new(),
            rng: false,
            console: None,
            serial: None,
            tracker: BackendChoice::Auto,
            trigger: 4 * PAGES as usize,
            max_dirty: 8 * PAGES as usize,
            events,
        };
        let mut machine = Machine::new(Arc::new(host), &options).map_err(|error| error.to_string())?;
        let boot = PayloadOptions { ipv4: [0; 4], prefix: 0, gateway: [0; 4], random_seed: [0; 32] };
        machine.boot_payload(&image(), &boot).map_err(|error| error.to_string())?;
        machine.enable_tracking().map_err(|error| error.to_string())?;
        machine.resume();
        Ok(Guest { machine, crash })
    }

    /// How often the guest has written the last of its pages, which it writes last.
    fn last_page(&self) -> Result<u64, Wrong> {
        let mut page = [0; PAGE_SIZE];
        let last = written().last().expect("there are pages");
        if !self.machine.ram().read_page(last, &mut page) {
            return Err("the guest's memory is missing at its address".to_string());
        }
        Ok(u64::from_le_bytes(page[..8].try_into().expect("eight bytes")))
    }

    fn wait_for(&self, passes: u64) -> Result<u64, Wrong> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = self.last_page()?;
            if seen >= passes {
                return Ok(seen);
            }
            let crash = self.crash.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
            if let Some(why) = crash {
                return Err(format!("the guest crashed: {why}"));
            }
            if Instant::now() > deadline {
                return Err(format!("the guest did not finish within {} s", PATIENCE.as_secs()));
            }
            sleep(Duration::from_millis(1));
        }
    }
}

/// The program as the smallest ELF executable: a header, one segment, the code.
fn image() -> Vec<u8> {
    const HEADER: u64 = 64;
    const SEGMENT: u64 = 56;
    let address = outlive_guest::abi::IMAGE_ADDR;
    let length = PROGRAM.len() as u64;
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    // Executable, x86-64, version 1.
    [2_u16, 62].iter().for_each(|it| image.extend(it.to_le_bytes()));
    image.extend(1_u32.to_le_bytes());
    // Entry, segment table, no section table.
    [address, HEADER, 0].iter().for_each(|it: &u64| image.extend(it.to_le_bytes()));
    image.extend(0_u32.to_le_bytes());
    // Sizes: this header, a segment header, one of them, no sections.
    [HEADER as u16, SEGMENT as u16, 1, 64, 0, 0].iter().for_each(|it| image.extend(it.to_le_bytes()));
    // Load it, readable and executable.
    [1_u32, 5].iter().for_each(|it| image.extend(it.to_le_bytes()));
    [HEADER + SEGMENT, address, address, length, length, 16]
        .iter()
        .for_each(|it| image.extend(it.to_le_bytes()));
    image.extend(PROGRAM);
    image
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn the_trial_succeeds_where_kvm_works() {
        if let Err(error) = Host::open() {
            println!("skipped: {error}");
            return;
        }
        let finding = finding();
        assert_ne!(finding.state, State::Error, "{}", finding.found);
        assert!(finding.found.contains("found all 256 written pages in 3 of 3 rounds"), "{}", finding.found);
    }
}
