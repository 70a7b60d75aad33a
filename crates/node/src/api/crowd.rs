//! Connections from the network, and room for few of them: so many that have not shown a certificate yet, and so many
//! that have, of one certificate's name and in all.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::AbortHandle;

use crate::remote::{Access, Visitor};

/// How many strangers there may be.
const STRANGERS: usize = 64;
/// How many of one address.
const OF_ADDRESS: usize = 16;
/// How many known clients there may be.
const KNOWN: usize = 64;
/// How many of these only operators take: a host that fills the rest keeps no operator out.
const OF_OPERATORS: usize = 16;
/// How many of one name.
pub(super) const OF_NAME: usize = 16;

/// Connections that have not shown a certificate, the oldest first. A client needs some milliseconds for that, and a
/// stranger that says nothing has been here for longer: the oldest goes for the next.
#[derive(Debug, Default)]
pub(super) struct Strangers(Mutex<Line>);

#[derive(Debug, Default)]
struct Line {
    all: VecDeque<Stranger>,
    last: u64,
}

#[derive(Debug)]
struct Stranger {
    number: u64,
    from: IpAddr,
    task: AbortHandle,
}

impl Strangers {
    /// Takes one in. `begin` starts what meets it. Returns whether another one had to go.
    pub(super) fn enter(&self, from: IpAddr, begin: impl FnOnce(u64) -> AbortHandle) -> bool {
        let mut line = lock(&self.0);
        let of_address = line.all.iter().filter(|it| it.from == from).count();
        let goes = if of_address >= OF_ADDRESS {
            line.all.iter().position(|it| it.from == from)
        } else {
            (line.all.len() >= STRANGERS).then_some(0)
        };
        let gone = goes.and_then(|at| line.all.remove(at));
        gone.iter().for_each(|it| it.task.abort());
        line.last += 1;
        let number = line.last;
        // Under the lock, so that it cannot leave before it is here.
        line.all.push_back(Stranger { number, from, task: begin(number) });
        gone.is_some()
    }

    /// It has gone, or is no stranger any more.
    pub(super) fn leave(&self, number: u64) {
        lock(&self.0).all.retain(|it| it.number != number);
    }
}

/// Clients that have shown a certificate.
#[derive(Debug, Default)]
pub(super) struct Guests(Mutex<BTreeMap<String, usize>>);

/// A place for one, until this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    guests: Arc<Guests>,
    name: String,
}

impl Guests {
    /// A place for this client, if there is one.
    pub(super) fn seat(self: &Arc<Self>, Visitor { name, access }: &Visitor) -> Option<Place> {
        let most = if *access == Access::Everything { KNOWN } else { KNOWN - OF_OPERATORS };
        let mut all = lock(&self.0);
        let of_name = all.get(name).copied().unwrap_or_default();
        if of_name >= OF_NAME || all.values().sum::<usize>() >= most {
            return None;
        }
        all.insert(name.to_owned(), of_name + 1);
        Some(Place { guests: self.clone(), name: name.to_owned() })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut all = lock(&self.guests.0);
        let left = all.get(&self.name).map_or(0, |count| count - 1);
        if left == 0 {
            all.remove(&self.name)
        } else {
            all.insert(self.name.clone(), left)
        };
    }
}

fn lock<T>(it: &Mutex<T>) -> MutexGuard<'_, T> {
    it.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: usize) -> IpAddr {
        IpAddr::from([10, 0, (last / 250) as u8, (last % 250) as u8])
    }

    #[tokio::test]
    async fn the_oldest_stranger_goes_and_one_address_does_not_drive_others_out() {
        let strangers = Strangers::default();
        let mut tasks = Vec::new();
        let mut enter = |from: IpAddr| {
            let task = tokio::spawn(std::future::pending::<()>());
            let handle = task.abort_handle();
            tasks.push(task);
            strangers.enter(from, |_| handle)
        };
        assert!(!enter(address(0)));
        for _ in 0..OF_ADDRESS {
            assert!(!enter(address(1)));
        }
        assert!((0..1000).all(|_| enter(address(1))), "its own oldest go");
        for last in 2..STRANGERS - OF_ADDRESS + 1 {
            assert!(!enter(address(last)), "{last}");
        }
        assert!(enter(address(999)), "now the oldest of all goes");
        assert!(tasks.remove(0).await.unwrap_err().is_cancelled());
        let here = || tasks.iter().filter(|it| !it.is_finished()).count();
        // Each of those that were told to end has its turn.
        for _ in 0..tasks.len() {
            tokio::task::yield_now().await;
        }
        assert_eq!(here(), STRANGERS);
        for number in 0..2000 {
            strangers.leave(number);
        }
        assert!(lock(&strangers.0).all.is_empty());
    }

    #[test]
    fn one_name_does_not_take_all_places() {
        let guests = Arc::new(Guests::default());
        let seat = |name: &str, access| guests.seat(&Visitor { name: name.into(), access });
        let operator = |name: &str| seat(name, Access::Everything);
        let alice: Vec<_> = (0..OF_NAME).map(|_| operator("operator alice").unwrap()).collect();
        assert!(operator("operator alice").is_none());
        let others: Vec<_> =
            (OF_NAME..KNOWN).map(|it| operator(&format!("operator {it}")).unwrap()).collect();
        assert!(operator("operator z").is_none());
        drop(alice);
        operator("operator z").unwrap();
        drop(others);
        assert!(lock(&guests.0).is_empty());
    }

    #[test]
    fn hosts_leave_room_for_operators() {
        let guests = Arc::new(Guests::default());
        let seat = |name: String, access| guests.seat(&Visitor { name, access });
        let many = (0..KNOWN).map_while(|it| seat(format!("host {it}"), Access::HandOver));
        let hosts: Vec<_> = many.collect();
        assert_eq!(hosts.len(), KNOWN - OF_OPERATORS);
        assert!(seat("host z".into(), Access::Read).is_none());
        let alice: Vec<_> =
            std::iter::from_fn(|| seat("operator alice".into(), Access::Everything)).collect();
        assert_eq!(alice.len(), OF_NAME);
    }
}
