//! One checkpoint of a machine: stop, capture, rearm, resume.

// UNSAFETY: hands the staging buffer to the vCPU threads for the time of the copy.
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

use outlive_dirty::{EnableError, Gfn, HarvestError, RearmError};
use outlive_epoch::image::StateKind;

use crate::devices::virtio::blk::LogMode;
use crate::machine::Machine;
use crate::outgoing::Outgoing;
use crate::vcpu::VcpuError;
use crate::vcpu::lent::Who;
use crate::vm_state::{self, VmStateError};

/// From this many pages on, waking the vCPU threads for the copy pays off: two wakes cost about as much as
/// copying this many pages alone (20 µs against 0.35 µs a page).
const PARALLEL_COPY: usize = 96;

/// The extra time for a thread that has not come in time.
const STOP_GRACE: Duration = Duration::from_millis(100);

/// What one checkpoint took. Except for `returned`, the times follow each other and add up to `pause`, as
/// long as the same vCPU is the slowest in all of them.
#[derive(Clone, Copy, Debug)]
pub struct CaptureReport {
    /// From the order to stop, which is given when the devices rest, to the order to run again.
    pub pause: Duration,
    /// Until all vCPUs were out of the guest, with their I/O completed.
    pub stop: Duration,
    /// Saving the state: the slowest vCPU, then the VM and its devices.
    pub state: Duration,
    /// Taking the dirty pages: those of the slowest vCPU's ring, then the others.
    pub harvest: Duration,
    /// From the end of the last vCPU's part until the thread that ends the pause continued: the same thread, as
    /// a rule.
    pub handover: Duration,
    /// Re-arming the traps.
    pub rearm: Duration,
    /// [`InPause::counted`].
    pub decide: Duration,
    /// Copying pages and, when they did not fit into staging, sending the first of them.
    pub copy: Duration,
    /// Dirty pages, all parts together.
    pub pages: usize,
    /// When the pause was over: the order to run again was given, or was due if the VM stays stopped.
    pub ended: Instant,
    /// How the guest resumed after the checkpoint *before* this one, which was not known earlier.
    pub returned: Option<Returned>,
}

/// The way back into the guest.
#[derive(Clone, Copy, Debug)]
pub struct Returned {
    /// From the end of the copy until the last vCPU went back into the guest.
    pub resume: Duration,
    /// The pause as the guest sees it: from the last exit of a vCPU to its next entry, for the vCPU that was
    /// away longest.
    pub vcpu_pause: Duration,
}

/// Why a part of a checkpoint could not be sent. Only its receiver knows what can go wrong there.
pub type SpillError = Box<dyn std::error::Error + Send + Sync>;

/// Why a checkpoint failed. The VM stays stopped when one of these is returned.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// A vCPU's state or ring could not be read.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The VM's state could not be read.
    #[error(transparent)]
    Vm(#[from] VmStateError),
    /// Dirty pages could not be taken.
    #[error("dirty tracking: {0}")]
    Harvest(#[from] HarvestError),
    /// The traps could not be re-armed.
    #[error("dirty tracking: {0}")]
    Rearm(#[from] RearmError),
    /// The part that did not fit into staging could not be sent.
    #[error("the checkpoint is larger than staging and its first part could not be sent: {0}")]
    Spill(#[source] SpillError),
    /// A frame that is not RAM was reported dirty.
    #[error("dirty tracking reported GFN {:#x}, which is not RAM of the VM", .0.0)]
    NotRam(Gfn),
    /// Protection has not been started.
    #[error("dirty tracking is off")]
    NotTracking,
    /// A thread did not come to rest in time. The machine can only be abandoned: everything else that it is
    /// told, and dropping it, waits for that thread.
    #[error(transparent)]
    Stuck(#[from] Stuck),
}

/// What did not come to rest within the [budget of a stop](Machine::set_stop_budget).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stuck {
    /// vCPUs.
    #[error("{missing} of {vcpus} vCPUs did not stop in time")]
    Vcpus {
        /// How many did not stop.
        missing: u32,
        /// Of how many.
        vcpus: usize,
    },
    /// A device's thread.
    #[error("a device did not come to rest in time")]
    Devices,
}

impl CaptureError {
    /// KVM's dirty ring was overrun: writes were lost and its vCPU can never run again. Only the last
    /// committed checkpoint is still a whole VM.
    pub fn is_overrun(&self) -> bool {
        matches!(
            self,
            Self::Harvest(HarvestError::Overrun { .. })
                | Self::Vcpu(VcpuError::Harvest { source: HarvestError::Overrun { .. }, .. })
        )
    }

    /// Whether this machine will never give a checkpoint again, so that everything the guest has done since
    /// the last one is lost: its dirty ring was overrun, this host cannot run a vCPU, or a thread is stuck.
    pub fn is_fatal(&self) -> bool {
        let is_fault = matches!(self, Self::Vcpu(VcpuError::HostFault { .. }));
        is_fault || self.is_overrun() || matches!(self, Self::Stuck(_))
    }
}

/// What the caller does inside the pause. The thread that calls it may be a vCPU's, while the caller's waits.
pub trait InPause: Send {
    /// The dirty pages are counted and the gate is closed: from this moment on held output belongs to the
    /// next epoch. Must not block.
    fn counted(&mut self, pages: usize);

    /// The buffer is full and more pages follow. Send it, pages and state, and return when it (or another one
    /// in its place) can be filled again. The VM stays stopped until then.
    ///
    /// # Errors
    /// The receiver's, when it can take no more.
    fn spill(&mut self, staging: &mut Outgoing) -> Result<(), SpillError>;
}

/// What happens to the VM after a capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// The guest runs again.
    Resume,
    /// It stays stopped: the last checkpoint.
    Stay,
}

impl Machine {
    /// Starts dirty tracking. A running VM is stopped for a moment.
    ///
    /// # Errors
    /// [`EnableError`]; the VM then continues to run without tracking.
    pub fn enable_tracking(&mut self) -> Result<(), EnableError> {
        // It belongs to a moment before the coming base.
        self.check_due = None;
        let running = self.quiesce();
        let result = self.tracker.enable();
        self.release(running);
        result
    }

    /// Ends dirty tracking and frees its lists.
    pub fn disable_tracking(&mut self) {
        // It belongs to a moment that no later checkpoint covers.
        self.check_due = None;
        if !self.tracker.is_enabled() {
            return;
        }
        let running = self.quiesce();
        if let Err(error) = self.tracker.disable() {
            tracing::warn!(%error, "dirty logging stays on in KVM");
        }
        self.release(running);
    }

    /// One round of base synchronisation: stops the VM just long enough to take and re-arm the dirty pages,
    /// and appends them to `gfns`. Their contents are read later, while the guest runs: a page that changes
    /// after this is in the next round again.
    ///
    /// # Errors
    /// [`CaptureError`]; the VM stays stopped then.
    pub fn take_dirty(&mut self, gfns: &mut Vec<Gfn>) -> Result<(), CaptureError> {
        let begun = self.begin()?;
        self.wait_stopped(&begun)?;
        self.all_stopped()?;
        // The pages are read only after the rearm; the types of `outlive_dirty` ensure that.
        let epoch = self.tracker.stopped().state_saved().harvest()?.rearm()?;
        gfns.extend_from_slice(epoch.pages());
        epoch.copied().run();
        self.release(begun.was_running);
        Ok(())
    }

    /// Takes a checkpoint: state and dirty pages since the last one, into `staging`.
    ///
    /// The order inside the pause, and why:
    /// 1. The gate closes, so that devices are between two requests. The guest still runs: the rest of a
    ///    device's request is no part of the pause.
    /// 2. vCPUs stop with their I/O completed. When all have stopped, so that none can send another an
    ///    interrupt, they save their state, then harvest their rings: state first, because vCPU ioctls can
    ///    dirty guest pages.
    /// 3. VM and device state, after the vCPUs, whose last exits may have raised interrupts.
    /// 4. The rest of the dirty pages, after every possible writer is still; then rearm.
    /// 5. `in_pause.counted`: from here on the guest's output belongs to the next epoch.
    /// 6. Copy. 7. Resume.
    ///
    /// As a rule the vCPU's thread that comes last does everything from 3 on, and goes back into the guest: to wake
    /// the caller's thread would take longer than most of the steps. The caller's thread does it if a pause takes
    /// long anyway.
    ///
    /// # Errors
    /// [`CaptureError`]; the VM stays stopped then and nothing is lost: pages of a failed capture are in the
    /// next one again.
    pub fn checkpoint(
        &mut self,
        staging: &mut Outgoing,
        after: After,
        in_pause: &mut dyn InPause,
    ) -> Result<CaptureReport, CaptureError> {
        let short = self.check_due.is_none() && self.tracker.pending() <= staging.capacity();
        let begun = self.begin()?;
        let lends = short && begun.was_running && after == After::Resume;
        let mut result = None;
        if lends {
            let shared = self.vcpus.shared();
            let (vcpus, mut in_grace) = (self.vcpus.len(), false);
            let mut end = |who| result = Some(self.end_pause(who, &begun, staging, after, in_pause));
            let late = || (!std::mem::replace(&mut in_grace, true)).then(grace);
            let lent = shared.lend(&mut end, begun.deadline, late);
            lent.map_err(|missing| Stuck::Vcpus { missing, vcpus })?;
        } else {
            self.wait_stopped(&begun)?;
            result = Some(self.end_pause(Who::Controller, &begun, staging, after, in_pause));
        }
        // PANIC: `end_pause` has returned, or its thread has panicked.
        let report = result.expect("the pause is over")?;
        if after == After::Resume {
            // What a vCPU's thread has left.
            self.release(begun.was_running);
        }
        Ok(report)
    }

    /// The vCPUs have stopped and done their part; does the rest, on either thread.
    fn end_pause(
        &mut self,
        who: Who,
        begun: &Begun,
        staging: &mut Outgoing,
        after: After,
        in_pause: &mut dyn InPause,
    ) -> Result<CaptureReport, CaptureError> {
        let returned = self.all_stopped()?;
        let vcpus = self.vcpus.capture_times();
        let gathered = Instant::now();
        self.save_shared_state(staging)?;
        let saved = Instant::now();
        let tracker = self.tracker.clone();
        let epoch = tracker.stopped().state_saved().harvest()?;
        let harvested = Instant::now();
        let epoch = epoch.rearm()?;
        let rearmed = Instant::now();
        let pages = epoch.pages();
        let comparison = epoch.comparison();
        in_pause.counted(pages.len());
        let decided = Instant::now();
        let mut rest = pages;
        while rest.len() > staging.capacity() {
            let (first, more) = rest.split_at(staging.capacity());
            self.copy_pages(who, first, staging)?;
            staging.compare_with(comparison.clone(), pages.len() - rest.len());
            in_pause.spill(staging).map_err(CaptureError::Spill)?;
            staging.clear_state();
            staging.disk_writes_mut().clear();
            rest = more;
        }
        self.copy_pages(who, rest, staging)?;
        staging.compare_with(comparison, pages.len() - rest.len());
        let count = pages.len();
        let copied = Instant::now();
        epoch.copied().run();
        if after == After::Resume {
            self.copied_at = Some(copied);
            match who {
                Who::Controller => self.release(begun.was_running),
                // After a long stop the guest is told of it by all vCPUs' threads, and one of them is this: the
                // controller tells it. The clock is looked at once: if it were looked at again on the way, the
                // stop could have become long, and this thread would wait for itself.
                Who::LastVcpu if self.stopped_long() => {}
                Who::LastVcpu => self.release_untold(begun.was_running),
            }
        }
        let (began, ended) = (begun.began, Instant::now());
        Ok(CaptureReport {
            pause: ended - began,
            stop: vcpus.stopped.saturating_duration_since(began),
            state: vcpus.state + (saved - gathered),
            harvest: vcpus.harvest + (harvested - saved),
            handover: gathered.saturating_duration_since(vcpus.done),
            rearm: rearmed - harvested,
            decide: decided - rearmed,
            copy: copied - decided,
            pages: count,
            ended,
            returned,
        })
    }

    /// Stops the devices, then orders the vCPUs to stop.
    fn begin(&mut self) -> Result<Begun, CaptureError> {
        if !self.tracker.is_enabled() {
            return Err(CaptureError::NotTracking);
        }
        let deadline = self.stop_budget.map(|budget| Instant::now() + budget);
        let rest = match deadline {
            Some(deadline) => self.gate.close_until(deadline) || self.gate.close_until(grace()),
            None => {
                self.gate.close();
                true
            }
        };
        let was_running = self.begin_stop();
        let began = Instant::now();
        self.vcpus.begin_capture();
        if rest { Ok(Begun { was_running, began, deadline }) } else { Err(Stuck::Devices.into()) }
    }

    /// Waits until the vCPUs have stopped.
    fn wait_stopped(&self, begun: &Begun) -> Result<(), Stuck> {
        let Some(deadline) = begun.deadline else { return Ok(()) };
        let vcpus = self.vcpus.len();
        let stopped = self.vcpus.stopped_until(deadline).or_else(|_| self.vcpus.stopped_until(grace()));
        stopped.map_err(|missing| Stuck::Vcpus { missing, vcpus })
    }

    /// The vCPUs have stopped. Returns how the guest resumed after the checkpoint before: they have left the
    /// guest again, so it is known how they entered it the last time.
    fn all_stopped(&mut self) -> Result<Option<Returned>, CaptureError> {
        self.vcpus.captured()?;
        self.progress.bump();
        let back = self.vcpus.take_return();
        Ok(self.copied_at.take().zip(back).map(|(copied, it)| Returned {
            resume: it.back.saturating_duration_since(copied),
            vcpu_pause: it.away,
        }))
    }

    fn save_shared_state(&mut self, staging: &mut Outgoing) -> Result<(), CaptureError> {
        staging.begin_state(self.state_versions);
        staging.disk_writes_mut().clear();
        if !std::mem::replace(&mut self.constants_sent, true) {
            for (index, bytes) in self.constants.iter().enumerate() {
                staging.push_section(StateKind::VcpuConstant, index as u16, bytes);
            }
        }
        for index in 0..self.vcpus.len() {
            self.vcpus.with_saved(index, |bytes| staging.push_section(StateKind::Vcpu, index as u16, bytes));
        }
        let version = self.state_versions.of(StateKind::Vm);
        vm_state::save(&self.vm, self.vcpus.asked(), self.restarts, version, &mut self.scratch)?;
        staging.push_section(StateKind::Vm, 0, &self.scratch);
        for (slot, device) in self.devices.iter().enumerate() {
            self.scratch.clear();
            device.save(&mut self.scratch);
            staging.push_section(StateKind::Device, slot as u16, &self.scratch);
        }
        if let Some(serial) = &self.serial {
            self.scratch.clear();
            serial.save(&mut self.scratch);
            staging.push_section(StateKind::Serial, 0, &self.scratch);
        }
        if self.write_log.mode() == LogMode::Log {
            // With the devices at rest: every write that the guest of this checkpoint can see completed.
            self.write_log.swap(staging.disk_writes_mut());
        }
        if let Some(disks) = self.check_due.take() {
            self.hashes(disks).encode(&mut self.scratch);
            staging.push_section(StateKind::Check, 0, &self.scratch);
        }
        Ok(())
    }

    fn copy_pages(&self, who: Who, gfns: &[Gfn], staging: &mut Outgoing) -> Result<(), CaptureError> {
        let parallel = gfns.len() >= PARALLEL_COPY;
        let filled = staging.fill(gfns, |gfns, to| {
            // SAFETY: `fill` lends room for all of `gfns`, page-aligned, and waits for this closure.
            unsafe { self.vcpus.copy(who, gfns, to, parallel) }
        });
        filled.map_err(CaptureError::NotRam)
    }
}

/// A pause that has begun.
struct Begun {
    was_running: bool,
    /// When the vCPUs were ordered to stop.
    began: Instant,
    /// Until when they may take.
    deadline: Option<Instant>,
}

/// If this whole process was stopped, with this thread, a deadline says nothing about the others. So each wait
/// lasts a moment longer, counted from when this thread runs again.
fn grace() -> Instant {
    Instant::now() + STOP_GRACE
}
