//! Measures what writing pages down for the standby costs, compared with copying them, and how many bytes
//! they take, compared with raw pages: `cargo xtask bench wire`, or `cargo bench -p outlive-epoch --bench
//! wire -- [--quick] [--json FILE]`.
//!
//! Bench and peer are measured in turns on the same pages, and the fastest round of each counts.

use std::fs::File;
use std::hint::black_box;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use outlive_epoch::{
    CheckpointBegin, CheckpointFlags, Encoder, MAX_PAGES_PER_SECTION, PAGE_SIZE, PageEntry, PageWriter,
    ProtocolVersion,
};

/// What has happened to each page since it was last sent.
#[derive(Clone, Copy, Debug)]
enum Change {
    Nothing,
    /// This many granules, far from each other, in a byte each.
    Granules(usize),
    Everything,
    /// It has never been sent before.
    New,
    /// It is zero and was never sent before.
    Zero,
}

impl Change {
    const ALL: [Self; 8] = [
        Self::Nothing,
        Self::Granules(1),
        Self::Granules(4),
        Self::Granules(16),
        Self::Granules(48),
        Self::Everything,
        Self::New,
        Self::Zero,
    ];

    fn name(self) -> String {
        match self {
            Self::Nothing => "nothing".into(),
            Self::Granules(count) => format!("{count} granules"),
            Self::Everything => "everything".into(),
            Self::New => "new".into(),
            Self::Zero => "zero".into(),
        }
    }

    fn apply(self, pages: &mut [u8], round: usize) {
        for page in pages.as_chunks_mut::<PAGE_SIZE>().0 {
            match self {
                Self::Nothing => {}
                Self::Granules(count) => {
                    (0..count).for_each(|n| {
                        page[n * PAGE_SIZE / count] = page[n * PAGE_SIZE / count].wrapping_add(1)
                    });
                }
                Self::Everything => page.iter_mut().for_each(|byte| *byte = byte.wrapping_add(1)),
                Self::New => page[0] = round as u8 | 1,
                Self::Zero => page.fill(0),
            }
        }
    }
}

/// The fastest of all rounds, and the bytes of one.
struct Measured {
    pages: usize,
    change: Change,
    write: Duration,
    copy: Duration,
    bytes: usize,
    raw_bytes: usize,
}

fn measure(pages: usize, change: Change, rounds: usize) -> Measured {
    let mut memory: Vec<u8> = (0..pages * PAGE_SIZE).map(|at| ((at * 31) >> 7) as u8 | 1).collect();
    let mut staging = memory.clone();
    let mut writer = PageWriter::remembering(pages * 2, || ()).expect("memory for the bench");
    let mut entries = Vec::with_capacity(pages);
    let (mut write, mut copy, mut bytes) = (Duration::MAX, Duration::MAX, 0);
    for round in 0..rounds + 1 {
        change.apply(&mut memory, round);
        if matches!(change, Change::New | Change::Zero) {
            writer.forget();
        }
        // The same copy as in the pause; the pages are compared in it.
        let began = Instant::now();
        staging.copy_from_slice(black_box(&memory));
        black_box(&mut staging);
        let copied = began.elapsed();
        entries.clear();
        let began = Instant::now();
        let mut end = 0;
        for page in 0..pages {
            if let Some(entry) = writer.write(page as u64 * 7, &mut staging, page * PAGE_SIZE, end) {
                end += entry.data_len();
                entries.push(entry);
            }
        }
        black_box(&mut staging);
        let written = began.elapsed();
        // The first round sends everything for the first time.
        if round > 0 {
            (write, copy) = (write.min(written), copy.min(copied));
            bytes = on_the_wire(&entries, &staging[..end]);
        }
    }
    let raw: Vec<PageEntry> = (0..pages).map(|page| PageEntry::raw(page as u64 * 7)).collect();
    let raw_bytes = on_the_wire(&raw, &memory);
    Measured { pages, change, write, copy, bytes, raw_bytes }
}

/// Bytes of a checkpoint of these pages alone.
fn on_the_wire(entries: &[PageEntry], data: &[u8]) -> usize {
    let mut encoder = Encoder::speaking(ProtocolVersion::CURRENT);
    let mut heads = Vec::new();
    let (pages, flags) = (entries.len() as u32, CheckpointFlags::default());
    let begin = CheckpointBegin { generation: 1, number: 1, pages, state_bytes: 0, disk_bytes: 0, flags };
    encoder.checkpoint_begin(&mut heads, &begin).expect("a beginning");
    let mut rest = data;
    for entries in entries.chunks(MAX_PAGES_PER_SECTION) {
        let (data, behind) = rest.split_at(entries.iter().map(|entry| entry.data_len()).sum());
        encoder.pages_head(&mut heads, entries.iter().copied(), data).expect("a section of pages");
        rest = behind;
    }
    encoder.checkpoint_end(&mut heads, 1).expect("an end");
    heads.len() + data.len()
}

impl Measured {
    fn print(&self) {
        let rate = (self.pages * PAGE_SIZE) as f64 / self.write.as_nanos() as f64;
        println!(
            "{:>5} pages, {:<12} {:>8.1} us ({rate:>5.1} GB/s of pages), copied in {:>7.1} us; {:>9} of {:>9} bytes ({:.1} %)",
            self.pages,
            self.change.name(),
            self.write.as_nanos() as f64 / 1e3,
            self.copy.as_nanos() as f64 / 1e3,
            self.bytes,
            self.raw_bytes,
            self.bytes as f64 * 100.0 / self.raw_bytes as f64,
        );
    }

    fn rows(&self) -> String {
        let case = format!(r#"{{"pages":{},"changed":"{}"}}"#, self.pages, self.change.name());
        let [write, copy] = [self.write, self.copy].map(|time| (time.as_nanos().max(1)) as f64 / 1e3);
        let (bytes, raw) = (self.bytes, self.raw_bytes);
        format!(
            "{{\"bench\":\"wire.encode\",\"case\":{case},\"value\":{write:.3},\"unit\":\"us\",\"peer\":\"copy\",\"peer_value\":{copy:.3}}}\n\
             {{\"bench\":\"wire.bytes\",\"case\":{case},\"value\":{bytes},\"unit\":\"B\",\"peer\":\"raw pages\",\"peer_value\":{raw}}}\n"
        )
    }
}

fn run(arguments: &[String]) -> io::Result<()> {
    let has = |option: &str| arguments.iter().any(|it| it == option);
    let json = arguments.iter().position(|it| it == "--json").and_then(|at| arguments.get(at + 1));
    let mut json = json.map(File::create).transpose()?;
    let (sizes, rounds): (&[usize], usize) = match (has("--bench"), has("--quick")) {
        (false, _) => (&[20], 2),
        (true, true) => (&[300], 50),
        (true, false) => (&[16, 100, 300, 1000, 3000], 300),
    };
    for &pages in sizes {
        for change in Change::ALL {
            let measured = measure(pages, change, rounds);
            measured.print();
            if let Some(file) = &mut json {
                file.write_all(measured.rows().as_bytes())?;
            }
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|it| it == "--list") {
        println!("the_bench_runs: test");
        return ExitCode::SUCCESS;
    }
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::from(2)
        }
    }
}
