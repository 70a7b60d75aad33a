//! The read-back at the end: how much of what was acknowledged is still there.

use std::net::SocketAddr;
use std::time::Duration;

use super::client::{ClientError, Connection};
use super::ledger::{Damage, Ledger, SLOTS};
use super::load::Report;

/// How many keys one command asks for.
const BATCH: usize = 50;

/// The outcome of the read-back over all clients.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    /// Acknowledged writes of all clients.
    pub(super) acked: u64,
    /// What is wrong.
    pub(super) damage: Damage,
    /// Why nothing could be read back, if so; then everything that was acknowledged counts as lost.
    pub(super) unreadable: Option<String>,
}

/// Reads every key of every client over a new connection and judges it; adds what the clients noticed before.
pub(super) fn verify(addr: SocketAddr, reports: &mut [Report], patience: Duration) -> Verdict {
    let mut verdict = Verdict { acked: reports.iter().map(|r| r.ledger.acked).sum(), ..Verdict::default() };
    if let Err(error) = read_back(addr, reports, patience) {
        verdict.damage.lost = verdict.acked;
        verdict.unreadable = Some(error.to_string());
        return verdict;
    }
    for report in reports {
        verdict.damage.add(&report.ledger.damage);
    }
    verdict
}

fn read_back(addr: SocketAddr, reports: &mut [Report], patience: Duration) -> Result<(), ClientError> {
    let mut connection = Connection::open(addr, patience, patience)?;
    for report in reports {
        read_client(&mut connection, &mut report.ledger)?;
    }
    Ok(())
}

fn read_client(connection: &mut Connection, ledger: &mut Ledger) -> Result<(), ClientError> {
    let counter = connection.get(&ledger.counter_key())?;
    ledger.judge_counter(counter.as_deref());
    let slots: Vec<usize> = (0..SLOTS).collect();
    for batch in slots.chunks(BATCH) {
        let keys: Vec<String> = batch.iter().map(|&slot| ledger.slot_key(slot)).collect();
        for (&slot, value) in batch.iter().zip(connection.get_many(&keys)?) {
            ledger.judge_slot(slot, value.as_deref());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::super::fake::{FakeServer, Fault};
    use super::super::load::Load;
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    fn judged(fault: Fault) -> Verdict {
        let server = FakeServer::start(fault);
        let load = Load::start(server.addr(), 2, 100_000).unwrap();
        thread::sleep(Duration::from_millis(200));
        let mut reports = load.stop(SOON);
        verify(server.addr(), &mut reports, SOON)
    }

    #[test]
    fn a_faithful_server_is_acquitted() {
        let verdict = judged(Fault::None);
        assert!(verdict.acked > 100, "{verdict:?}");
        assert_eq!((verdict.damage, verdict.unreadable), (Damage::default(), None));
    }

    #[test]
    fn a_lost_set_is_noticed() {
        let server = FakeServer::start(Fault::LoseSet(3));
        let mut ledger = Ledger::new(0);
        let mut connection = Connection::open(server.addr(), SOON, SOON).unwrap();
        for _ in 0..10 {
            let (key, value) = ledger.set_sent();
            connection.set(&key, &value).unwrap();
            ledger.set_acked();
        }
        read_client(&mut connection, &mut ledger).unwrap();
        assert_eq!((ledger.damage.lost, ledger.damage.duplicated), (1, 0));
    }

    #[test]
    fn a_lost_and_a_repeated_increment_are_noticed() {
        let verdict = judged(Fault::LoseIncrement(20));
        assert_eq!((verdict.damage.lost, verdict.damage.duplicated), (1, 0), "{verdict:?}");
        let verdict = judged(Fault::RepeatIncrement(20));
        assert_eq!((verdict.damage.lost, verdict.damage.duplicated), (0, 1), "{verdict:?}");
    }

    #[test]
    fn the_last_increment_is_judged_by_the_read_back_alone() {
        for (fault, damage) in [(Fault::LoseIncrement(5), (1, 0)), (Fault::RepeatIncrement(5), (0, 1))] {
            let server = FakeServer::start(fault);
            let mut report = Report::new(0);
            let ledger = &mut report.ledger;
            let mut connection = Connection::open(server.addr(), SOON, SOON).unwrap();
            for _ in 0..5 {
                ledger.increment_sent();
                ledger.increment_acked(connection.increment(&ledger.counter_key()).unwrap());
            }
            assert_eq!(ledger.damage, Damage::default(), "the replies looked right");
            let verdict = verify(server.addr(), &mut [report], SOON);
            assert_eq!((verdict.damage.lost, verdict.damage.duplicated), damage, "{fault:?}");
        }
    }

    #[test]
    fn a_dead_server_has_lost_everything() {
        let verdict = judged(Fault::HangUpAfter(50));
        assert!(verdict.unreadable.is_some() && verdict.acked > 0);
        assert_eq!(verdict.damage.lost, verdict.acked);
    }
}
