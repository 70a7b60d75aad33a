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
pub(super) struct Guests(Mutex<All>);

#[derive(Default)]
struct All {
    guests: Vec<Entry>,
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
pub(super) struct Guest {
    guests: Arc<Guests>,
    number: u64,
}

/// What became of a connection that has come.
pub(super) enum Entrance {
    /// There is room for it.
    Free(Guest),
    /// Another one has gone for it.
    Instead(Guest),
    /// There is none.
    Full,
}

impl Guests {
    /// Takes a new one in.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn admit(self: &Arc<Self>, socket: &TcpStream, address: IpAddr) -> io::Result<Entrance> {
        let mut all = self.all();
        let here = |it: &&mut Entry| !it.gone;
        let of_one = all.guests.iter_mut().filter(here).filter(|it| it.address == address).count();
        let (full, full_of_one) = (all.guests.iter_mut().filter(here).count() >= MOST, of_one >= MOST_OF_ONE);
        if all.guests.len() >= MOST_THREADS {
            return Ok(Entrance::Full);
        }
        if full || full_of_one {
            let mut strangers = all.guests.iter_mut().filter(here).filter(|it| !it.known);
            let Some(oldest) = strangers.find(|it| !full_of_one || it.address == address) else {
                return Ok(Entrance::Full);
            };
            oldest.end();
        }
        all.last += 1;
        let number = all.last;
        let socket = socket.try_clone()?;
        let since = Instant::now();
        all.guests.push(Entry { number, address, since, socket, known: false, gone: false });
        let guest = Guest { guests: self.clone(), number };
        Ok(if full || full_of_one { Entrance::Instead(guest) } else { Entrance::Free(guest) })
    }

    /// Ends those that are here for longer.
    pub(super) fn end_after(&self, time: Duration) {
        self.all().guests.iter_mut().filter(|it| !it.gone && it.since.elapsed() >= time).for_each(Entry::end);
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.all().guests.is_empty()
    }

    fn all(&self) -> MutexGuard<'_, All> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Guest {
    /// It has shown who it is.
    pub(super) fn is_known(&self) {
        let mut all = self.guests.all();
        if let Some(entry) = all.guests.iter_mut().find(|it| it.number == self.number) {
            entry.known = true;
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.guests.all().guests.retain(|it| it.number != self.number);
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

    fn guest(entrance: Entrance) -> Guest {
        match entrance {
            Entrance::Free(guest) | Entrance::Instead(guest) => guest,
            Entrance::Full => panic!("full"),
        }
    }

    #[test]
    fn the_oldest_stranger_goes_for_the_next_and_no_host_does() {
        let guests = Arc::new(Guests::default());
        let mut all = Vec::new();
        for number in 0..MOST {
            let (here, there) = connection();
            let entrance = guests.admit(&here, address(number)).unwrap();
            assert!(matches!(entrance, Entrance::Free(_)), "{number}");
            all.push((guest(entrance), there));
        }
        all[0].0.is_known();
        let (here, _there) = connection();
        let entrance = guests.admit(&here, address(1000)).unwrap();
        assert!(matches!(entrance, Entrance::Instead(_)));
        assert!(!is_ended(&mut all[0].1), "it has shown who it is");
        assert!(is_ended(&mut all[1].1) && !is_ended(&mut all[2].1), "the oldest stranger");
        // Once all are known there is no room until one has its answer.
        all.iter().for_each(|(guest, _)| guest.is_known());
        let newest = guest(entrance);
        newest.is_known();
        assert!(matches!(guests.admit(&here, address(1001)).unwrap(), Entrance::Full));
        drop(all.swap_remove(5));
        assert!(matches!(guests.admit(&here, address(1001)).unwrap(), Entrance::Free(_)));
        guests.end_after(Duration::ZERO);
        assert!(all.iter_mut().all(|(_, there)| is_ended(there)));
        drop((all, newest));
        assert!(guests.is_empty());
    }

    #[test]
    fn strangers_of_one_address_take_the_room_of_that_address_only() {
        let guests = Arc::new(Guests::default());
        let mut others = Vec::new();
        for number in 0..3 {
            let (here, there) = connection();
            others.push((guest(guests.admit(&here, address(number)).unwrap()), there));
        }
        let mut crowd = Vec::new();
        for number in 0..MOST {
            let (here, there) = connection();
            let entrance = guests.admit(&here, address(9)).unwrap();
            assert_eq!(matches!(entrance, Entrance::Instead(_)), number >= MOST_OF_ONE, "{number}");
            crowd.push((guest(entrance), there));
        }
        assert!(others.iter_mut().all(|(_, there)| !is_ended(there)), "they are left alone");
        let left = crowd.iter_mut().filter_map(|(_, there)| (!is_ended(there)).then_some(())).count();
        assert_eq!(left, MOST_OF_ONE);
        // Threads that do not end are not made without end either.
        let mut more = Vec::new();
        while let Entrance::Instead(guest) = guests.admit(&connection().0, address(9)).unwrap() {
            more.push(guest);
            assert!(more.len() <= MOST_THREADS);
        }
        assert_eq!(others.len() + crowd.len() + more.len(), MOST_THREADS);
    }
}
