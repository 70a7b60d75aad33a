//! What one client knows about its own writes, and how it judges the server's answers.
//!
//! Every write is either *acknowledged* (its reply came) or *open* (it was sent, no reply yet). An
//! acknowledged write must be there forever; an open one may be there once or not at all. Each client writes
//! only its own keys, one request at a time, so every question has exactly one right answer.

/// Number of keys that a client writes in turn. It bounds the guest's memory and this ledger.
pub(super) const SLOTS: usize = 500;
/// How many findings are described in words; the others are only counted.
const FINDINGS: usize = 5;

/// One key of a client.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    /// Sequence number of the last acknowledged write; 0 before the first.
    acked: u64,
    /// Whether a loss here has been counted already.
    written_off: bool,
}

/// What is wrong, counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Damage {
    /// Acknowledged writes that are not there.
    pub(super) lost: u64,
    /// Writes that took effect more often than they were sent.
    pub(super) duplicated: u64,
    /// The first few, in words.
    pub(super) findings: Vec<String>,
}

impl Damage {
    fn lost(&mut self, count: u64, finding: String) {
        self.lost += count;
        self.find(finding);
    }

    fn duplicated(&mut self, count: u64, finding: String) {
        self.duplicated += count;
        self.find(finding);
    }

    fn find(&mut self, finding: String) {
        if self.findings.len() < FINDINGS {
            self.findings.push(finding);
        }
    }

    /// Adds another client's damage.
    pub(super) fn add(&mut self, other: &Damage) {
        self.lost += other.lost;
        self.duplicated += other.duplicated;
        let room = FINDINGS.saturating_sub(self.findings.len());
        self.findings.extend(other.findings.iter().take(room).cloned());
    }
}

/// The bookkeeping of one client.
#[derive(Clone, Debug)]
pub(super) struct Ledger {
    client: u32,
    /// Value of the counter after the last acknowledged INCR.
    counter: u64,
    counter_open: bool,
    slots: Vec<Slot>,
    /// Sequence number of the last SET sent.
    sequence: u64,
    set_open: bool,
    /// Acknowledged writes of both kinds.
    pub(super) acked: u64,
    /// What was noticed so far.
    pub(super) damage: Damage,
}

impl Ledger {
    pub(super) fn new(client: u32) -> Self {
        Self {
            client,
            counter: 0,
            counter_open: false,
            slots: vec![Slot::default(); SLOTS],
            sequence: 0,
            set_open: false,
            acked: 0,
            damage: Damage::default(),
        }
    }

    /// The key of this client's counter.
    pub(super) fn counter_key(&self) -> String {
        format!("c{}:counter", self.client)
    }

    /// The key of a slot.
    pub(super) fn slot_key(&self, slot: usize) -> String {
        format!("c{}:{slot:04}", self.client)
    }

    /// The value that write `sequence` puts into its slot: it says who wrote it and when.
    fn value(&self, sequence: u64) -> String {
        format!("client {} write {sequence:012} {:->32}", self.client, "")
    }

    /// Call before sending INCR.
    pub(super) fn increment_sent(&mut self) {
        self.counter_open = true;
    }

    /// INCR was answered with `value`, which must be the one after the last.
    pub(super) fn increment_acked(&mut self, value: i64) {
        let (value, due) = (u64::try_from(value).unwrap_or(0), self.counter + 1);
        let client = self.client;
        if value < due {
            self.damage.lost(due - value, format!("client {client}: INCR gave {value}, {due} was due"));
        } else if value > due {
            self.damage.duplicated(value - due, format!("client {client}: INCR gave {value}, {due} was due"));
        }
        // Continue from the server's value, so that one loss is counted once.
        self.counter = value;
        self.counter_open = false;
        self.acked += 1;
    }

    /// The next SET: its key and value. Call before sending it.
    pub(super) fn set_sent(&mut self) -> (String, String) {
        self.sequence += 1;
        self.set_open = true;
        (self.slot_key(slot_of(self.sequence)), self.value(self.sequence))
    }

    /// The SET was answered with OK.
    pub(super) fn set_acked(&mut self) {
        self.slots[slot_of(self.sequence)] = Slot { acked: self.sequence, written_off: false };
        self.set_open = false;
        self.acked += 1;
    }

    /// Judges what the server has in a slot.
    pub(super) fn judge_slot(&mut self, slot: usize, found: Option<&[u8]>) {
        let Slot { acked, written_off } = self.slots[slot];
        let open = self.set_open && slot == slot_of(self.sequence);
        let right = match found {
            None => acked == 0,
            Some(found) => {
                (acked > 0 && found == self.value(acked).as_bytes())
                    || (open && found == self.value(self.sequence).as_bytes())
            }
        };
        if right || written_off {
            return;
        }
        self.slots[slot].written_off = true;
        let found = found.map_or("nothing".into(), |f| String::from_utf8_lossy(f).into_owned());
        let key = self.slot_key(slot);
        self.damage.lost(1, format!("{key} holds \"{found}\", write {acked} was acknowledged"));
    }

    /// Judges the counter as it is read back at the end.
    pub(super) fn judge_counter(&mut self, found: Option<&[u8]>) {
        let (client, acked) = (self.client, self.counter);
        let most = acked + u64::from(self.counter_open);
        let value = match found {
            None => Some(0),
            Some(found) => std::str::from_utf8(found).ok().and_then(|t| t.parse::<u64>().ok()),
        };
        match value {
            Some(value) if value < acked => self.damage.lost(
                acked - value,
                format!("client {client}: the counter is {value}, {acked} was acknowledged"),
            ),
            Some(value) if value > most => self.damage.duplicated(
                value - most,
                format!("client {client}: the counter is {value}, {most} increments were sent"),
            ),
            Some(_) => {}
            None => self.damage.lost(acked, format!("client {client}: the counter is not a number")),
        }
    }
}

fn slot_of(sequence: u64) -> usize {
    // The remainder is below SLOTS.
    (sequence % SLOTS as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(increments: i64, sets: u64) -> Ledger {
        let mut ledger = Ledger::new(3);
        for value in 1..=increments {
            ledger.increment_sent();
            ledger.increment_acked(value);
        }
        for _ in 0..sets {
            ledger.set_sent();
            ledger.set_acked();
        }
        ledger
    }

    fn counts(ledger: &Ledger) -> (u64, u64) {
        (ledger.damage.lost, ledger.damage.duplicated)
    }

    #[test]
    fn a_faithful_server_does_no_damage() {
        let mut ledger = after(7, 2 * SLOTS as u64 + 3);
        ledger.judge_counter(Some(b"7"));
        for slot in 0..SLOTS {
            let sequence = if slot <= 3 { 2 * SLOTS } else { SLOTS } + slot;
            let value = ledger.value(sequence as u64);
            ledger.judge_slot(slot, Some(value.as_bytes()));
        }
        assert_eq!(ledger.damage, Damage::default());
        assert_eq!(ledger.acked, 7 + 2 * SLOTS as u64 + 3);
    }

    #[test]
    fn a_wrong_counter_reply_is_counted_once() {
        let mut ledger = after(7, 0);
        ledger.increment_acked(7);
        assert_eq!(counts(&ledger), (1, 0), "7 came twice: the increment before was lost");
        ledger.increment_acked(8);
        ledger.increment_acked(10);
        assert_eq!(counts(&ledger), (1, 1), "9 was left out: an increment took effect twice");
        ledger.judge_counter(Some(b"10"));
        assert_eq!(counts(&ledger), (1, 1));
        assert_eq!(ledger.damage.findings.len(), 2);
    }

    #[test]
    fn the_counter_at_the_end_is_exact() {
        for (found, damage) in [(&b"6"[..], (1, 0)), (b"7", (0, 0)), (b"8", (0, 1)), (b"x", (7, 0))] {
            let mut ledger = after(7, 0);
            ledger.judge_counter(Some(found));
            assert_eq!(counts(&ledger), damage, "{found:?}");
        }
        let mut ledger = after(7, 0);
        ledger.judge_counter(None);
        assert_eq!(counts(&ledger), (7, 0));
    }

    #[test]
    fn an_open_increment_may_count_once_or_not() {
        for (found, damage) in [(&b"7"[..], (0, 0)), (b"8", (0, 0)), (b"9", (0, 1))] {
            let mut ledger = after(7, 0);
            ledger.increment_sent();
            ledger.judge_counter(Some(found));
            assert_eq!(counts(&ledger), damage, "{found:?}");
        }
    }

    #[test]
    fn a_missing_old_or_foreign_value_is_a_loss_counted_once() {
        let old = Ledger::new(3).value(5);
        let foreign = Ledger::new(4).value(5 + SLOTS as u64);
        for found in [None, Some(old.as_bytes()), Some(foreign.as_bytes()), Some(&b"junk"[..])] {
            let mut ledger = after(0, SLOTS as u64 + 5);
            ledger.judge_slot(5, found);
            ledger.judge_slot(5, found);
            assert_eq!(counts(&ledger), (1, 0), "{found:?}");
        }
    }

    #[test]
    fn an_open_set_may_be_there_or_not() {
        let mut ledger = after(0, SLOTS as u64 + 4);
        let (key, open) = ledger.set_sent();
        assert_eq!(key, ledger.slot_key(5));
        let acked = ledger.value(5);
        ledger.judge_slot(5, Some(open.as_bytes()));
        ledger.judge_slot(5, Some(acked.as_bytes()));
        assert_eq!(counts(&ledger), (0, 0));
        ledger.judge_slot(5, None);
        assert_eq!(counts(&ledger), (1, 0), "but the acknowledged one before it may not vanish");
    }

    #[test]
    fn a_value_nobody_wrote_is_noticed() {
        let mut ledger = after(0, 0);
        ledger.judge_slot(5, Some(b"ghost"));
        assert_eq!(counts(&ledger), (1, 0));
    }
}
