//! From the copy to the running VM.
//!
//! The order and its reasons: the generation is won before anything here runs (invariant 3). The lost
//! primary is fenced before anything of the VM is touched. State is restored and devices are wired while the
//! vCPUs are stopped. Output is opened before the vCPUs run, so that the first frame is not dropped. Queues
//! are kicked and the network is told where the VM went before the vCPUs run, because a notification that was
//! under way when the primary died is in no checkpoint.
//!
//! The frame tail comes between the two: what may not have left the primary is in the output before the guest can
//! send anything, and what died with the primary is in the card before the card looks at this host's tap. Behind it come
//! the strays (`strays/`): frames for the guest that have reached its old host since.

use std::sync::Arc;
use std::time::Instant;

use outlive_epoch::Moment;
use outlive_machine::{Machine, RestoreError};
use outlive_pair::TakeOver;

use super::copy::VmCopy;
use super::decisions::Equipment;
use super::fence::{Stop, fence};
use super::notes::Times;
use super::tail::{Spent, Tail};
use crate::disk::ReplicaEndError;
use crate::events::Event;
use crate::vm::{Launch, Stops};

/// Why the VM cannot run here, although its generation is won.
#[derive(Debug, thiserror::Error)]
pub(super) enum TakeoverError {
    /// The copy was thrown away.
    #[error("there is no copy of the VM")]
    NoCopy,
    /// Its disks are not at the last commit.
    #[error(transparent)]
    Disks(#[from] ReplicaEndError),
    /// Its state does not fit.
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

/// A takeover that was won.
pub(super) struct Won {
    /// The decision.
    pub(super) order: TakeOver,
    /// The times of its steps.
    pub(super) times: Times,
    /// What came of the guest's frames.
    pub(super) frames: Arc<Tail>,
}

/// Restores and resumes the VM.
///
/// # Errors
/// See [`TakeoverError`].
pub(super) fn take_over(
    mut copy: VmCopy,
    won: Won,
    equipment: &Equipment,
    stops: &Stops,
) -> Result<Launch, TakeoverError> {
    let Won { order: TakeOver { checkpoint, generation, handed, tail, stop, .. }, times, frames } = won;
    let Equipment { options, console, events, .. } = equipment;
    if let Some(command) = options.active.fence() {
        let about = copy.about(generation, equipment.standing.peer_address());
        // It cannot end: its memory is the only copy of the VM. An order to stop is for the VM once it runs.
        let stop = || if stops.was_used() { Stop::Later } else { Stop::No };
        fence(&command, &about, events, &equipment.standing, stop);
    }
    // The record ends at the last commit: the guest is about to write to what its base may still be copied from, which is
    // of no use then. Nobody waits for that.
    if let Some(record) = copy.end_record() {
        record.taken_over();
    }
    // The guest may write to its disks only when the copy has nothing left to write.
    copy.disks().become_primary(generation)?;
    // Before anything can write to memory, the restore among it: the old host keeps it, and needs what follows.
    let since = (handed && know_writes(copy.machine()))
        .then_some(Moment { generation: generation.saturating_sub(1), checkpoint });
    copy.restore()?;
    let machine = copy.machine();
    if let Some(net) = machine.net() {
        let told = events.clone();
        net.output().on_first_frame(move || {
            let after_us = times.declared.elapsed().as_micros() as u64;
            told.emit(Event::FirstPacket { after_us });
        });
    }
    machine.valve().open();
    let spent = machine.net().map_or(Spent::default(), |net| {
        frames.spend(tail, |it| net.repeat(it.pair, it.packet), |it| net.give(it.pair, it.packet))
    });
    machine.go_live(true);
    // What is repeated. An answer to it is not thrown away any more, as what waited in the tap is.
    machine.valve().drain();
    machine.resume();
    if let Some((net, strays)) = machine.net().zip(equipment.strays.as_ref()) {
        let guest = Arc::downgrade(net);
        frames.follow(move |pair, packet| {
            // One that is not taken is lost, as in any network.
            let _ = guest.upgrade().is_some_and(|net| net.give_stray(pair, packet));
        });
        strays.runs_here(frames);
    }
    let running = Instant::now();
    let micros =
        |later: Instant, earlier: Instant| later.saturating_duration_since(earlier).as_micros() as u64;
    let detect_us = times.detect.as_micros() as u64;
    let settle_us = micros(times.settled, times.declared);
    let arbitrate_us = micros(times.won, times.settled);
    let restore_us = micros(running, times.won);
    let total_us = detect_us + settle_us + arbitrate_us + restore_us;
    events.emit(Event::Takeover {
        generation,
        checkpoint,
        detect_us,
        settle_us,
        arbitrate_us,
        restore_us,
        first_packet_us: None,
        total_us,
        input_given: spent.input_given,
        output_repeated: spent.output_repeated,
    });
    tracing::warn!(
        generation,
        checkpoint,
        detect_us,
        settle_us,
        arbitrate_us,
        restore_us,
        input_given = spent.input_given,
        output_repeated = spent.output_repeated,
        "TAKEN OVER: the VM runs here, unprotected"
    );
    let sidecars = Some(copy.disks().sidecars());
    let parts = copy.into_parts(generation, checkpoint);
    Ok(Launch {
        machine: parts.machine,
        machine_events: parts.machine_events,
        stops: stops.clone(),
        identity: parts.identity,
        arbiter: Some(parts.arbiter),
        place: Some(options.arbiter.clone()),
        watch: Some(equipment.watch.clone()),
        options: options.active.clone(),
        sidecars,
        events: events.clone(),
        stop,
        console: console.clone(),
        uplink: equipment.uplink.clone(),
        standing: equipment.standing.clone(),
        books: equipment.books.clone(),
        since,
        last_host_ended: times.ended && !handed,
        shelf: equipment.shelf.clone(),
    })
}

/// From now on each write to memory is known. Without that the VM runs as well, and its next standby gets a whole copy.
fn know_writes(machine: &mut Machine) -> bool {
    let begun = machine.enable_tracking();
    machine.tracker().set_heating(false);
    begun.inspect_err(|error| tracing::warn!(%error, "the next standby gets a whole copy")).is_ok()
}
