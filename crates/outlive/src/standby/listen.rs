//! The standby's port: whoever connects is heard, and refused unless it is the one primary that belongs here.
//!
//! Every connection has a thread of its own until it is accepted or refused, so that nobody who connects and says nothing
//! keeps the primary out; their number is bounded.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use outlive_epoch::{
    Hello, Message, Peer, ReadError, RefuseCode, SectionReader, Staging, StagingLimits, WireError,
};
use outlive_pair::{Introduction, Link};

use super::control::Control;
use super::copy::VmCopy;
use super::session::Session;
use crate::{arbiter, link};

/// Connections that may be heard at the same time. One is the primary's.
const MAX_HEARD: usize = 16;
/// How long a connection may take to introduce itself.
const INTRODUCTION: Duration = Duration::from_secs(2);
/// State bytes of a checkpoint that a primary may ask room for.
const MAX_STATE_BYTES: u32 = 16 << 20;
/// State sections of a checkpoint: constants and registers of 8 vCPUs, the VM, and devices.
const MAX_STATE_SECTIONS: u32 = 64;

/// Starts the thread that accepts connections.
///
/// # Errors
/// The operating system's.
pub(super) fn start(listener: TcpListener, control: Arc<Control>) -> io::Result<()> {
    std::thread::Builder::new().name("listen".into()).spawn(move || {
        outlive_machine::block_all_signals(false);
        accept_all(&listener, &control);
    })?;
    Ok(())
}

fn accept_all(listener: &TcpListener, control: &Arc<Control>) {
    let heard = Arc::new(AtomicUsize::new(0));
    let numbers = AtomicU64::new(0);
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely. A tight loop would not make that better.
                tracing::warn!(%error, "cannot accept a connection");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if heard.fetch_add(1, Ordering::AcqRel) >= MAX_HEARD {
            heard.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!(from = link::peer(&stream), "too many connections, one is dropped");
            continue;
        }
        let number = Link(numbers.fetch_add(1, Ordering::Relaxed));
        let (control, count) = (control.clone(), heard.clone());
        let started = std::thread::Builder::new().name("session".into()).spawn(move || {
            outlive_machine::block_all_signals(false);
            serve(&control, stream, number);
            control.disconnect(number);
            count.fetch_sub(1, Ordering::AcqRel);
        });
        if let Err(error) = started {
            heard.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!(%error, "cannot start a thread for a connection");
        }
    }
}

fn serve(control: &Arc<Control>, mut stream: TcpStream, number: Link) {
    let from = link::peer(&stream);
    let prepared = link::prepare(&stream)
        .and_then(|()| stream.set_read_timeout(Some(INTRODUCTION)))
        .and_then(|()| stream.try_clone())
        .and_then(|writer| control.connect(number, writer));
    if let Err(error) = prepared {
        tracing::warn!(from, %error, "a connection cannot be served");
        return;
    }
    let mut reader = SectionReader::new(Peer::Primary);
    let hello = match introduction(&mut reader, &mut stream) {
        Ok(hello) => hello,
        Err(error) => {
            tracing::warn!(from, "not a primary: {error}");
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
        Ok((staging, ram)) => {
            if stream.set_read_timeout(None).is_ok() {
                Session::new(control.clone(), number, stream, reader, staging, ram).run();
            }
        }
        Err((code, text)) => control.refuse(number, code, &text),
    }
}

fn introduction(reader: &mut SectionReader, stream: &mut TcpStream) -> Result<Hello, ReadError> {
    reader.read_preface(stream)?;
    let section = reader.read_section(stream)?;
    let kind = section.kind();
    match Message::parse(&section)? {
        Message::Hello(hello) => Ok(hello),
        _ => Err(WireError::Malformed {
            kind,
            what: "a connection begins with Hello, not with this",
            value: 0,
        }
        .into()),
    }
}

type Refusal = (RefuseCode, String);

/// Checks everything that speaks against this primary, and sets memory aside for its VM.
fn admit(
    control: &Arc<Control>,
    link: Link,
    hello: &Hello,
) -> Result<(Staging, Arc<outlive_machine::Ram>), Refusal> {
    let introduction = Introduction {
        vm: hello.vm,
        generation: hello.generation,
        dead_after: Duration::from_micros(hello.dead_after_us),
    };
    control.would_accept(&introduction)?;
    same_arbiter(control, hello)?;
    let copy = VmCopy::new(hello, &control.host, &control.options)?;
    let ram = copy.ram();
    let refuse = |text: String| (RefuseCode::Resources, text);
    let limits = StagingLimits {
        max_pages: hello.limits.max_pages.min(u32::try_from(hello.layout.pages()).unwrap_or(u32::MAX)),
        max_state_bytes: hello.limits.max_state_bytes.min(MAX_STATE_BYTES),
        max_state_sections: MAX_STATE_SECTIONS,
    };
    let staging =
        Staging::new(limits, hello.layout.clone(), hello.generation).map_err(|e| refuse(e.to_string()))?;
    let claims = control.claim_worker(hello.vm).map_err(refuse)?;
    if !control.hello(link, introduction, copy, claims) {
        // Another primary was faster; the refusal has been sent.
        return Err((RefuseCode::Busy, "another primary is attached".into()));
    }
    Ok((staging, ram))
}

/// Two hosts that were given different directories would both win every generation. The primary has won its own at the
/// arbiter before it dialled, so this side must find it there.
fn same_arbiter(control: &Control, hello: &Hello) -> Result<(), Refusal> {
    let spec = &control.options.arbiter;
    let mut here = arbiter::parse(spec).map_err(|e| (RefuseCode::Busy, e.to_string()))?;
    match here.highest(&arbiter::VmId(hello.vm.0)) {
        Ok(Some(highest)) if highest == hello.generation => Ok(()),
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
