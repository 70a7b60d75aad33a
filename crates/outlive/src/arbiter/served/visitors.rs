//! The connections that a served arbiter has, and room for few of them.
//!
//! Each has a deadline. While there is no room, the oldest one that has not shown who it is goes for the next: a host
//! needs some milliseconds for that, and a stranger that says nothing has been here for longer.

use std::io;
use std::net::{IpAddr, Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How many there may be.
const MOST: usize = 64;
/// How many of one address.
const MOST_OF_ONE: usize = 16;
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
    /// It has shown who it is.
    known: bool,
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
        let of_one = all.visitors.iter_mut().filter(here).filter(|it| it.address == address).count();
        let (full, full_of_one) =
            (all.visitors.iter_mut().filter(here).count() >= MOST, of_one >= MOST_OF_ONE);
        if all.visitors.len() >= MOST_THREADS {
            return Ok(Entrance::Full);
        }
        if full || full_of_one {
            let mut strangers = all.visitors.iter_mut().filter(here).filter(|it| !it.known);
            let Some(oldest) = strangers.find(|it| !full_of_one || it.address == address) else {
                return Ok(Entrance::Full);
            };
            oldest.end();
        }
        all.last += 1;
        let number = all.last;
        let socket = socket.try_clone()?;
        let since = Instant::now();
        all.visitors.push(Entry { number, address, since, socket, known: false, gone: false });
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
    /// It has shown who it is.
    pub(super) fn becomes_known(&self) {
        let mut all = self.visitors.all();
        if let Some(entry) = all.visitors.iter_mut().find(|it| it.number == self.number) {
            entry.known = true;
        }
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
    fn the_oldest_stranger_goes_for_the_next_and_no_host_does() {
        let visitors = Arc::new(Visitors::default());
        let mut all = Vec::new();
        for number in 0..MOST {
            let (here, there) = connection();
            let entrance = visitors.admit(&here, address(number)).unwrap();
            assert!(matches!(entrance, Entrance::Free(_)), "{number}");
            all.push((visitor(entrance), there));
        }
        all[0].0.becomes_known();
        let (here, _there) = connection();
        let entrance = visitors.admit(&here, address(1000)).unwrap();
        assert!(matches!(entrance, Entrance::Instead(_)));
        assert!(!is_ended(&mut all[0].1), "it has shown who it is");
        assert!(is_ended(&mut all[1].1) && !is_ended(&mut all[2].1), "the oldest stranger");
        // Once all are known there is no room until one has its answer.
        all.iter().for_each(|(visitor, _)| visitor.becomes_known());
        let newest = visitor(entrance);
        newest.becomes_known();
        assert!(matches!(visitors.admit(&here, address(1001)).unwrap(), Entrance::Full));
        drop(all.swap_remove(5));
        assert!(matches!(visitors.admit(&here, address(1001)).unwrap(), Entrance::Free(_)));
        visitors.end_after(Duration::ZERO);
        assert!(all.iter_mut().all(|(_, there)| is_ended(there)));
        drop((all, newest));
        assert!(visitors.is_empty());
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
    }
}
