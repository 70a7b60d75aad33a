//! Asks the node, gives orders, and follows its events: on threads of their own, because a node may not answer.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::state::Key;
use crate::client::{Client, ClientError, of_vm};
use crate::feed::Entry;
use crate::figures::Figures;
use crate::jobs::Job;
use crate::node::NodeView;
use crate::view::View;

/// How often the node is asked: here, and over the network.
const EVERY: Duration = Duration::from_secs(1);
const EVERY_THERE: Duration = Duration::from_secs(2);
/// How long a node that has gone is waited for between two tries to hear its events.
const AGAIN: Duration = Duration::from_secs(2);
/// An order that has waited for longer is not given: the operator may think of something else by now.
const STALE: Duration = Duration::from_secs(5);
/// How many of the events before now are asked for.
const BEFORE: u64 = 50;

/// What a node says when it is asked for everything.
#[derive(Clone, Debug)]
pub(crate) struct Heard {
    pub(super) node: NodeView,
    pub(super) vms: Vec<View>,
    /// `None`: the node is of a release that has none.
    pub(super) figures: Option<Figures>,
    pub(super) jobs: Vec<Job>,
}

/// What comes to whoever shows the picture.
#[derive(Debug)]
pub(crate) enum Told {
    /// The node has answered.
    Heard(Box<Heard>),
    /// It has not.
    Lost(String),
    /// Something has happened.
    Happened(Box<Entry>),
    /// Events were missed.
    Missed,
    /// An order was given.
    Begun(Box<Job>),
    /// An order was not given.
    Refused(String),
    /// The operator has pressed a key.
    Pressed(Key),
    /// The terminal is larger or smaller.
    Resized,
    /// The terminal is no more.
    NoTerminal(std::io::Error),
    /// This process was told to stop.
    Stop,
}

/// Hand a VM over.
#[derive(Debug)]
pub(crate) struct HandOver {
    pub(super) vm: String,
    pub(super) said: Instant,
}

/// Asks a node again and again.
#[derive(Debug)]
pub(crate) struct Asker {
    client: Client,
    /// The place in the figures up to which they were heard.
    place: Option<String>,
}

#[derive(Deserialize)]
struct Vms {
    vms: Vec<View>,
}

#[derive(Deserialize)]
struct Jobs {
    jobs: Vec<Job>,
}

impl Asker {
    pub(crate) fn new(client: Client) -> Self {
        Self { client, place: None }
    }

    /// The node's own word about a VM.
    ///
    /// # Errors
    /// It has none of this name, or says nothing.
    pub(crate) fn look_for(&self, vm: &str) -> Result<(), ClientError> {
        self.client.get::<View>(&of_vm(vm, "")).map(drop)
    }

    /// Asks for everything.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub(crate) fn ask(&mut self) -> Result<Heard, ClientError> {
        let node = self.client.get("/v1/node")?;
        let Vms { vms } = self.client.get("/v1/vms")?;
        let Jobs { jobs } = self.client.get("/v1/jobs")?;
        let figures = self.figures()?;
        Ok(Heard { node, vms, figures, jobs })
    }

    fn figures(&mut self) -> Result<Option<Figures>, ClientError> {
        let route = match self.place.take() {
            Some(place) => format!("/v1/figures?after={place}"),
            None => "/v1/figures".to_owned(),
        };
        match self.client.get::<Figures>(&route) {
            Ok(figures) => {
                self.place = Some(figures.next.clone());
                Ok(Some(figures))
            }
            Err(ClientError::Refused(error)) if error.code == "no_route" => Ok(None),
            Err(why) => Err(why),
        }
    }

    /// Asks and gives orders until nobody listens.
    pub(crate) fn run(mut self, orders: &Receiver<HandOver>, tell: &Sender<Told>) {
        let every = if self.client.is_far() { EVERY_THERE } else { EVERY };
        loop {
            let told = match orders.recv_timeout(every) {
                Ok(order) => self.give(&order),
                Err(RecvTimeoutError::Timeout) => self.hear(),
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if tell.send(told).is_err() {
                return;
            }
        }
    }

    fn hear(&mut self) -> Told {
        match self.ask() {
            Ok(heard) => Told::Heard(Box::new(heard)),
            Err(why) => Told::Lost(why.to_string()),
        }
    }

    fn give(&self, order: &HandOver) -> Told {
        let of = format!("hand-over of {}", order.vm);
        if order.said.elapsed() > STALE {
            return Told::Refused(format!(
                "{of}: not done, because the node did not answer in time; say it again"
            ));
        }
        match self.client.send::<Job>("POST", &of_vm(&order.vm, "/hand-over"), None) {
            Ok(job) => Told::Begun(Box::new(job)),
            Err(why) => Told::Refused(format!("{of}: {why}")),
        }
    }
}

/// Follows the events until nobody listens, beginning with some from before.
pub(crate) fn follow(client: &Client, tell: &Sender<Told>) {
    let mut last: Option<String> = None;
    loop {
        let mut listens = true;
        let from = last.take().or_else(|| beginning(client));
        last.clone_from(&from);
        // Whoever asks for everything says that the node has gone.
        let _ = from.map(|from| {
            client.events(Some(&from), |event| {
                last = Some(event.id.clone());
                let told = match event.kind.as_deref() {
                    None => return listens,
                    Some("reset") => Told::Missed,
                    Some(_) => match serde_json::from_value(event.data) {
                        Ok(entry) => Told::Happened(Box::new(entry)),
                        Err(_) => return listens,
                    },
                };
                listens = tell.send(told).is_ok();
                listens
            })
        });
        if !listens {
            return;
        }
        std::thread::sleep(AGAIN);
    }
}

/// The place of some events before now.
fn beginning(client: &Client) -> Option<String> {
    let mut newest = None;
    // It is told first where the newest one is.
    let _ = client.events(None, |event| {
        newest = Some(event.id);
        false
    });
    let newest = newest?;
    let (life, number) = newest.rsplit_once('-')?;
    Some(format!("{life}-{}", number.parse::<u64>().ok()?.saturating_sub(BEFORE)))
}
