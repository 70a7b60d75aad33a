//! The frame tail at the standby: copies of frames that no checkpoint has, until they are committed, have left, or
//! are used by a takeover.
//!
//! Best effort and bounded. What finds no room is not kept; TCP sends it again after its timer.

use std::sync::{Mutex, MutexGuard, PoisonError};

use outlive_epoch::{TailFrame, TailFrames};
use outlive_machine::{Frame, FrameRing, OutputLimits};
use outlive_pair::TailUse;

use crate::strays::Sink;

/// How much is kept in each direction: several epochs of what a primary copies at most.
const KEPT: OutputLimits = OutputLimits { frames: 1024, bytes: 1 << 20 };
const NOTHING: OutputLimits = OutputLimits { frames: 0, bytes: 0 };

/// Gives the running guest a frame: its queue pair, and the packet.
type Give = dyn FnMut(u16, &[u8]) + Send;

/// The tail of one session; see the module. Its lock is held for moments only, except by the takeover, after which
/// nobody wants it. Nothing is freed under it.
pub(super) struct Tail(Mutex<Kept>);

struct Kept {
    /// By epoch, which never goes back.
    input: FrameRing<u64>,
    output: FrameRing<u64>,
    /// Frames that reached the primary's host when the guest was gone from there.
    strays: FrameRing<()>,
    /// The guest runs here: it is given strays as they come.
    guest: Option<Box<Give>>,
    /// The newest committed checkpoint.
    committed: u64,
}

impl Tail {
    /// An empty tail, which keeps nothing if it is not wanted.
    pub(super) fn new(wanted: bool) -> Self {
        let limits = if wanted { KEPT } else { NOTHING };
        let (input, output) = (FrameRing::new(limits), FrameRing::new(limits));
        Self(Mutex::new(Kept { input, output, strays: FrameRing::new(limits), guest: None, committed: 0 }))
    }

    /// The guest was given these frames. Those that find no room are left out: the ones before them are needed
    /// first.
    pub(super) fn input(&self, frames: &TailFrames<'_>) {
        let mut kept = self.kept();
        for TailFrame { epoch, pair, packet } in frames.iter() {
            let newest = kept.input.newest().unwrap_or(0).max(kept.committed.saturating_add(1));
            // Copies of committed epochs come too late.
            if epoch >= newest {
                let _ = kept.input.push(epoch, pair, packet);
            }
        }
    }

    /// The guest has sent these frames, in the epoch of the checkpoint that is about to end. The oldest ones make
    /// room: they are the most likely ones to have left.
    pub(super) fn output(&self, frames: &TailFrames<'_>) {
        let mut kept = self.kept();
        for TailFrame { epoch, pair, packet } in frames.iter() {
            if epoch < kept.output.newest().unwrap_or(0) {
                continue;
            }
            while !kept.output.push(epoch, pair, packet) && !kept.output.is_empty() {
                kept.output.pop();
            }
        }
    }

    /// This checkpoint is acknowledged: it has the input of its epoch and of all before.
    pub(super) fn committed(&self, checkpoint: u64) {
        let mut kept = self.kept();
        kept.committed = kept.committed.max(checkpoint);
        drop_through(&mut kept.input, checkpoint);
    }

    /// Output has left through this epoch.
    pub(super) fn released(&self, through: u64) {
        drop_through(&mut self.kept().output, through);
    }

    /// Uses the frames for a takeover, each once and in their order: `repeat` sends one again, `give` gives one to
    /// the guest. Returns for how many each has said that it was done.
    pub(super) fn spend(
        &self,
        by: TailUse,
        mut repeat: impl FnMut(Frame<'_, u64>) -> bool,
        mut give: impl FnMut(Frame<'_, u64>) -> bool,
    ) -> Spent {
        let mut kept = self.kept();
        let output_repeated =
            kept.output.iter().filter(|it| by.repeats(it.label)).filter(|it| repeat(*it)).count();
        let input_given = kept.input.iter().filter(|it| by.gives(it.label)).filter(|it| give(*it)).count();
        let late = kept
            .strays
            .iter()
            .filter(|it| give(Frame { label: 0, pair: it.pair, packet: it.packet }))
            .count();
        kept.output.clear();
        kept.input.clear();
        kept.strays.clear();
        Spent { input_given: (input_given + late) as u64, output_repeated: output_repeated as u64 }
    }

    /// The guest runs here: `give` gives it the strays that still come.
    pub(super) fn follow(&self, mut give: impl FnMut(u16, &[u8]) + Send + 'static) {
        let mut kept = self.kept();
        while let Some(stray) = kept.strays.front() {
            give(stray.pair, stray.packet);
            kept.strays.pop();
        }
        kept.guest = Some(Box::new(give));
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sink for Tail {
    fn stray(&self, pair: u16, packet: &[u8]) {
        let mut kept = self.kept();
        match &mut kept.guest {
            Some(give) => give(pair, packet),
            // The first ones are what clients wait for.
            None => drop(kept.strays.push((), pair, packet)),
        }
    }
}

/// What a takeover has used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Spent {
    /// Frames that the guest is given.
    pub(super) input_given: u64,
    /// Frames that are sent again.
    pub(super) output_repeated: u64,
}

fn drop_through(frames: &mut FrameRing<u64>, epoch: u64) {
    while frames.front().is_some_and(|front| front.label <= epoch) {
        frames.pop();
    }
}

#[cfg(test)]
mod tests {
    use outlive_epoch::{Encoder, HEADER_LEN, Message, ProtocolVersion, SectionKind, TailBuf};

    use super::*;

    /// Hands frames in as they come over the link.
    fn hear(tail: &Tail, kind: SectionKind, frames: &[(u64, &[u8])]) {
        let mut buffer = TailBuf::default();
        for &(epoch, packet) in frames {
            assert!(buffer.push(TailFrame { epoch, pair: 0, packet }));
        }
        let (mut out, mut encoder) = (Vec::new(), Encoder::speaking(ProtocolVersion::CURRENT));
        match kind {
            SectionKind::Input => encoder.input(&mut out, &buffer).unwrap(),
            _ => encoder.output(&mut out, &buffer).unwrap(),
        }
        match Message::parse_payload(kind, 1, &out[HEADER_LEN..]).unwrap() {
            Message::Input(frames) => tail.input(&frames),
            Message::Output(frames) => tail.output(&frames),
            other => panic!("{other:?}"),
        }
    }

    /// First bytes of what is repeated and of what is given.
    fn spend(tail: &Tail, committed: u64, released: u64) -> (Vec<u8>, Vec<u8>) {
        let (mut repeated, mut given) = (Vec::new(), Vec::new());
        let spent = tail.spend(
            TailUse::at(committed, released),
            |frame| {
                repeated.push(frame.packet[0]);
                true
            },
            |frame| {
                given.push(frame.packet[0]);
                true
            },
        );
        assert_eq!((spent.output_repeated, spent.input_given), (repeated.len() as u64, given.len() as u64));
        (repeated, given)
    }

    #[test]
    fn a_takeover_uses_each_frame_once_and_in_order() {
        let tail = Tail::new(true);
        hear(&tail, SectionKind::Input, &[(11, b"a"), (11, b"b"), (12, b"c")]);
        hear(&tail, SectionKind::Output, &[(11, b"A"), (11, b"B")]);
        tail.committed(11);
        hear(&tail, SectionKind::Input, &[(11, b"x"), (12, b"d"), (13, b"e")]);
        hear(&tail, SectionKind::Output, &[(12, b"C")]);
        tail.committed(12);
        tail.released(11);
        hear(&tail, SectionKind::Output, &[(13, b"D")]);
        hear(&tail, SectionKind::Input, &[(14, b"f"), (13, b"y")]);
        assert_eq!(spend(&tail, 12, 11), (b"C".to_vec(), b"ef".to_vec()));
        assert_eq!(spend(&tail, 0, 0), Default::default(), "nothing is left");
    }

    /// The decision does not depend on what was thrown away before.
    #[test]
    fn what_is_still_there_is_judged_again() {
        let tail = Tail::new(true);
        hear(&tail, SectionKind::Input, &[(11, b"a"), (12, b"b"), (13, b"c")]);
        hear(&tail, SectionKind::Output, &[(11, b"A"), (12, b"B"), (13, b"C")]);
        assert_eq!(spend(&tail, 12, 11), (b"B".to_vec(), b"c".to_vec()));
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let tail = Tail::new(true);
        let packet = |number: u64| [&[number as u8][..], &vec![0; 1513]].concat();
        for epoch in 1..3000 {
            hear(&tail, SectionKind::Input, &[(epoch, &packet(epoch))]);
            hear(&tail, SectionKind::Output, &[(epoch, &packet(epoch))]);
        }
        let (repeated, given) = spend(&tail, 1500, 0);
        assert!(given.is_empty(), "there is room for the first ones, and those are committed");
        assert!(repeated.is_empty(), "there is room for the last ones, and those are not committed");
        let off = Tail::new(false);
        hear(&off, SectionKind::Input, &[(1, b"a")]);
        hear(&off, SectionKind::Output, &[(1, b"A")]);
        assert_eq!(spend(&off, 0, 0), Default::default());
        assert_eq!(spend(&off, 1, 0), Default::default());
    }
}
