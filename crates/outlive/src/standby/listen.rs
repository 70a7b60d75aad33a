//! The standby's port: whoever connects is heard, and refused unless it is the one primary that belongs here.
//!
//! Every connection has a thread of its own until it is accepted or refused, so that nobody who connects and
//! says nothing keeps the primary out; their number is bounded.

use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use outlive_epoch::{Hello, IncomingLimits, Message, Peer, ReadError, RefuseCode, SectionReader, WireError};
use outlive_pair::{Introduction, Link};

use super::control::Control;
use super::copy::VmCopy;
use super::session::{Admitted, Session};
use crate::arbiter::{self, Arbiter};
use crate::link::{Incoming, Listener, Reader};
use crate::vm::limits::{ACCEPTED_DISK_BYTES, ACCEPTED_STATE_BYTES, ACCEPTED_STATE_SECTIONS};

/// Connections that may be heard at the same time. One is the primary's.
const MAX_HEARD: usize = 64;
/// How long a connection may take to introduce itself, from its first byte to its last.
const INTRODUCTION: Duration = Duration::from_secs(2);

/// Starts the thread that accepts connections.
///
/// # Errors
/// The operating system's.
pub(super) fn start(listener: Listener, control: Arc<Control>) -> io::Result<()> {
    outlive_machine::spawn("listen", move || {
        accept_all(&listener, &control);
    })?;
    Ok(())
}

fn accept_all(listener: &Listener, control: &Arc<Control>) {
    let heard = Arc::new(AtomicUsize::new(0));
    let numbers = AtomicU64::new(0);
    let seldom = Arc::new(Seldom::default());
    loop {
        let incoming = match listener.accept() {
            Ok(incoming) => incoming,
            Err(error) => {
                // Out of descriptors, most likely. A tight loop would not make that better.
                tracing::warn!(%error, "cannot accept a connection");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if heard.fetch_add(1, Ordering::AcqRel) >= MAX_HEARD {
            heard.fetch_sub(1, Ordering::AcqRel);
            if seldom.allows() {
                tracing::warn!(from = incoming.peer(), "too many connections, some are dropped");
            }
            continue;
        }
        let number = Link(numbers.fetch_add(1, Ordering::Relaxed));
        let (control, count, seldom) = (control.clone(), heard.clone(), seldom.clone());
        let started = outlive_machine::spawn("session", move || {
            serve(&control, incoming, number, &seldom);
            control.disconnect(number);
            count.fetch_sub(1, Ordering::AcqRel);
        });
        if let Err(error) = started {
            heard.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!(%error, "cannot start a thread for a connection");
        }
    }
}

fn serve(control: &Arc<Control>, incoming: Incoming, number: Link, seldom: &Seldom) {
    let from = incoming.peer();
    let opened = incoming.open().and_then(|connection| {
        control.connect(number, connection.writer, connection.closer)?;
        Ok(connection.reader)
    });
    let mut stream = match opened {
        Ok(stream) => stream,
        Err(error) => {
            tracing::warn!(from, %error, "a connection cannot be served");
            return;
        }
    };
    let mut reader = SectionReader::new(Peer::Primary);
    let hello = match introduction(&mut reader, &mut stream) {
        Ok(hello) => hello,
        Err(error) => {
            if seldom.allows() {
                match &error {
                    ReadError::Io(late) if late.kind() == io::ErrorKind::WouldBlock => {
                        tracing::warn!(from, "a connection said nothing in time; a primary would try again");
                    }
                    _ => tracing::warn!(from, "not a primary: {error}"),
                }
            }
            match error {
                // To a stranger nothing is said.
                ReadError::Wire(WireError::NotOutlive { .. }) | ReadError::Io(_) | ReadError::Closed => {}
                ReadError::Wire(ref wire @ WireError::UnknownProtocol { .. }) => {
                    control.refuse(number, RefuseCode::Version, &wire.to_string());
                }
                other => control.refuse(number, RefuseCode::Malformed, &other.to_string()),
            }
            return;
        }
    };
    match admit(control, number, &hello) {
        Ok(admitted) => {
            if stream.set_timeout(None).is_ok() {
                Session::new(control.clone(), number, stream, reader, admitted).run();
            }
        }
        Err((code, text)) => control.refuse(number, code, &text),
    }
}

fn introduction(reader: &mut SectionReader, stream: &mut Reader) -> Result<Hello, ReadError> {
    let mut stream = Until { stream, deadline: Instant::now() + INTRODUCTION };
    reader.read_preface(&mut stream)?;
    let section = reader.read_section(&mut stream)?;
    let kind = section.kind();
    match Message::parse(&section)? {
        Message::Hello(hello) => Ok(*hello),
        _ => Err(WireError::Malformed {
            kind,
            what: "a connection begins with Hello, not with this",
            value: 0,
        }
        .into()),
    }
}

/// A stream that can be read until a moment, however slowly the bytes come.
struct Until<'a> {
    stream: &'a mut Reader,
    deadline: Instant,
}

impl Read for Until<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_timeout(Some(left))?;
        self.stream.read(to)
    }
}

/// Lets a line into the log once a second: whoever connects must not be able to fill the disk.
#[derive(Default)]
struct Seldom(Mutex<Option<Instant>>);

impl Seldom {
    fn allows(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let allows = last.is_none_or(|last| last.elapsed() >= Duration::from_secs(1));
        if allows {
            *last = Some(Instant::now());
        }
        allows
    }
}

type Refusal = (RefuseCode, String);

/// Checks everything that speaks against this primary, and sets memory aside for its VM.
fn admit(control: &Arc<Control>, link: Link, hello: &Hello) -> Result<Admitted, Refusal> {
    let introduction = Introduction {
        vm: hello.vm,
        generation: hello.generation,
        slots: hello.limits.slots.into(),
        dead_after: Duration::from_micros(hello.dead_after_us),
    };
    control.would_accept(&introduction)?;
    let Hello { vm, name, .. } = hello;
    if let Some(served) = control.options.vm.as_ref().filter(|it| *it != name && **it != vm.to_string()) {
        let text = format!("this standby is kept for VM {served}, not for {name} ({vm})");
        return Err((RefuseCode::WrongVm, text));
    }
    let arbiter = same_arbiter(control, hello)?;
    let told = control.clone();
    let tell = move |it| told.disks(link, it);
    let copy = VmCopy::new(hello, &control.host, &control.options, &control.console, arbiter, tell)?;
    let (ram, disks) = (copy.ram(), copy.disks());
    let refuse = |text: String| (RefuseCode::Resources, text);
    let limits = IncomingLimits {
        max_pages: hello.limits.max_pages.min(u32::try_from(hello.layout.pages()).unwrap_or(u32::MAX)),
        max_state_bytes: hello.limits.max_state_bytes.min(ACCEPTED_STATE_BYTES),
        max_state_sections: ACCEPTED_STATE_SECTIONS,
        max_disk_bytes: hello.limits.max_disk_bytes.min(ACCEPTED_DISK_BYTES),
    };
    let staging = outlive_epoch::Incoming::new(limits, hello.layout.clone(), hello.generation)
        .map_err(|e| refuse(e.to_string()))?;
    let staging = staging.with_disks(disks.sizes());
    let claims = control.claim_worker(hello.vm).map_err(refuse)?;
    if !control.hello(link, introduction, copy, claims) {
        // Another primary was faster; the refusal has been sent.
        return Err((RefuseCode::Busy, "another primary is attached".into()));
    }
    Ok(Admitted { staging, ram, disks })
}

/// Two hosts that were given different directories would both win every generation. The primary has won its
/// own at the arbiter before it dialled, so this side must find it there.
fn same_arbiter(control: &Control, hello: &Hello) -> Result<Box<dyn Arbiter>, Refusal> {
    let spec = &control.options.arbiter;
    let mut here = arbiter::parse(spec).map_err(|e| (RefuseCode::Busy, e.to_string()))?;
    if hello.arbiter != here.identity() {
        let text = format!(
            "the standby's arbiter {spec} (id {}) is not the primary's (id {}): give both hosts the same directory",
            here.identity(),
            hello.arbiter
        );
        return Err((RefuseCode::Resources, text));
    }
    match here.highest(&arbiter::VmId(hello.vm.0)) {
        Ok(Some(highest)) if highest == hello.generation => Ok(here),
        Ok(Some(highest)) if highest > hello.generation => Err((
            RefuseCode::StaleGeneration,
            format!("generation {} is out of date: the arbiter knows generation {highest}", hello.generation),
        )),
        Ok(_) => Err((
            RefuseCode::Resources,
            format!("the standby's arbiter {spec} does not know this VM: give both hosts the same directory"),
        )),
        Err(why) => Err((RefuseCode::Busy, format!("the standby's arbiter {spec} cannot be read: {why}"))),
    }
}
