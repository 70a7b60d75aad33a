//! Which vCPUs dirty how much in a VM, and what a migration or protection would cost: from the lines that a
//! VMM writes to a socket (`outlive_dirty::rate`). `dirty_top --rates SOCKET` is such a VMM.
//!
//! KVM answers a VM's ioctls only in the process that made the VM (virt/kvm/kvm_main.c: `kvm->mm !=
//! current->mm` is EIO), even if another process has the descriptor. userfaultfd and soft-dirty could work
//! from outside, but each sample unmaps guest memory from the guest. So the VMM samples and reports.

use std::error::Error;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use outlive_dirty::rate::{Costs, Link, RateMeter, RateReport, VmLine, Window, WindowError};

type Failure = Box<dyn Error>;

const HELP: &str = "\
Who dirties what in a VM, and what moving or protecting it would cost.

Usage: dirty_rate SOURCE [OPTIONS]

  SOURCE            a socket of the VMM, a file with what was read from one, or - for standard input
  --seconds S       look for so long [5]
  --svg FILE        also draw a map of memory: the darker the more is written
  --link GBIT       speed of the link to the other host, Gbit/s [10]
  --downtime MS     how long a migration may stop the guest [50]
  --interval MS     time between the checkpoints of a protection [10]
  -h, --help        this text

Example:
  dirty_top --interval 1 --rates /tmp/rates &
  dirty_rate /tmp/rates --svg map.svg
";

struct Options {
    source: String,
    time: Duration,
    svg: Option<String>,
    link: Link,
    interval: Duration,
}

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(error) => return failed(&error, 2),
    };
    let input = match open(&options.source, options.time) {
        Ok(input) => input,
        Err(error) => return failed(&format!("{}: {error}", options.source), 2),
    };
    match look(input, &options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error.to_string(), 1),
    }
}

fn failed(message: &str, code: u8) -> ExitCode {
    eprintln!("dirty_rate: {message}");
    ExitCode::from(code)
}

/// None if help was asked for; an error is one line for the user.
fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Option<Options>, String> {
    let link = Link { bytes_per_second: 10e9 / 8.0, downtime: Duration::from_millis(50) };
    let (time, interval) = (Duration::from_secs(5), Duration::from_millis(10));
    let mut options = Options { source: String::new(), time, svg: None, link, interval };
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{name} wants a value"));
        match name.as_str() {
            "-h" | "--help" => return Ok(None),
            "--seconds" => options.time = Duration::from_secs_f64(number(&name, &value()?, 86_400.0)?),
            "--svg" => options.svg = Some(value()?),
            "--link" => options.link.bytes_per_second = number(&name, &value()?, 1e5)? * 1e9 / 8.0,
            "--downtime" => {
                options.link.downtime = Duration::from_secs_f64(number(&name, &value()?, 1e6)? / 1e3);
            }
            "--interval" => options.interval = Duration::from_secs_f64(number(&name, &value()?, 1e6)? / 1e3),
            _ if name.starts_with("--") => return Err(format!("there is no option {name}; try --help")),
            _ if options.source.is_empty() => options.source = name,
            _ => return Err(format!("one source is enough, and {name} is another")),
        }
    }
    if options.source.is_empty() { Err("no source; try --help".into()) } else { Ok(Some(options)) }
}

fn number(name: &str, text: &str, most: f64) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number <= most => Ok(number),
        _ => Err(format!("{name} wants a number above 0 and up to {most}, not {text:?}")),
    }
}

/// A socket ends when the time is over, even if nothing comes.
fn open(source: &str, time: Duration) -> io::Result<Box<dyn Read>> {
    if source == "-" {
        return Ok(Box::new(io::stdin()));
    }
    if fs::metadata(source)?.file_type().is_socket() {
        let stream = UnixStream::connect(source)?;
        stream.set_read_timeout(Some(time.max(Duration::from_millis(1))))?;
        return Ok(Box::new(stream));
    }
    Ok(Box::new(File::open(source)?))
}

fn look(input: Box<dyn Read>, options: &Options) -> Result<(), Failure> {
    let mut vm: Option<VmLine> = None;
    let mut meter = None;
    let begin = Instant::now();
    // Nobody sends a line of 1 GiB.
    let mut lines = BufReader::new(input.take(1 << 30)).lines();
    while begin.elapsed() < options.time {
        let line = match lines.next() {
            Some(Ok(line)) => line,
            Some(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => break,
            Some(Err(error)) => return Err(error.into()),
            None => break,
        };
        if vm.is_none() {
            let said: VmLine =
                line.parse().map_err(|error| format!("the first line is none of a VM: {error}"))?;
            meter = Some(RateMeter::new(said.gfn_space));
            vm = Some(said);
            continue;
        }
        match (line.parse::<Window>(), &mut meter) {
            (Ok(window), Some(meter)) => meter.add(&window),
            (Err(WindowError::OtherLine(_)), _) => (),
            (Err(error), _) => return Err(format!("a line that is no window: {error}").into()),
            (Ok(_), None) => (),
        }
    }
    let (Some(vm), Some(meter)) = (vm, meter) else { return Err("nothing came from there".into()) };
    let report = meter.report();
    if report.windows == 0 {
        return Err("no window came from there".into());
    }
    print(&report, &vm, options);
    if let Some(file) = &options.svg {
        let title = format!("Dirty pages of {} in {:.1} s", options.source, report.time.as_secs_f64());
        fs::write(file, report.map.to_svg(&title)).map_err(|error| format!("{file}: {error}"))?;
        println!("map: {file}");
    }
    Ok(())
}

fn print(report: &RateReport, vm: &VmLine, options: &Options) {
    let memory = vm.gfn_space * 4096;
    let seconds = report.time.as_secs_f64();
    println!(
        "{:.1} s in {} windows; memory {:.1} GiB",
        seconds,
        report.windows,
        memory as f64 / f64::from(1 << 30)
    );
    println!("\n             dirty pages/s        MB/s");
    let row = |name: &str, pages: f64| println!("{name:12} {pages:13.0} {:11.1}", pages * 4096.0 / 1e6);
    report.vcpus.iter().enumerate().for_each(|(index, &pages)| row(&format!("vCPU {index}"), pages));
    row("devices", report.devices);
    row("all", report.pages);
    if report.hot > 0.0 {
        println!("of each window {:.0} pages are hot: listed, and perhaps not written", report.hot);
    }
    println!("\ndifferent pages in");
    let set = report.working_set;
    for (time, pages) in [("1 ms", set.in_1_ms), ("10 ms", set.in_10_ms), ("100 ms", set.in_100_ms)] {
        match pages {
            Some(pages) => {
                println!("  {time:>6} {pages:10.0}   {:.1} MiB", pages * 4096.0 / f64::from(1 << 20))
            }
            None => println!("  {time:>6}          -   (windows are too long, or too few)"),
        }
    }
    let ns = |ns: u32, usual: u64| Duration::from_nanos(if ns == 0 { usual } else { ns.into() });
    let costs =
        Costs { fault: ns(vm.fault_ns, 1000), copy: ns(vm.copy_ns, 350), pause: Duration::from_micros(50) };
    let migration = report.migration(&options.link, memory, &costs);
    let gbit = options.link.bytes_per_second * 8.0 / 1e9;
    println!("\nmigration over {gbit} Gbit/s, if all of memory is sent once:");
    println!(
        "  {} rounds, {:.2} s, {:.2} GB, the guest at {:.0} % of its speed, then still for {:.1} ms{}",
        migration.rounds,
        migration.total.as_secs_f64(),
        migration.bytes / 1e9,
        migration.speed * 100.0,
        migration.downtime.as_secs_f64() * 1e3,
        if migration.converges {
            ""
        } else {
            ": it does NOT get shorter, the guest writes too fast for this link"
        }
    );
    let interval = options.interval.as_secs_f64() * 1e3;
    println!("protection by a checkpoint each {interval} ms, without hot pages:");
    match report.protection(options.interval, &costs) {
        Some(protection) => println!(
            "  {:.0} pages a checkpoint, {:.2} Gbit/s before compression, {:.0} % of the guest's speed ({:.1} us a \
             trap, {:.2} us a copy)",
            protection.pages,
            protection.bytes_per_second * 8.0 / 1e9,
            protection.speed * 100.0,
            costs.fault.as_secs_f64() * 1e6,
            costs.copy.as_secs_f64() * 1e6,
        ),
        None => println!("  unknown: no working set was measured"),
    }
}
