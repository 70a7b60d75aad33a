//! The connections that a served arbiter has, and room for few of them.
//!
//! Each has a deadline. While there is no room, the oldest one that has not asked goes for the next: a host needs some
//! milliseconds for a certificate and its question, and whoever says nothing has been here for longer. A certificate alone
//! keeps no place: each VM's host has one, and a host that somebody has broken into must not keep others from the arbiter.

use std::io;
use std::net::{IpAddr, Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How many there may be.
const MOST: usize = 64;
/// How many of one address that have not asked.
const MOST_OF_ONE: usize = 16;
/// How many questions of one certificate's name there may be.
const MOST_OF_NAME: usize = 16;
/// How many threads there may be, with those whose connection has been ended and that have not noticed it yet.
const MOST_THREADS: usize = 2 * MOST;

/// The connections, the oldest first.
#[derive(Default)]
pub(super) struct Visitors(Mutex<All>);

#[derive(Default)]
struct All {
    visitors: Vec<Entry>,
    last: u64,
}

struct Entry {
    number: u64,
    address: IpAddr,
    since: Instant,
    socket: TcpStream,
    /// It has asked, and is answered.
    asks: bool,
    /// Who asks, if that was shown.
    name: Option<String>,
    /// It has been ended.
    gone: bool,
}

impl Entry {
    fn end(&mut self) {
        self.gone = true;
        // An error means that it is gone already.
        self.socket.shutdown(Shutdown::Both).ok();
    }
}

/// A connection that counts, until this is dropped.
pub(super) struct Visitor {
    visitors: Arc<Visitors>,
    number: u64,
}

/// What became of a connection that has come.
pub(super) enum Entrance {
    /// There is room for it.
    Free(Visitor),
    /// Another one has gone for it.
    Instead(Visitor),
    /// There is none.
    Full,
}

impl Visitors {
    /// Takes a new one in.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn admit(self: &Arc<Self>, socket: &TcpStream, address: IpAddr) -> io::Result<Entrance> {
        let mut all = self.all();
        let here = |it: &&mut Entry| !it.gone;
        // Those that ask are bounded by their names: many VMs' hosts may have one address. Without keys there are no names,
        // and all addresses are this machine's.
        let of_one =
            all.visitors.iter_mut().filter(here).filter(|it| it.address == address && !it.asks).count();
        let (full, full_of_one) =
            (all.visitors.iter_mut().filter(here).count() >= MOST, of_one >= MOST_OF_ONE);
        if all.visitors.len() >= MOST_THREADS {
            return Ok(Entrance::Full);
        }
        if full || full_of_one {
            let mut silent = all.visitors.iter_mut().filter(here).filter(|it| !it.asks);
            let Some(oldest) = silent.find(|it| !full_of_one || it.address == address) else {
                return Ok(Entrance::Full);
            };
            oldest.end();
        }
        all.last += 1;
        let number = all.last;
        let socket = socket.try_clone()?;
        let since = Instant::now();
        all.visitors.push(Entry { number, address, since, socket, asks: false, name: None, gone: false });
        let visitor = Visitor { visitors: self.clone(), number };
        Ok(if full || full_of_one { Entrance::Instead(visitor) } else { Entrance::Free(visitor) })
    }

    /// Ends those that are here for longer.
    pub(super) fn end_after(&self, time: Duration) {
        self.all()
            .visitors
            .iter_mut()
            .filter(|it| !it.gone && it.since.elapsed() >= time)
            .for_each(Entry::end);
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.all().visitors.is_empty()
    }

    fn all(&self) -> MutexGuard<'_, All> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Visitor {
    /// It has asked, and shown this name before, if it has shown one. Returns whether there is room for its question; then
    /// it stays until it has the answer.
    pub(super) fn asks(&self, name: Option<&str>) -> bool {
        let mut all = self.visitors.all();
        let of_name = |it: &&Entry| it.asks && !it.gone && it.name.as_deref() == name;
        if name.is_some() && all.visitors.iter().filter(of_name).count() >= MOST_OF_NAME {
            return false;
        }
        if let Some(entry) = all.visitors.iter_mut().find(|it| it.number == self.number) {
            (entry.asks, entry.name) = (true, name.map(str::to_owned));
        }
        true
    }
}

impl Drop for Visitor {
    fn drop(&mut self) {
        self.visitors.all().visitors.retain(|it| it.number != self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    /// The two ends of a connection.
    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let there = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        there.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        (listener.accept().unwrap().0, there)
    }

    fn is_ended(there: &mut TcpStream) -> bool {
        matches!(there.read(&mut [0]), Ok(0))
    }

    fn address(last: usize) -> IpAddr {
        IpAddr::from([10, 0, (last / 250) as u8, (last % 250) as u8])
    }

    fn visitor(entrance: Entrance) -> Visitor {
        match entrance {
            Entrance::Free(visitor) | Entrance::Instead(visitor) => visitor,
            Entrance::Full => panic!("full"),
        }
    }

    #[test]
    fn the_oldest_that_is_silent_goes_for_the_next_and_none_that_asks_does() {
        let visitors = Arc::new(Visitors::default());
        let mut all = Vec::new();
        for number in 0..MOST {
            let (here, there) = connection();
            let entrance = visitors.admit(&here, address(number)).unwrap();
            assert!(matches!(entrance, Entrance::Free(_)), "{number}");
            all.push((visitor(entrance), there));
        }
        assert!(all[0].0.asks(Some("host 0")));
        let (here, _there) = connection();
        let entrance = visitors.admit(&here, address(1000)).unwrap();
        assert!(matches!(entrance, Entrance::Instead(_)));
        assert!(!is_ended(&mut all[0].1), "it has asked");
        assert!(is_ended(&mut all[1].1) && !is_ended(&mut all[2].1), "the oldest silent one");
        // Once all have asked there is no room until one has its answer.
        for (number, (visitor, _)) in all.iter().enumerate().skip(1) {
            assert!(visitor.asks(Some(&format!("host {number}"))));
        }
        let newest = visitor(entrance);
        assert!(newest.asks(None));
        assert!(matches!(visitors.admit(&here, address(1001)).unwrap(), Entrance::Full));
        drop(all.swap_remove(5));
        assert!(matches!(visitors.admit(&here, address(1001)).unwrap(), Entrance::Free(_)));
        visitors.end_after(Duration::ZERO);
        assert!(all.iter_mut().all(|(_, there)| is_ended(there)));
        drop((all, newest));
        assert!(visitors.is_empty());
    }

    #[test]
    fn one_name_has_few_questions_at_a_time_whatever_its_addresses_are() {
        let visitors = Arc::new(Visitors::default());
        let come = |number| {
            let (here, there) = connection();
            (visitor(visitors.admit(&here, address(number)).unwrap()), there)
        };
        let mut all: Vec<_> = (0..=MOST_OF_NAME).map(come).collect();
        let last = all.pop().unwrap();
        assert!(all.iter().all(|(visitor, _)| visitor.asks(Some("a"))));
        assert!(!last.0.asks(Some("a")), "as many as it may have");
        let others: Vec<_> = (100..100 + 2 * MOST_OF_NAME).map(come).collect();
        // Where nobody shows a name there is none that has too many.
        assert!(others.iter().all(|(visitor, _)| visitor.asks(None)) && come(200).0.asks(Some("b")));
        drop(all.pop());
        assert!(last.0.asks(Some("a")), "once one has its answer");
    }

    #[test]
    fn strangers_of_one_address_take_the_room_of_that_address_only() {
        let visitors = Arc::new(Visitors::default());
        let mut others = Vec::new();
        for number in 0..3 {
            let (here, there) = connection();
            others.push((visitor(visitors.admit(&here, address(number)).unwrap()), there));
        }
        let mut crowd = Vec::new();
        for number in 0..MOST {
            let (here, there) = connection();
            let entrance = visitors.admit(&here, address(9)).unwrap();
            assert_eq!(matches!(entrance, Entrance::Instead(_)), number >= MOST_OF_ONE, "{number}");
            crowd.push((visitor(entrance), there));
        }
        assert!(others.iter_mut().all(|(_, there)| !is_ended(there)), "they are left alone");
        let left = crowd.iter_mut().filter_map(|(_, there)| (!is_ended(there)).then_some(())).count();
        assert_eq!(left, MOST_OF_ONE);
        // Threads that do not end are not made without end either.
        let mut more = Vec::new();
        while let Entrance::Instead(visitor) = visitors.admit(&connection().0, address(9)).unwrap() {
            more.push(visitor);
            assert!(more.len() <= MOST_THREADS);
        }
        assert_eq!(others.len() + crowd.len() + more.len(), MOST_THREADS);
        // Those that ask leave the room of their address to the next ones.
        drop((others, crowd, more));
        let come = || {
            let (here, there) = connection();
            (visitor(visitors.admit(&here, address(9)).unwrap()), there)
        };
        let asking: Vec<_> = (0..MOST_OF_ONE).map(|_| come()).collect();
        assert!(asking.iter().all(|(visitor, _)| visitor.asks(Some("a"))));
        let (here, _there) = connection();
        assert!(matches!(visitors.admit(&here, address(9)).unwrap(), Entrance::Free(_)));
    }
}
