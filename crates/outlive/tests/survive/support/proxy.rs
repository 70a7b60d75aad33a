//! A bad cable between a primary and its standby, which damages the data that passes through.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::{Side, World, wait_until};

/// A direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    ToStandby,
    ToPrimary,
}

/// The damage to the next piece in one direction.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// One bit is flipped; the number picks which.
    Flip(u64),
    /// Some bytes are left out; the number picks where.
    Shorten(u64),
    /// Its second half and everything after it are left out.
    Break,
}

#[derive(Default)]
struct Shared {
    fault: Mutex<Option<(Way, Fault)>>,
    stalled: Mutex<Option<Way>>,
    /// How often everything was cut.
    cuts: AtomicU64,
    /// The connections to the standby have ended, those of the primary have not.
    parted: AtomicBool,
    to_standby: Mutex<Vec<TcpStream>>,
}

/// Runs on the host of the primary, which dials [`Proxy::addr`] instead of the standby.
pub(crate) struct Proxy {
    addr: SocketAddr,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Starts on host `side` with the other host's standby behind it.
    pub(crate) fn start(world: &World, side: Side) -> Proxy {
        let listener = world.on(side, || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
        let proxy = Proxy { addr: listener.local_addr().unwrap(), shared: Arc::default() };
        let (shared, standby) = (proxy.shared.clone(), side.other().addr());
        // The thread is in the host's network. It ends with the test's process, because it holds nothing of
        // the test.
        world.on(side, || {
            thread::spawn(move || {
                for primary in listener.incoming().flatten() {
                    let Ok(standby) = TcpStream::connect(standby) else { continue };
                    join(&shared, &primary, &standby);
                }
            })
        });
        proxy
    }

    /// The address that the primary dials.
    pub(crate) fn addr(&self) -> String {
        self.addr.to_string()
    }

    /// Turns one bit of the next piece over, once.
    pub(crate) fn flip(&self, way: Way, place: u64) {
        self.damage(way, Fault::Flip(place));
    }

    /// Leaves some bytes of the next piece out, once.
    pub(crate) fn shorten(&self, way: Way, place: u64) {
        self.damage(way, Fault::Shorten(place));
    }

    /// Leaves out half of the next piece and everything after it: the receiver waits for data that never
    /// comes.
    pub(crate) fn break_off(&self, way: Way) {
        self.damage(way, Fault::Break);
    }

    fn damage(&self, way: Way, fault: Fault) {
        *self.shared.fault.lock().unwrap() = Some((way, fault));
    }

    /// Waits until the damage is done.
    pub(crate) fn wait_done(&self) {
        wait_until("the fault is made", || self.shared.fault.lock().unwrap().is_none());
    }

    /// Stops one direction, on all connections, until [`Proxy::flow`].
    pub(crate) fn stall(&self, way: Way) {
        *self.shared.stalled.lock().unwrap() = Some(way);
    }

    /// Ends the stalled connections; held data is lost.
    pub(crate) fn cut(&self) {
        self.shared.cuts.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends the connections at the standby's end only. The primary's stay, and nothing comes through them.
    pub(crate) fn part(&self) {
        self.shared.parted.store(true, Ordering::Relaxed);
        let to_standby = std::mem::take(&mut *self.shared.to_standby.lock().unwrap());
        assert!(!to_standby.is_empty());
        to_standby.iter().for_each(|connection| drop(connection.shutdown(Shutdown::Both)));
    }

    /// Lets everything through again.
    pub(crate) fn flow(&self) {
        *self.shared.stalled.lock().unwrap() = None;
    }
}

fn join(shared: &Arc<Shared>, primary: &TcpStream, standby: &TcpStream) {
    shared.to_standby.lock().unwrap().push(standby.try_clone().unwrap());
    for (way, from, to) in [(Way::ToStandby, primary, standby), (Way::ToPrimary, standby, primary)] {
        from.set_nodelay(true).unwrap();
        let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        let shared = shared.clone();
        thread::spawn(move || {
            carry(&shared, way, &from, &to);
            while shared.parted.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(50));
            }
            // An end is passed on in one direction; the other direction ends by itself.
            to.shutdown(Shutdown::Write).ok();
            from.shutdown(Shutdown::Read).ok();
        });
    }
}

fn carry(shared: &Shared, way: Way, mut from: &TcpStream, mut to: &TcpStream) -> Option<()> {
    let mut buffer = vec![0; 256 << 10];
    let cuts = shared.cuts.load(Ordering::Relaxed);
    let mut broken = false;
    loop {
        let mut length = from.read(&mut buffer).ok().filter(|length| *length > 0)?;
        (!shared.parted.load(Ordering::Relaxed)).then_some(())?;
        while *shared.stalled.lock().unwrap() == Some(way) {
            thread::sleep(Duration::from_millis(2));
            (shared.cuts.load(Ordering::Relaxed) == cuts).then_some(())?;
        }
        if let Some((_, fault)) = shared.fault.lock().unwrap().take_if(|(damaged, _)| *damaged == way) {
            length = damage(&mut buffer[..length], fault);
            broken = matches!(fault, Fault::Break);
            to.write_all(&buffer[..length]).ok()?;
        } else if !broken {
            to.write_all(&buffer[..length]).ok()?;
        }
    }
}

/// Most bytes left out: so few that a heartbeat fills the hole and the receiver finds a wrong checksum.
/// Nobody notices a larger hole until the silence counts as death, and then the arbiter decides
/// ([`Proxy::break_off`]).
const LARGEST_HOLE: usize = 32;

/// How a record of TLS 1.3 begins. Its second number, the minor version, says nothing and is not protected: the
/// receiver ignores it (RFC 8446, section 5.1). Every other bit of the link counts.
const RECORD: [u8; 3] = [23, 3, 3];
/// Behind it comes the record's first byte.
const RECORD_HEADER: usize = 5;

/// Returns the remaining length.
fn damage(piece: &mut [u8], fault: Fault) -> usize {
    let at = |place: u64, end: usize| (place % end as u64) as usize;
    match fault {
        Fault::Flip(place) => {
            let mut byte = at(place, piece.len());
            if byte >= 2 && piece[byte - 2..=byte] == RECORD {
                byte += RECORD_HEADER - 2;
            }
            piece[byte.min(piece.len() - 1)] ^= 1 << (place >> 32 & 7);
            piece.len()
        }
        Fault::Shorten(place) => {
            let start = at(place, piece.len());
            let gone = at(place >> 32, (piece.len() - start).min(LARGEST_HOLE)) + 1;
            piece.copy_within(start + gone.., start);
            piece.len() - gone
        }
        Fault::Break => piece.len() / 2,
    }
}
