//! Rounds, and the evaluation of their samples.

use crate::machine::{Epoch, Machine, Staging};
use crate::quiet::{preemptions, undisturbed};
use crate::workload::Workload;

/// Values of one quantity.
#[derive(Clone, Debug)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) const fn new() -> Samples {
        Samples(Vec::new())
    }

    pub(crate) fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The value below which the given share of them is.
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1).expect("a sample");
        sorted[(last as f64 * share).round() as usize]
    }

    pub(crate) fn summary(&self) -> Summary {
        Summary { median: self.quantile(0.5), p10: self.quantile(0.1), p90: self.quantile(0.9) }
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) p10: f64,
    pub(crate) p90: f64,
}

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    pub(crate) rounds: usize,
    /// Samples of each mode in a round, one after the other, after one that does not count.
    pub(crate) epochs: usize,
}

impl Effort {
    /// As many as are worthwhile: epochs with few pages are short.
    pub(crate) fn for_pages(rounds: usize, dirty: u64) -> Effort {
        let epochs = match dirty {
            0..=50 => 40,
            51..=200 => 20,
            201..=500 => 10,
            501..=1500 => 5,
            _ => 3,
        };
        Effort { rounds, epochs }
    }
}

/// One measured mode: a machine and the writes of its guest. Several may use one machine.
pub(crate) struct Mode {
    pub(crate) machine: usize,
    pub(crate) workload: Workload,
    epochs: u64,
    pub(crate) samples: Vec<Epoch>,
}

impl Mode {
    pub(crate) fn new(machine: usize, workload: Workload) -> Mode {
        Mode { machine, workload, epochs: 0, samples: Vec::new() }
    }

    /// The median and spread of a quantity.
    pub(crate) fn of(&self, quantity: impl Fn(&Epoch) -> f64) -> Summary {
        let mut samples = Samples::new();
        self.samples.iter().for_each(|epoch| samples.add(quantity(epoch)));
        samples.summary()
    }

    fn run(&mut self, machine: &mut Machine, staging: Option<&mut Staging>, check: bool) -> Epoch {
        self.epochs += 1;
        machine.epoch(&self.workload.job(self.epochs), staging, check)
    }
}

/// Machines, and modes that take turns on them.
#[derive(Default)]
pub(crate) struct Field {
    pub(crate) machines: Vec<Machine>,
    pub(crate) modes: Vec<Mode>,
}

impl Field {
    /// Adds a mode with a machine of its own, and returns its number.
    pub(crate) fn add(&mut self, machine: Machine, workload: Workload) -> usize {
        self.machines.push(machine);
        self.share(self.machines.len() - 1, workload)
    }

    /// Adds a mode on an existing machine.
    pub(crate) fn share(&mut self, machine: usize, workload: Workload) -> usize {
        self.modes.push(Mode::new(machine, workload));
        self.modes.len() - 1
    }

    /// Takes the memory, turns tracking on, and lets hot pages become hot.
    pub(crate) fn prepare(&mut self) {
        for mode in &self.modes {
            self.machines[mode.machine].touch(&mode.workload);
        }
        self.machines.iter_mut().for_each(Machine::enable);
    }

    /// Runs the modes in turns, with whole epochs if there is a staging buffer.
    pub(crate) fn measure(&mut self, effort: Effort, mut staging: Option<&mut Staging>) {
        for mode in &mut self.modes {
            let machine = &mut self.machines[mode.machine];
            for _ in 0..if machine.method().is_hot() { 16 } else { 3 } {
                mode.run(machine, staging.as_deref_mut(), true);
            }
        }
        for round in 0..effort.rounds {
            // Each round starts elsewhere, so that no mode always follows the same one.
            for turn in 0..self.modes.len() {
                let index = (turn + round) % self.modes.len();
                let mode = &mut self.modes[index];
                let machine = &mut self.machines[mode.machine];
                // The first finds the caches as another mode left them; it is the one that is checked.
                mode.run(machine, staging.as_deref_mut(), true);
                for _ in 0..effort.epochs {
                    let epoch = undisturbed(|| {
                        let before = preemptions();
                        let epoch = mode.run(machine, staging.as_deref_mut(), false);
                        (epoch, preemptions() != before)
                    });
                    mode.samples.push(epoch);
                }
            }
        }
    }
}
