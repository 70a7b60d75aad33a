//! Asks a standby whether it is about to take a VM over, before this host starts the VM anew.
//!
//! The question is an introduction that offers no checkpoints. Every release refuses it, and before that says that
//! it is busy if it is: a standby accepts nothing from the loss of its primary until the VM runs there.

use std::io::{self, ErrorKind, Write};
use std::time::Duration;

use outlive_epoch::{
    Encoder, GfnRange, Hello, Layout, Limits, Lineage, Message, Peer, Preface, ProtocolVersion, ReadError,
    Refuse, RefuseCode, SectionReader, VersionRange, VmId,
};

use crate::link::{self, Security};
use crate::process;

/// How long each part of the answer may take.
const ANSWER: Duration = Duration::from_secs(1);

/// What is known of a standby.
#[derive(Debug)]
pub(crate) enum Answer {
    /// It is not taking a VM over: it says so, or nobody listens there.
    Idle,
    /// It has a primary, has lost one, or has the VM. The text is its own.
    Busy(String),
    /// It does not say: it may be taking a VM over.
    Unknown(String),
    /// There is no way to it now. Of that host nothing is known.
    Unreachable(String),
}

/// Asks the standby at `address` (HOST:PORT). Takes a few seconds at most.
pub(crate) fn ask(address: &str, security: &Security) -> Answer {
    let connection = match link::dial(address, security, None) {
        Ok(connection) => connection,
        // The host is there, and no process of it listens.
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Answer::Idle,
        // It is there, and does not let this host in, or says nothing.
        Err(error) if link::was_reached(&error) => return Answer::Unknown(error.to_string()),
        Err(error) => return Answer::Unreachable(error.to_string()),
    };
    match refusal(connection) {
        Ok(Refuse { code: Ok(RefuseCode::Busy), text }) => Answer::Busy(text),
        // Nothing was looked at yet.
        Ok(Refuse { code: Ok(RefuseCode::Version | RefuseCode::Malformed) | Err(_), text }) => {
            Answer::Unknown(text)
        }
        Ok(_) => Answer::Idle,
        Err(error) => Answer::Unknown(error.to_string()),
    }
}

fn refusal(connection: link::Connection) -> Result<Refuse, ReadError> {
    let link::Connection { mut reader, mut writer, closer: _closer, host: _ } = connection;
    reader.set_timeout(Some(ANSWER))?;
    let mut bytes = Preface { version: ProtocolVersion::INTRODUCTION }.encode().to_vec();
    let mut encoder = Encoder::speaking(ProtocolVersion::INTRODUCTION);
    encoder.hello(&mut bytes, &question()).map_err(io::Error::other)?;
    writer.write_all(&bytes)?;
    let mut sections = SectionReader::new(Peer::Standby);
    sections.read_preface(&mut reader)?;
    match Message::parse(&sections.read_section(&mut reader)?)? {
        Message::Refuse(refuse) => Ok(refuse),
        _ => Err(io::Error::other("it answers something else").into()),
    }
}

/// An introduction that nobody accepts.
fn question() -> Hello {
    let page = GfnRange { start: 0, pages: 1 };
    Hello {
        vm: VmId([0; 16]),
        generation: 0,
        vcpus: 0,
        memory_bytes: 0,
        layout: Layout::new(vec![page]).expect("one page is a layout"),
        firmware_bytes: 0,
        devices: Vec::new(),
        mac: None,
        limits: Limits { max_pages: 0, max_state_bytes: 0, slots: 0, max_disk_bytes: 0 },
        interval_us: 0,
        dead_after_us: 0,
        name: String::new(),
        host: process::host_name(),
        tracker: String::new(),
        vendor: String::new(),
        arbiter: String::new(),
        lineage: Lineage::default(),
        versions: VersionRange::CURRENT,
        microcode: 0,
        vcpu: None,
        since: None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn answers(with: impl FnOnce(TcpStream, Hello) + Send + 'static) -> Answer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let standby = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut reader = SectionReader::new(Peer::Primary);
            reader.read_preface(&mut stream).unwrap();
            let section = reader.read_section(&mut stream).unwrap();
            let Message::Hello(hello) = Message::parse(&section).unwrap() else { panic!("no Hello") };
            with(stream, *hello);
        });
        let answer = ask(&address, &Security::Open);
        standby.join().unwrap();
        answer
    }

    fn refuses(code: RefuseCode) -> Answer {
        answers(move |mut stream, _| {
            let version = ProtocolVersion::INTRODUCTION;
            let mut bytes = Preface { version }.encode().to_vec();
            Encoder::speaking(version).refuse(&mut bytes, code, "why");
            stream.write_all(&bytes).unwrap();
        })
    }

    #[test]
    fn a_standby_that_does_not_say_that_it_is_idle_may_be_taking_over() {
        assert!(matches!(refuses(RefuseCode::Busy), Answer::Busy(why) if why == "why"));
        for idle in [RefuseCode::Resources, RefuseCode::WrongVm, RefuseCode::StaleGeneration] {
            assert!(matches!(refuses(idle), Answer::Idle), "{idle:?}");
        }
        for unknown in [RefuseCode::Version, RefuseCode::Malformed] {
            assert!(matches!(refuses(unknown), Answer::Unknown(_)), "{unknown:?}");
        }
        assert!(matches!(answers(|_, _| {}), Answer::Unknown(_)), "it hangs up");
        let stuck = answers(|_stream, _| std::thread::sleep(ANSWER + ANSWER / 2));
        assert!(matches!(stuck, Answer::Unknown(_)), "{stuck:?}");
        // Nobody accepts it.
        assert!(matches!(answers(|_, hello| assert_eq!(hello.limits.slots, 0)), Answer::Unknown(_)));
        // With keys: a process that is stopped is there, and one behind a cut cable is not known to be.
        let keys = tempfile::tempdir().unwrap();
        let keys = keys.path().join("keys");
        let life = Duration::from_secs(3600);
        let order = crate::keys::Order { host: "a".into(), grant: crate::keys::Grant::ALL, life };
        crate::keys::init(&keys, &order).unwrap();
        let stopped = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = stopped.local_addr().unwrap().to_string();
        let answer = ask(&address, &Security::Keys(keys.clone()));
        assert!(matches!(answer, Answer::Unknown(_)), "{answer:?}");
        let answer = ask("no.such.host.invalid:7000", &Security::Keys(keys));
        assert!(matches!(answer, Answer::Unreachable(_)), "{answer:?}");
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        assert!(matches!(ask(&nobody, &Security::Open), Answer::Idle));
    }
}
