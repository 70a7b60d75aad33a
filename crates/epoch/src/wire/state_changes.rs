//! The state of the open checkpoint, as its changes since the previous checkpoint on the same connection.
//!
//! The rule is the one for pages, in [`codec`](crate::codec): the sender compares with what it last sent on
//! this connection, which is what the reader has. The table of the checkpoint is the previous table, in the
//! same order, with the changes; sections that are not mentioned are unchanged. So both tables have the same
//! sections: if not, all are sent whole, as in the first checkpoint. Kinds that are not kept
//! ([`StateKind::is_kept`]) are sent whole, as sections of their own behind this one.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::encoder::Encoder;
use super::error::{EncodeError, WireError};
use super::fields::Fields;
use super::kind::SectionKind;
use super::version::ProtocolVersion;
use crate::image::limits::{MAX_STATE_SECTIONS, MAX_VCPU_STATE};
use crate::image::{StateBuf, StateKind, StateSection};

/// The payload begins with this; `sections` changed sections follow.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    checkpoint: U64,
    sections: U16,
}

/// A changed section. `runs` runs follow or, if it is [`WHOLE`], the section's version, its length and all
/// its bytes.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Changed {
    kind: U16,
    index: U16,
    runs: U16,
}

/// Changed bytes: `length` bytes follow, for the section's bytes from `at` on.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Run {
    at: U16,
    length: U16,
}

/// The head of a section that is sent whole, because its version or length has changed.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Whole {
    version: U16,
    length: U32,
}

/// Instead of a number of runs.
const WHOLE: u16 = u16::MAX;
/// Most bytes of the payload. If there are more changes, the state is sent whole.
pub(super) const MOST_BYTES: usize = 64 << 10;
/// This many equal bytes between two changes are sent with them: a new run costs as much.
const GAP: usize = size_of::<Run>();
const _: () = assert!(MAX_VCPU_STATE <= u16::MAX as usize + 1);

/// The payload, checked as far as possible without the state that it changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateChanges<'a> {
    /// The checkpoint's number.
    pub checkpoint: u64,
    count: u16,
    sections: &'a [u8],
}

/// What happens to one section.
enum Change<'a> {
    Whole(StateSection<'a>),
    /// The runs, one behind the other.
    Runs {
        count: u16,
        bytes: &'a [u8],
    },
}

/// Why changes cannot be applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChangeError {
    /// The previous state has no such section, or the section comes out of order.
    NoSection(StateKind, u16),
    /// A run is not within its section.
    Outside(StateKind, u16),
}

impl<'a> StateChanges<'a> {
    pub(super) fn parse(payload: &'a [u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(SectionKind::StateChanges, payload);
        let head: &Head = fields.fixed()?;
        let (checkpoint, count) = (head.checkpoint.get(), head.sections.get());
        if usize::from(count) > MAX_STATE_SECTIONS {
            return Err(fields.malformed("more changed sections than there are sections", count.into()));
        }
        let sections = fields.rest();
        let mut fields = Fields::new(SectionKind::StateChanges, sections);
        for _ in 0..count {
            let (kind, _, change) = next(&mut fields)?;
            if !kind.is_kept() {
                return Err(fields.malformed("a change of a state section that is not kept", kind as u64));
            }
            if let Change::Whole(section) = change
                && section.bytes.len() > kind.limit()
            {
                let length = section.bytes.len() as u64;
                return Err(fields.malformed("a state section of more bytes than its kind has", length));
            }
        }
        fields.end()?;
        Ok(Self { checkpoint, count, sections })
    }

    /// Applies the changes to the state of the previous checkpoint. The result goes to the empty `table`.
    pub(crate) fn apply(&self, before: &StateBuf, table: &mut StateBuf) -> Result<(), ChangeError> {
        let mut fields = Fields::new(SectionKind::StateChanges, self.sections);
        // `parse` has read all of them.
        let mut changes = (0..self.count).map_while(|_| next(&mut fields).ok()).peekable();
        for section in before.sections().filter(|section| section.kind.is_kept()) {
            let change = changes.next_if(|(kind, index, _)| (*kind, *index) == (section.kind, section.index));
            match change {
                None => table.push(section),
                Some((_, _, Change::Whole(whole))) => table.push(whole),
                Some((kind, index, Change::Runs { count, bytes })) => {
                    table.push(section);
                    let mut runs = Fields::new(SectionKind::StateChanges, bytes);
                    for _ in 0..count {
                        let Ok((at, bytes)) = run(&mut runs) else { break };
                        if !table.patch_last(at, bytes) {
                            return Err(ChangeError::Outside(kind, index));
                        }
                    }
                }
            }
        }
        match changes.next() {
            Some((kind, index, _)) => Err(ChangeError::NoSection(kind, index)),
            None => Ok(()),
        }
    }
}

/// Reads the next changed section.
fn next<'a>(fields: &mut Fields<'a>) -> Result<(StateKind, u16, Change<'a>), WireError> {
    let changed: &Changed = fields.fixed()?;
    let (number, index) = (changed.kind.get(), changed.index.get());
    let kind = StateKind::from_wire(number)
        .ok_or_else(|| fields.malformed("a state section of an unknown kind", number.into()))?;
    let count = changed.runs.get();
    if count == WHOLE {
        let whole: &Whole = fields.fixed()?;
        let (version, length) = (whole.version.get(), whole.length.get());
        // The payload has no more bytes than its limit, whatever the length says.
        let bytes = fields.bytes(length as usize)?;
        return Ok((kind, index, Change::Whole(StateSection { kind, version, index, bytes })));
    }
    let before = fields.peek();
    for _ in 0..count {
        run(fields)?;
    }
    let bytes = &before[..before.len() - fields.len()];
    Ok((kind, index, Change::Runs { count, bytes }))
}

fn run<'a>(fields: &mut Fields<'a>) -> Result<(usize, &'a [u8]), WireError> {
    let run: &Run = fields.fixed()?;
    let (at, length) = (run.at.get().into(), run.length.get().into());
    Ok((at, fields.bytes(length)?))
}

impl Encoder {
    /// Appends a `StateChanges` section of the open checkpoint that turns `before`, the state of the previous
    /// checkpoint on this connection, into `now`. It stands for all sections of `now` that are kept; the
    /// others must follow whole.
    ///
    /// Returns false, and has appended nothing, if the changes cannot be expressed, or not in fewer bytes, or
    /// not to this peer: then all of `now` must be sent whole.
    ///
    /// # Errors
    /// [`EncodeError::Order`].
    pub fn state_changes(
        &mut self,
        out: &mut Vec<u8>,
        before: &StateBuf,
        now: &StateBuf,
    ) -> Result<bool, EncodeError> {
        self.open("state outside a checkpoint")?;
        let names = |state| kept(state).map(|it| (it.kind, it.index));
        if self.stream() < ProtocolVersion::V4 || before.is_empty() || !names(before).eq(names(now)) {
            return Ok(false);
        }
        let bytes = kept(now).map(|it| it.bytes.len()).sum();
        let mut payload = std::mem::take(&mut self.scratch);
        payload.clear();
        let fits = {
            put(&mut payload, kept(before).zip(kept(now)));
            payload.len() <= MOST_BYTES.min(bytes)
        };
        if fits {
            let number = self.open("state outside a checkpoint")?.add_state(bytes);
            payload[..size_of::<U64>()].copy_from_slice(&number.to_le_bytes());
            self.chained(out, SectionKind::StateChanges, &payload, |_| ());
            out.extend_from_slice(&payload);
        }
        self.scratch = payload;
        Ok(fits)
    }
}

fn kept(state: &StateBuf) -> impl Iterator<Item = StateSection<'_>> {
    state.sections().filter(|section| section.kind.is_kept())
}

/// Writes the payload, except for the checkpoint's number.
fn put<'a>(out: &mut Vec<u8>, pairs: impl Iterator<Item = (StateSection<'a>, StateSection<'a>)>) {
    out.extend_from_slice(Head { checkpoint: U64::ZERO, sections: U16::ZERO }.as_bytes());
    let mut count = 0u16;
    for (before, now) in pairs {
        if before == now {
            continue;
        }
        count += 1;
        let start = out.len();
        let head = |runs: u16| Changed {
            kind: (now.kind as u16).into(),
            index: now.index.into(),
            runs: runs.into(),
        };
        out.extend_from_slice(head(WHOLE).as_bytes());
        if before.version == now.version && before.bytes.len() == now.bytes.len() {
            let runs = put_runs(out, before.bytes, now.bytes);
            if out.len() - start <= size_of::<Changed>() + size_of::<Whole>() + now.bytes.len()
                && runs < WHOLE
            {
                out[start..start + size_of::<Changed>()].copy_from_slice(head(runs).as_bytes());
                continue;
            }
            out.truncate(start + size_of::<Changed>());
        }
        let whole = Whole { version: now.version.into(), length: (now.bytes.len() as u32).into() };
        out.extend_from_slice(whole.as_bytes());
        out.extend_from_slice(now.bytes);
    }
    let at = size_of::<U64>();
    out[at..at + size_of::<U16>()].copy_from_slice(&count.to_le_bytes());
}

/// Writes what differs. Returns the number of runs, at most [`WHOLE`].
fn put_runs(out: &mut Vec<u8>, before: &[u8], now: &[u8]) -> u16 {
    let mut runs = 0u16;
    let mut at = 0;
    while let Some(from) = first_difference(before, now, at) {
        let mut end = from + 1;
        // A difference this near joins the run: a run of its own would cost more.
        while let Some(next) = (end..now.len().min(end + GAP + 1)).find(|&at| before[at] != now[at]) {
            end = next + 1;
        }
        // A section of the greatest length may differ in one byte more than a run can have.
        let end = end.min(from + usize::from(u16::MAX));
        let run = Run { at: (from as u16).into(), length: ((end - from) as u16).into() };
        out.extend_from_slice(run.as_bytes());
        out.extend_from_slice(&now[from..end]);
        runs = runs.saturating_add(1);
        at = end;
    }
    runs
}

/// Where the two, which have the same length, first differ from `at` on.
fn first_difference(before: &[u8], now: &[u8], at: usize) -> Option<usize> {
    const STEP: usize = 64;
    let blocks = before[at..].chunks(STEP).zip(now[at..].chunks(STEP));
    let equal = blocks.take_while(|(before, now)| before == now).count();
    let from = at + equal * STEP;
    (from..now.len()).find(|&at| before[at] != now[at])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table(sections: &[(StateKind, u16, Vec<u8>)]) -> StateBuf {
        let mut table = StateBuf::default();
        let sections = sections.iter().enumerate();
        sections.for_each(|(index, (kind, version, bytes))| {
            table.push(StateSection { kind: *kind, version: *version, index: index as u16, bytes })
        });
        table
    }

    /// Applies to `before` the changes that turn it into `now`; None if they cannot be expressed.
    fn changed(before: &StateBuf, now: &StateBuf) -> Option<(StateBuf, usize)> {
        let mut encoder = Encoder::speaking(ProtocolVersion::V4);
        let mut out = Vec::new();
        let (state_bytes, flags) = (now.len() as u32, Default::default());
        let begin =
            crate::CheckpointBegin { generation: 1, number: 7, pages: 0, state_bytes, disk_bytes: 0, flags };
        encoder.checkpoint_begin(&mut out, &begin).unwrap();
        out.clear();
        if !encoder.state_changes(&mut out, before, now).unwrap() {
            assert!(out.is_empty());
            return None;
        }
        let changes = StateChanges::parse(&out[crate::HEADER_LEN..]).unwrap();
        assert_eq!(changes.checkpoint, 7);
        let mut table = StateBuf::default();
        changes.apply(before, &mut table).unwrap();
        Some((table, out.len()))
    }

    fn same(one: &StateBuf, other: &StateBuf) -> bool {
        one.sections().eq(other.sections())
    }

    #[test]
    fn an_idle_vcpu_costs_some_bytes() {
        let mut vcpu = vec![3; 7000];
        let before = table(&[(StateKind::Vcpu, 1, vcpu.clone()), (StateKind::Vm, 1, vec![1; 1800])]);
        let (copy, bytes) = changed(&before, &before).unwrap();
        assert!(same(&copy, &before));
        assert_eq!(bytes, crate::HEADER_LEN + 10);
        vcpu[6000..6005].copy_from_slice(&[1, 2, 4, 5, 6]);
        let now = table(&[(StateKind::Vcpu, 1, vcpu), (StateKind::Vm, 1, vec![1; 1800])]);
        let (copy, bytes) = changed(&before, &now).unwrap();
        assert!(same(&copy, &now));
        assert_eq!(bytes, crate::HEADER_LEN + 10 + 6 + 4 + 5);
    }

    #[test]
    fn other_sections_are_no_changes() {
        let one = table(&[(StateKind::Vcpu, 1, vec![1; 90])]);
        let two = table(&[(StateKind::Vcpu, 1, vec![1; 90]), (StateKind::Vm, 1, vec![1; 90])]);
        assert!(changed(&one, &two).is_none() && changed(&two, &one).is_none());
        assert!(changed(&StateBuf::default(), &one).is_none());
        // Kinds that are not kept do not matter.
        let check = table(&[(StateKind::Vcpu, 1, vec![1; 90]), (StateKind::Check, 1, vec![1; 9])]);
        assert!(same(&changed(&check, &one).unwrap().0, &one));
        assert!(same(&changed(&one, &check).unwrap().0, &one));
    }

    #[test]
    fn the_longest_section_may_change_altogether() {
        let before = table(&[(StateKind::Vcpu, 1, vec![0; 1 << 16]), (StateKind::Vcpu, 1, vec![5; 1 << 16])]);
        let now = table(&[(StateKind::Vcpu, 1, vec![1; 1 << 16]), (StateKind::Vcpu, 1, vec![5; 1 << 16])]);
        assert!(changed(&before, &now).is_none(), "more than a section may have");
        let mut bytes = vec![0; 1 << 16];
        bytes[1 << 15..].fill(1);
        let now = table(&[(StateKind::Vcpu, 1, bytes), (StateKind::Vcpu, 1, vec![5; 1 << 16])]);
        assert!(same(&changed(&before, &now).unwrap().0, &now));
    }

    fn sections() -> impl Strategy<Value = Vec<(StateKind, u16, Vec<u8>)>> {
        let kind = prop_oneof![Just(StateKind::Vcpu), Just(StateKind::Vm), Just(StateKind::Device)];
        let bytes = proptest::collection::vec(any::<u8>(), 0..300);
        proptest::collection::vec((kind, 1..3u16, bytes), 1..5)
    }

    proptest! {
        #[test]
        fn changes_make_of_the_state_before_the_one_after(
            before in sections(),
            edits in proptest::collection::vec((0..5usize, 0..300usize, any::<u8>()), 0..30),
            longer in proptest::option::of(0..5usize),
        ) {
            let mut now = before.clone();
            for (section, at, byte) in edits {
                if let Some(to) = now.get_mut(section).and_then(|(.., bytes)| bytes.get_mut(at)) {
                    *to = byte;
                }
            }
            if let Some((_, version, bytes)) = longer.and_then(|section| now.get_mut(section)) {
                *version += 1;
                bytes.push(7);
            }
            let (before, now) = (table(&before), table(&now));
            if let Some((copy, _)) = changed(&before, &now) {
                prop_assert!(same(&copy, &now));
            }
        }

        #[test]
        fn any_bytes_change_a_state_or_are_refused(
            before in sections(),
            kind in 0..8u16,
            bytes in proptest::collection::vec(any::<u8>(), 0..80),
            runs in prop_oneof![0..4u16, Just(WHOLE)],
        ) {
            let before = table(&before);
            // A head that parses up to the runs, and anything behind it.
            let mut payload = vec![7, 0, 0, 0, 0, 0, 0, 0, 1, 0];
            payload.extend(kind.to_le_bytes());
            payload.extend([0, 0]);
            payload.extend(runs.to_le_bytes());
            payload.extend(&bytes);
            for payload in [&payload[..], &bytes] {
                if let Ok(changes) = StateChanges::parse(payload) {
                    let mut table = StateBuf::default();
                    if changes.apply(&before, &mut table).is_ok() {
                        prop_assert_eq!(table.sections().len(), before.sections().len());
                    }
                }
            }
        }
    }
}
