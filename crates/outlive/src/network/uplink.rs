//! Whether this host reaches the network of the guest's clients, as far as the host itself can tell: the carrier
//! of its uplink, and the tap's place in its bridge.
//!
//! The kernel reports every change of an interface; a look at all of them follows. A carrier may come and go for a
//! while, so a loss counts once it has lasted for some time, and so does a return. But a host that is asked whether
//! it could take a VM over does not say yes while a loss is under way: both hosts may be losing the network at once.

use std::fmt;
use std::os::fd::AsFd;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Link, Netlink};

/// The kernel's group for changes of interfaces (`RTMGRP_LINK`).
const LINKS: u32 = 1;
/// A return of the network counts once it has lasted for so long.
const BACK_AFTER: Duration = Duration::from_secs(3);
/// Without a report of the kernel the interfaces are looked at this often.
const LOOK: Duration = Duration::from_secs(5);
/// Waits for a crowd of changes to end.
const CROWD: Duration = Duration::from_millis(10);

/// Which interface leads to the clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UplinkSpec {
    /// The ports of the tap's bridge that are no taps.
    Auto,
    /// Nobody looks.
    None,
    /// This one.
    Named(String),
}

impl FromStr for UplinkSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::None),
            name if (1..=15).contains(&name.len()) && !name.contains(['/', ' ']) => {
                Ok(Self::Named(name.into()))
            }
            _ => Err(format!("'{text}' is no name of an interface: give one, or auto or none")),
        }
    }
}

impl fmt::Display for UplinkSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::None => "none",
            Self::Named(name) => name,
        })
    }
}

/// What is watched.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) uplink: UplinkSpec,
    pub(crate) tap: String,
    /// The bridge that the tap is to be a port of, if one was named.
    pub(crate) bridge: Option<String>,
    /// A loss counts once it has lasted for so long.
    pub(crate) lost_after: Duration,
}

/// What keeps this host from the clients.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CutOff {
    /// The bridge was there once.
    #[error("the bridge {0} is gone")]
    BridgeGone(String),
    /// The bridge is switched off.
    #[error("the bridge {0} is down")]
    BridgeDown(String),
    /// The VM's tap is not there.
    #[error("the tap {0} is gone")]
    TapGone(String),
    /// The VM's tap is switched off.
    #[error("the tap {0} is down")]
    TapDown(String),
    /// The VM's tap is connected to nothing.
    #[error("the tap {0} is in no bridge any more")]
    TapAlone(String),
    /// The uplink that the user has named is not there.
    #[error("the uplink {0} is gone")]
    UplinkGone(String),
    /// The last uplink has left the bridge.
    #[error("the uplink {0} is no port of the bridge any more")]
    UplinkAlone(String),
    /// All uplinks are switched off.
    #[error("the uplink {0} is down")]
    UplinkDown(String),
    /// No uplink has a carrier.
    #[error("the uplink {0} has no carrier")]
    NoCarrier(String),
}

/// What is seen: `Ok`, or why the clients cannot be reached; `None` if nothing tells.
pub(crate) type Sight = Option<Result<(), CutOff>>;

type Listener = Box<dyn Fn(&Sight) + Send>;

/// The watch; see the module. Its thread lives as long as the process.
pub(crate) struct Uplink {
    state: Mutex<State>,
}

struct State {
    sight: Sight,
    /// Whether a loss is seen that does not count yet.
    losing: bool,
    /// Whether the VM runs here, so that its tap must be in place.
    runs_here: bool,
    /// Hears of changes.
    listener: Option<Listener>,
}

impl Uplink {
    /// Watches. Changes are logged until somebody [listens](Self::listen).
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn start(place: Place) -> std::io::Result<Arc<Self>> {
        let state = State { sight: None, losing: false, runs_here: false, listener: None };
        let uplink = Arc::new(Self { state: Mutex::new(state) });
        if place.uplink != UplinkSpec::None {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind(&SocketAddr::new(0, LINKS))?;
            socket.set_non_blocking(true)?;
            let watched = uplink.clone();
            outlive_machine::spawn("uplink", move || watched.run(&socket, &place))?;
        }
        Ok(uplink)
    }

    /// Whether this host reaches the clients, as far as it knows. Not while a loss is under way.
    pub(crate) fn reaches(&self) -> Option<bool> {
        self.state().reaches()
    }

    /// The VM runs here from now on. `listener` hears of a loss that is there already, and of every change; also
    /// when nothing tells any more.
    pub(crate) fn listen(&self, listener: impl Fn(&Sight) + Send + 'static) {
        let mut state = self.state();
        if let Some(Err(_)) = &state.sight {
            listener(&state.sight);
        }
        state.runs_here = true;
        state.listener = Some(Box::new(listener));
    }

    /// The VM runs here no longer; this host is a standby.
    pub(crate) fn stands_by(&self) {
        let mut state = self.state();
        (state.runs_here, state.listener) = (false, None);
    }

    fn run(&self, socket: &Socket, place: &Place) {
        let mut steady = Steady::new(place.lost_after);
        let mut known = Known::default();
        let mut netlink = Netlink::open();
        loop {
            let runs_here = self.state().runs_here;
            let links = netlink.as_mut().ok().and_then(|netlink| netlink.links().ok());
            if links.is_none() {
                // Nobody can tell.
                netlink = Netlink::open();
            }
            let seen = links.and_then(|links| known.look(&links, place, runs_here));
            if let Some(sight) = steady.see(seen, Instant::now()) {
                self.tell(sight);
            }
            self.state().losing = steady.is_losing();
            let wait = steady.due().map_or(LOOK, |due| due.saturating_duration_since(Instant::now()));
            let wait =
                PollTimeout::try_from(wait.min(LOOK) + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, wait).is_ok_and(|ready| ready > 0) {
                std::thread::sleep(CROWD);
                // What it says does not matter, nor what was lost of it: everything is looked at.
                while socket.recv_from_full().is_ok() {}
            }
        }
    }

    fn tell(&self, sight: Sight) {
        let mut state = self.state();
        match (&sight, &state.listener) {
            (_, Some(listener)) => listener(&sight),
            (Some(Err(why)), None) => {
                tracing::warn!(
                    "this host is cut off from the clients' network, and would not get the VM: {why}"
                );
            }
            (Some(Ok(())), None) if state.sight.is_some() => {
                tracing::info!("this host reaches the clients' network again");
            }
            _ => {}
        }
        state.sight = sight;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn reaches(&self) -> Option<bool> {
        self.sight.as_ref().map(|sight| sight.is_ok() && !self.losing)
    }
}

/// Lets a change count once it has lasted.
struct Steady {
    lost_after: Duration,
    sight: Sight,
    /// What is seen instead, and since when.
    change: Option<(Sight, Instant)>,
    first: bool,
}

impl Steady {
    fn new(lost_after: Duration) -> Self {
        Self { lost_after, sight: None, change: None, first: true }
    }

    /// What is seen now. Returns what counts from now on, if that is something else than before.
    fn see(&mut self, seen: Sight, now: Instant) -> Option<Sight> {
        let kind = |sight: &Sight| sight.as_ref().map(Result::is_ok);
        if std::mem::take(&mut self.first) {
            self.sight = seen.clone();
            return seen.is_some().then_some(seen);
        }
        if kind(&seen) == kind(&self.sight) {
            self.change = None;
            return None;
        }
        let since = match &self.change {
            Some((before, since)) if kind(before) == kind(&seen) => *since,
            _ => now,
        };
        self.change = Some((seen, since));
        if now < since + self.lasts() {
            return None;
        }
        self.sight = self.change.take().and_then(|(seen, _)| seen);
        Some(self.sight.clone())
    }

    fn lasts(&self) -> Duration {
        match &self.change {
            Some((Some(Ok(())), _)) if self.sight.is_some() => BACK_AFTER,
            Some((Some(Ok(())), _)) => Duration::ZERO,
            _ => self.lost_after,
        }
    }

    /// Whether a loss is seen that does not count yet.
    fn is_losing(&self) -> bool {
        matches!(self.change, Some((Some(Err(_)) | None, _)))
    }

    /// When the change under way counts.
    fn due(&self) -> Option<Instant> {
        self.change.as_ref().map(|(_, since)| *since + self.lasts())
    }
}

/// What was there once is missed when it is gone.
#[derive(Default)]
struct Known {
    bridge: Option<String>,
    uplink: Option<String>,
}

impl Known {
    /// Judges what the kernel says of all interfaces.
    fn look(&mut self, links: &[Link], place: &Place, runs_here: bool) -> Sight {
        let named = |name: &str| links.iter().find(|link| link.name == name);
        let tap = named(&place.tap);
        let of_tap =
            tap.and_then(|tap| tap.bridge).and_then(|index| links.iter().find(|it| it.index == index));
        let bridge = place.bridge.as_deref().or(of_tap.map(|bridge| bridge.name.as_str()));
        if let Some(bridge) = bridge {
            self.bridge = Some(bridge.to_owned());
        }
        let bridge = self.bridge.as_deref().map(|name| named(name).ok_or(name));
        let bridge = match bridge {
            Some(Err(name)) => return lost(CutOff::BridgeGone(name.into())),
            Some(Ok(bridge)) if !bridge.up => return lost(CutOff::BridgeDown(bridge.name.clone())),
            Some(Ok(bridge)) => Some(bridge),
            None => None,
        };
        if runs_here {
            match tap {
                None => return lost(CutOff::TapGone(place.tap.clone())),
                Some(tap) if !tap.up => return lost(CutOff::TapDown(place.tap.clone())),
                Some(tap) if self.bridge.is_some() && tap.bridge.is_none() => {
                    return lost(CutOff::TapAlone(place.tap.clone()));
                }
                Some(_) => {}
            }
        }
        match &place.uplink {
            UplinkSpec::None => None,
            UplinkSpec::Named(name) => match named(name) {
                None => lost(CutOff::UplinkGone(name.clone())),
                Some(link) => of_uplinks(&[link]),
            },
            UplinkSpec::Auto => {
                let ports =
                    |link: &&Link| bridge.is_some_and(|it| link.bridge == Some(it.index)) && !link.is_tap();
                let ports: Vec<&Link> = links.iter().filter(ports).collect();
                // Cables to containers say nothing if there is hardware.
                let real: Vec<&Link> = ports.iter().copied().filter(|link| link.is_outward()).collect();
                let uplinks = if real.is_empty() { ports } else { real };
                if let Some(uplink) = uplinks.first() {
                    self.uplink = Some(uplink.name.clone());
                }
                match &self.uplink {
                    None => None,
                    Some(gone) if uplinks.is_empty() => lost(CutOff::UplinkAlone(gone.clone())),
                    Some(_) => of_uplinks(&uplinks),
                }
            }
        }
    }
}

/// One that works is enough.
fn of_uplinks(uplinks: &[&Link]) -> Sight {
    if uplinks.iter().any(|link| link.up && link.carrier) {
        return Some(Ok(()));
    }
    let names: Vec<&str> = uplinks.iter().map(|link| link.name.as_str()).collect();
    let names = names.join(", ");
    let is_up = uplinks.iter().any(|link| link.up);
    lost(if is_up { CutOff::NoCarrier(names) } else { CutOff::UplinkDown(names) })
}

fn lost(why: CutOff) -> Sight {
    Some(Err(why))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, index: u32, bridge: Option<u32>, kind: Option<&str>) -> Link {
        Link {
            name: name.into(),
            index,
            mac: None,
            up: true,
            carrier: true,
            bridge,
            kind: kind.map(str::to_owned),
            mtu: 1500,
            vlans: Default::default(),
        }
    }

    fn host() -> Vec<Link> {
        vec![
            link("br0", 1, None, Some("bridge")),
            link("vm0", 2, Some(1), Some("tun")),
            link("eth0", 3, Some(1), None),
            link("veth1", 4, Some(1), Some("veth")),
        ]
    }

    fn place(uplink: &str) -> Place {
        let (tap, bridge) = ("vm0".into(), Some("br0".into()));
        Place { uplink: uplink.parse().unwrap(), tap, bridge, lost_after: Duration::from_secs(2) }
    }

    fn why(sight: Sight) -> String {
        sight.expect("it is known").expect_err("it is lost").to_string()
    }

    #[test]
    fn hardware_counts_and_cables_to_containers_do_not() {
        let (mut links, mut known) = (host(), Known::default());
        assert_eq!(known.look(&links, &place("auto"), true), Some(Ok(())));
        links[2].carrier = false;
        assert_eq!(why(known.look(&links, &place("auto"), true)), "the uplink eth0 has no carrier");
        links[2].up = false;
        assert_eq!(why(known.look(&links, &place("auto"), true)), "the uplink eth0 is down");
        assert_eq!(known.look(&links, &place("veth1"), true), Some(Ok(())));
        assert_eq!(known.look(&links, &place("none"), true), None);
        // A second one that works is enough.
        links.push(link("eth1", 5, Some(1), None));
        assert_eq!(known.look(&links, &place("auto"), true), Some(Ok(())));
    }

    #[test]
    fn everything_between_the_guest_and_the_uplink_is_missed_when_it_is_gone() {
        let change = |change: fn(&mut Vec<Link>), runs_here| {
            let (mut links, mut known) = (host(), Known::default());
            let place = Place { bridge: None, ..place("auto") };
            assert_eq!(known.look(&links, &place, true), Some(Ok(())));
            change(&mut links);
            known.look(&links, &place, runs_here)
        };
        assert_eq!(why(change(|links| drop(links.remove(1)), true)), "the tap vm0 is gone");
        assert_eq!(why(change(|links| links[1].up = false, true)), "the tap vm0 is down");
        assert_eq!(why(change(|links| links[1].bridge = None, true)), "the tap vm0 is in no bridge any more");
        assert_eq!(why(change(|links| links[0].up = false, true)), "the bridge br0 is down");
        let removed = change(|links| (1..4).for_each(|at| links[at].bridge = None), false);
        assert_eq!(why(removed), "the uplink eth0 is no port of the bridge any more");
        let deleted = change(
            |links| {
                links.remove(0);
                links.iter_mut().for_each(|link| link.bridge = None);
            },
            false,
        );
        assert_eq!(why(deleted), "the bridge br0 is gone");
        // A standby's tap comes with the VM.
        assert_eq!(change(|links| drop(links.remove(1)), false), Some(Ok(())));
    }

    #[test]
    fn a_bridge_without_an_uplink_says_nothing() {
        let links = &host()[..2];
        assert_eq!(Known::default().look(links, &place("auto"), true), None);
        assert_eq!(why(Known::default().look(links, &place("eth0"), true)), "the uplink eth0 is gone");
    }

    #[test]
    fn a_change_counts_once_it_has_lasted() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut steady = Steady::new(Duration::from_secs(2));
        let down = || lost(CutOff::NoCarrier("eth0".into()));
        assert_eq!(steady.see(Some(Ok(())), at(0)), Some(Some(Ok(()))));
        assert_eq!(steady.see(down(), at(100)), None);
        assert_eq!(steady.due(), Some(at(2100)));
        assert!(steady.is_losing());
        // It flaps.
        assert_eq!(steady.see(Some(Ok(())), at(2000)), None);
        assert!(!steady.is_losing());
        assert_eq!(steady.see(down(), at(2010)), None);
        assert_eq!(steady.see(down(), at(4000)), None);
        assert_eq!(steady.see(down(), at(4010)), Some(down()));
        assert_eq!(steady.due(), None);
        assert_eq!(steady.see(Some(Ok(())), at(5000)), None);
        assert_eq!(steady.see(down(), at(7999)), None);
        assert_eq!(steady.see(Some(Ok(())), at(8000)), None);
        assert_eq!(steady.see(Some(Ok(())), at(11_000)), Some(Some(Ok(()))));
    }

    fn uplink(sight: Sight) -> Uplink {
        Uplink { state: Mutex::new(State { sight, losing: false, runs_here: false, listener: None }) }
    }

    #[test]
    fn a_host_does_not_say_that_it_reaches_the_clients_while_it_is_losing_them() {
        let uplink = uplink(Some(Ok(())));
        assert_eq!(uplink.reaches(), Some(true));
        uplink.state().losing = true;
        assert_eq!(uplink.reaches(), Some(false));
    }

    #[test]
    fn whoever_listens_hears_that_nothing_tells_any_more() {
        let uplink = uplink(None);
        let (told, heard) = std::sync::mpsc::channel();
        uplink.listen(move |sight| told.send(sight.clone()).unwrap());
        let gone = lost(CutOff::UplinkGone("eth0".into()));
        uplink.tell(gone.clone());
        uplink.tell(None);
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), [gone, None]);
    }
}
