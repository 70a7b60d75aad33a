//! `dirty.harvest` and `dirty.epoch`: the cases, and the peer of each.

use std::io;

use crate::machine::{Epoch, Host, Machine, Method, Staging};
use crate::measure::{Effort, Field, Mode};
use crate::options::Options;
use crate::report::{Case, Report, Row, short};
use crate::workload::{Pattern, Workload};

/// A back end and the share of hot pages in what its guest writes.
type Line = (Method, u64);

const COLD: [Line; 3] = [(Method::Bitmap, 0), (Method::ClearLog, 0), (Method::Ring, 0)];
const HOT: [Line; 4] =
    [(Method::RingHot, 50), (Method::RingHot, 90), (Method::RingHot, 100), (Method::ClearLogHot, 90)];

const FLOOR: [Line; 4] =
    [(Method::Floor, 0), (Method::FloorHot, 50), (Method::FloorHot, 90), (Method::FloorHot, 100)];

/// `available` leaves out, once and for all, back ends that the host does not have.
fn lines(dirty: u64, available: &[Line]) -> Vec<Line> {
    // Half of one page cannot be hot.
    available.iter().copied().filter(|(_, hot)| *hot == 0 || dirty >= 10).collect()
}

fn available(host: &Host, floor: bool) -> Vec<Line> {
    let floor: &[Line] = if floor { &FLOOR } else { &[] };
    let all = COLD.iter().chain(&HOT).chain(floor).copied();
    let (there, missing): (Vec<Line>, Vec<Line>) = all.partition(|(method, _)| host.has(*method));
    for (method, hot) in missing {
        println!("skipped: this kernel has no {} for {hot} % hot pages", method.name());
    }
    there
}

/// Harvest and rearm, over sizes, numbers and patterns of pages.
pub(crate) fn harvest(host: &Host, options: &Options, report: &mut Report) -> io::Result<()> {
    report.section(
        "dirty.harvest: all that tracking takes of the pause: harvest, rearm, begin of the next epoch\n\
         (bitmap peer: KVM_GET_DIRTY_LOG and search). Median (10 %-90 %), then the three steps, then the pages that\n\
         were trapped.",
    );
    let (scale, available) = (options.scale, available(host, options.floor));
    for &gib in scale.sizes {
        for &pattern in scale.patterns {
            for &dirty in scale.dirty {
                let against = Against { bench: "dirty.harvest", gib, dirty, pattern };
                against.peer(host, lines(dirty, &available), options, None, report)?;
            }
        }
    }
    Ok(())
}

/// Whole epochs: the guest runs, then state, harvest, rearm and a copy of all pages.
pub(crate) fn epochs(host: &Host, options: &Options, report: &mut Report) -> io::Result<()> {
    report.section(
        "dirty.epoch: guest run, state of the vCPU (7 ioctls), harvest, rearm, copy of all pages. Median (10 %-90 %).",
    );
    let (scale, available) = (options.scale, available(host, options.floor));
    let mut staging = Staging::new();
    for &dirty in scale.epoch_dirty {
        let against =
            Against { bench: "dirty.epoch", gib: scale.epoch_gib, dirty, pattern: Pattern::Scattered };
        against.peer(host, lines(dirty, &available), options, Some(&mut staging), report)?;
    }
    Ok(())
}

struct Against {
    bench: &'static str,
    gib: u64,
    dirty: u64,
    pattern: Pattern,
}

impl Against {
    fn workload(&self, hot: u64) -> Workload {
        Workload::new(self.gib, self.dirty, hot, self.pattern)
    }

    /// Measures lines together with the plain bitmap, which writes the same pages in the same rounds.
    fn peer(
        &self,
        host: &Host,
        lines: Vec<Line>,
        options: &Options,
        staging: Option<&mut Staging>,
        report: &mut Report,
    ) -> io::Result<()> {
        let whole = staging.is_some();
        let mut field = Field::default();
        field.machines.push(Machine::new(host, self.gib, 1, Method::Peer));
        let mut peers: Vec<(u64, usize)> = Vec::new();
        for &(_, hot) in &lines {
            if peers.iter().all(|peer| peer.0 != hot) {
                peers.push((hot, field.share(0, self.workload(hot))));
            }
        }
        let first = field.modes.len();
        for &(method, hot) in &lines {
            field.add(Machine::new(host, self.gib, 1, method), self.workload(hot));
        }
        field.prepare();
        field.measure(Effort::for_pages(options.scale.rounds, self.dirty), staging);
        for (index, &(method, hot)) in lines.iter().enumerate() {
            let mode = &field.modes[first + index];
            let peer = peers.iter().find(|peer| peer.0 == hot).map(|peer| &field.modes[peer.1]);
            let peer = peer.expect("a peer with the same pages");
            let value = |mode: &Mode| mode.of(if whole { Epoch::all } else { Epoch::tracking });
            report.add(Row {
                bench: self.bench,
                case: Case {
                    backend: method.name(),
                    vm_gib: self.gib,
                    dirty: self.dirty,
                    pattern: self.pattern.name(),
                    hot,
                    fetch: None,
                },
                value: value(mode),
                peer: "bitmap".to_string(),
                peer_value: value(peer),
                steps: if whole { whole_steps(mode, peer) } else { steps(mode) },
            })?;
        }
        Ok(())
    }
}

/// The medians of the steps. They need not add up to the median of the sum.
fn steps(mode: &Mode) -> String {
    let of = |quantity: fn(&Epoch) -> f64| short(mode.of(quantity).median);
    let trapped = mode.of(|epoch| epoch.trapped as f64).median;
    format!("{} + {} + {}, {trapped} trapped", of(|it| it.harvest), of(|it| it.rearm), of(|it| it.begin))
}

fn whole_steps(mode: &Mode, peer: &Mode) -> String {
    let part = |mode: &Mode| {
        let of = |quantity: fn(&Epoch) -> f64| short(mode.of(quantity).median);
        format!("{}/{}/{}/{}", of(|it| it.run), of(|it| it.state), of(Epoch::tracking), of(|it| it.copy))
    };
    format!("run/state/track/copy {}, bitmap {}", part(mode), part(peer))
}

/// The same pages in VMs of all sizes, each compared with the smallest.
pub(crate) fn sizes(host: &Host, options: &Options, report: &mut Report) -> io::Result<()> {
    report.section(
        "dirty.harvest, by size of the VM: the same number of pages, either equally far apart in all VMs (in 1 GiB)\n\
         or over all of memory (scattered). Peer: the ring of a VM of 1 GiB.",
    );
    let scale = options.scale;
    if !host.has(Method::Ring) {
        return Ok(());
    }
    let sizes: Vec<u64> = scale.large_sizes.iter().copied().filter(|&gib| fits(gib)).collect();
    let machines = || sizes.iter().map(|&gib| Machine::new(host, gib, 1, Method::Ring));
    let mut field = Field { machines: machines().collect(), modes: Vec::new() };
    let mut cases = Vec::new();
    for &pattern in &[Pattern::InOneGib, Pattern::Scattered] {
        for &dirty in scale.large_dirty {
            for (index, &gib) in sizes.iter().enumerate() {
                cases.push((pattern, dirty, gib));
                field.share(index, Workload::new(gib, dirty, 0, pattern));
            }
        }
    }
    field.prepare();
    field.measure(Effort::for_pages(scale.rounds, 300), None);
    for (&(pattern, dirty, gib), mode) in cases.iter().zip(&field.modes) {
        if gib == sizes[0] {
            continue;
        }
        let smallest = cases.iter().position(|case| *case == (pattern, dirty, sizes[0]));
        let peer = &field.modes[smallest.expect("the smallest")];
        report.add(Row {
            bench: "dirty.harvest",
            case: Case {
                backend: Method::Ring.name(),
                vm_gib: gib,
                dirty,
                pattern: pattern.name(),
                hot: 0,
                fetch: None,
            },
            value: mode.of(Epoch::tracking),
            peer: format!("ring, {} GiB", sizes[0]),
            peer_value: peer.of(Epoch::tracking),
            steps: steps(mode),
        })?;
    }
    Ok(())
}

/// Whether there is memory for a VM: KVM takes about 2.5 GiB for one of 1 TiB, whatever the guest touches.
fn fits(gib: u64) -> bool {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let available = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    let needed = gib * 3 * 1024 + (512 << 10);
    let fits = available.is_none_or(|kib| kib > 2 * needed);
    if !fits {
        println!("skipped: a VM of {gib} GiB needs {} MiB of free memory", 2 * needed / 1024);
    }
    fits
}
