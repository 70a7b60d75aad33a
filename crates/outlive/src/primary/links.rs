//! The thread that makes connections and ends them, so that no decision waits for a network.

use std::cell::Cell;
use std::sync::mpsc::{Receiver, Sender as Channel, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use outlive_epoch::{ProtocolVersion, RefuseCode, VmId};
use outlive_pair::{Link, LossReason, PrimaryEvent};

use super::driver::SharedDriver;
use super::inbox::{Inbox, Queue};
use super::pool::Pool;
use super::ports::Connection;
use super::stats::Totals;
use crate::link::{self, Heard, Security, Sender, SenderReport};

/// The thread's orders.
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
    /// What protects the connections.
    pub(crate) security: Security,
    /// The VM, which the standby must be allowed to hold.
    pub(crate) vm: VmId,
    /// Time between two heartbeats of a sender's own.
    pub(crate) heartbeat: Duration,
    /// Counts what is sent.
    pub(crate) totals: Arc<Totals>,
    /// Takes the senders' reports.
    pub(crate) inbox: Queue,
}

/// The orders' queue, for a thread that does not run yet.
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
    let older = vec![None; plan.standbys.len()];
    let older = Older(Arc::new(Mutex::new(older)));
    while let Ok(errand) = errands.recv() {
        match errand {
            // Its thread may not come, and must not keep this one from the next standby.
            Errand::Close(mut connection) => connection.sender.close_and_leave(),
            Errand::Dial { link, address: index } => {
                let address = &plan.standbys[index];
                let dialled = link::dial(address, &plan.security, Some(plan.vm));
                let Some(driver) = driver.upgrade() else { return };
                let standby = Standby { link, address, index, older: &older };
                let connected = dialled.and_then(|connection| connect(&driver, plan, &standby, connection));
                if let Err(error) = connected {
                    let (why, lasts) = (format!("{address}: {error}"), link::lasts(&error));
                    driver.handle(PrimaryEvent::DialFailed { link, why, lasts });
                }
            }
        }
    }
}

/// Standbys that have refused an introduction which they could not read, with the version of their own. Such a
/// one is spoken to in that version at the next attempt, and as usual at the one after that: it may have been
/// upgraded meanwhile.
#[derive(Clone)]
struct Older(Arc<Mutex<Vec<Option<ProtocolVersion>>>>);

impl Older {
    fn with<T>(&self, standby: usize, work: impl FnOnce(&mut Option<ProtocolVersion>) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner)[standby])
    }
}

/// Whom a connection leads to.
struct Standby<'a> {
    link: Link,
    address: &'a str,
    index: usize,
    older: &'a Older,
}

/// Gives a new connection its two threads, and the driver the connection.
fn connect(
    driver: &Arc<SharedDriver>,
    plan: &Plan,
    standby: &Standby<'_>,
    connection: link::Connection,
) -> std::io::Result<()> {
    let &Standby { link, address, index, older } = standby;
    let link::Connection { reader, writer, closer, host: _ } = connection;
    let (peer, kind) = (reader.peer(), reader.kind());
    let introduction = older.with(index, Option::take).unwrap_or(ProtocolVersion::INTRODUCTION);
    let pool = Arc::new(Pool::default());
    let report = reporter(link, pool.clone(), Arc::downgrade(driver), plan);
    let (clock, pulse) = (driver.clock(), driver.pulse().clone());
    let sender = Sender::start(writer, closer, clock, pulse, plan.heartbeat, introduction, report)?;
    driver.connected(Connection {
        link,
        sender,
        address: address.to_owned(),
        pool,
        peer,
        kind,
        agreed: None,
    });
    let (receiving, older) = (driver.clone(), older.clone());
    let received = outlive_machine::spawn("receiver", move || {
        let theirs = Cell::new(introduction);
        link::receive(reader, link, |heard| match heard {
            Heard::Introduction(version) => theirs.set(version),
            Heard::Agreed(agreed) => receiving.agreed(link, agreed),
            Heard::Audited(audited) => receiving.tell(Inbox::Audited(audited)),
            Heard::Sees(sight) => receiving.tell(Inbox::StandbySees(link, sight)),
            Heard::DiskAudited(audited) => receiving.tell(Inbox::DiskAudited(audited)),
            Heard::Event(event @ PrimaryEvent::StandbyReaches { reaches, .. }) => {
                receiving.tell(Inbox::StandbyReaches(link, reaches));
                receiving.handle(event);
            }
            Heard::Want(want) => receiving.tell(Inbox::DiskWant(link, want)),
            Heard::Event(PrimaryEvent::Refused { code: Ok(RefuseCode::Version), .. })
                if theirs.get() < introduction =>
            {
                let version = theirs.get();
                older.with(index, |it| *it = Some(version));
                let why =
                    format!("the standby is older: the next attempt is in its version {}", version as u32);
                receiving.handle(PrimaryEvent::LinkLost { link, why: LossReason::Error(why) });
            }
            Heard::Event(event) => receiving.handle(event),
        });
    });
    if let Err(error) = received {
        let why = LossReason::Local(format!("cannot start a thread: {error}"));
        driver.handle(PrimaryEvent::LinkLost { link, why });
    }
    Ok(())
}

/// Handles a sender's reports, on its thread.
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
        SenderReport::Written(counts) => totals.written(&counts),
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
