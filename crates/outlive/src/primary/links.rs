//! The thread that makes connections and ends them, so that no decision waits for a network.

use std::sync::mpsc::{Receiver, Sender as Channel, channel};
use std::sync::{Arc, Weak};
use std::time::Duration;

use outlive_pair::{Link, LossReason, PrimaryEvent};

use super::driver::SharedDriver;
use super::inbox::{Inbox, Queue};
use super::pool::Pool;
use super::ports::Connection;
use super::stats::Totals;
use crate::link::{self, Sender, SenderReport};

/// What the thread is to do.
pub(crate) enum Errand {
    /// Connect to the standby at this index, and serve the connection.
    Dial { link: Link, address: usize },
    /// Close a connection, and wait until its thread is gone.
    Close(Connection),
}

/// What every connection is made with.
pub(crate) struct Plan {
    /// Addresses of the standbys.
    pub(crate) standbys: Vec<String>,
    /// Time between two heartbeats of a sender's own.
    pub(crate) heartbeat: Duration,
    /// Counts what is sent.
    pub(crate) totals: Arc<Totals>,
    /// Told what the senders report.
    pub(crate) inbox: Queue,
}

/// Errands for a thread that does not run yet.
pub(crate) fn errands() -> (Channel<Errand>, Receiver<Errand>) {
    channel()
}

/// Starts the thread. It ends with its driver.
///
/// # Errors
/// The operating system's.
pub(crate) fn start(
    errands: Receiver<Errand>,
    driver: &Arc<SharedDriver>,
    plan: Plan,
) -> std::io::Result<()> {
    let driver = Arc::downgrade(driver);
    outlive_machine::spawn("links", move || serve(&errands, &driver, &plan))?;
    Ok(())
}

fn serve(errands: &Receiver<Errand>, driver: &Weak<SharedDriver>, plan: &Plan) {
    while let Ok(errand) = errands.recv() {
        match errand {
            Errand::Close(connection) => {
                connection.sender.close();
                drop(connection);
            }
            Errand::Dial { link, address } => {
                let address = &plan.standbys[address];
                let dialled = link::dial(address);
                let Some(driver) = driver.upgrade() else { return };
                let connected =
                    dialled.and_then(|connection| connect(&driver, plan, link, connection, address));
                if let Err(error) = connected {
                    driver.handle(PrimaryEvent::DialFailed { link, why: format!("{address}: {error}") });
                }
            }
        }
    }
}

/// Gives a new connection its two threads, and the driver the connection.
fn connect(
    driver: &Arc<SharedDriver>,
    plan: &Plan,
    link: Link,
    connection: link::Connection,
    address: &str,
) -> std::io::Result<()> {
    let link::Connection { reader, writer, closer } = connection;
    let pool = Arc::new(Pool::default());
    let report = reporter(link, pool.clone(), Arc::downgrade(driver), plan);
    let sender = Sender::start(writer, closer, driver.clock(), plan.heartbeat, report)?;
    driver.connected(Connection { link, sender, address: address.to_owned(), pool });
    let receiving = driver.clone();
    let received = outlive_machine::spawn("receiver", move || {
        let want = |want| receiving.tell(Inbox::DiskWant(link, want));
        link::receive(reader, link, |event| receiving.handle(event), want);
    });
    if let Err(error) = received {
        let why = LossReason::Local(format!("cannot start a thread: {error}"));
        driver.handle(PrimaryEvent::LinkLost { link, why });
    }
    Ok(())
}

/// What becomes of a sender's reports, on its thread.
fn reporter(
    link: Link,
    pool: Arc<Pool>,
    driver: Weak<SharedDriver>,
    plan: &Plan,
) -> impl Fn(SenderReport) + Send + use<> {
    let (inbox, totals) = (plan.inbox.clone(), plan.totals.clone());
    let tell = move |message| drop(inbox.send(message));
    move |report| match report {
        SenderReport::Sent(bytes) => totals.sent(bytes),
        SenderReport::Shipped(shipped) => totals.shipped(&shipped),
        SenderReport::Free(buffer) => {
            if pool.put(buffer) {
                tell(Inbox::Wake);
            }
        }
        SenderReport::Failed(why) => {
            if let Some(driver) = driver.upgrade() {
                driver.handle(PrimaryEvent::LinkLost { link, why: LossReason::Error(why) });
            }
        }
        other => tell(Inbox::Sender(link, other)),
    }
}
