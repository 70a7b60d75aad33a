//! Two releases, one of them older.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use outlive_epoch::{Encoder, PREFACE_LEN, Preface, ProtocolVersion, RefuseCode};

use crate::support::{Client, Side, Value, World};

/// The view of a primary whose standby knows only version 2 of the stream: the standby refuses a later
/// introduction, and reads and writes only that version.
struct OlderStandby {
    addr: String,
    refused: Arc<AtomicU32>,
}

impl OlderStandby {
    /// On host `side`, with the other host's standby behind it.
    fn start(world: &World, side: Side) -> OlderStandby {
        let listener = world.on(side, || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
        let addr = listener.local_addr().unwrap().to_string();
        let older = OlderStandby { addr, refused: Arc::default() };
        let (refused, standby) = (older.refused.clone(), side.other().addr());
        // The thread is in the host's network. It ends with the test's process.
        world.on(side, || {
            thread::spawn(move || {
                for mut primary in listener.incoming().flatten() {
                    let mut preface = [0; PREFACE_LEN];
                    if primary.read_exact(&mut preface).is_err() {
                        continue;
                    }
                    if Preface::parse(&preface).unwrap().version > ProtocolVersion::V2 {
                        refused.fetch_add(1, Ordering::Relaxed);
                        refuse(primary);
                    } else if let Ok(mut standby) = TcpStream::connect(standby) {
                        standby.write_all(&preface).unwrap();
                        join(primary, standby);
                    }
                }
            })
        });
        older
    }
}

/// The messages of that release.
fn refuse(mut primary: TcpStream) {
    let version = ProtocolVersion::V2;
    let mut out = Preface { version }.encode().to_vec();
    let text =
        "the peer speaks protocol version 3; this release knows versions up to 2: upgrade the older side";
    Encoder::speaking(version).refuse(&mut out, RefuseCode::Version, text);
    drop(primary.write_all(&out));
    primary.shutdown(Shutdown::Write).ok();
    drop(primary.read_to_end(&mut Vec::new()));
}

/// Passes everything on in both directions. The standby's first bytes must be of version 2: an older primary
/// could read nothing else.
fn join(primary: TcpStream, standby: TcpStream) {
    let ways =
        [(primary.try_clone().unwrap(), standby.try_clone().unwrap(), false), (standby, primary, true)];
    for (mut from, mut to, is_answer) in ways {
        thread::spawn(move || {
            from.set_nodelay(true).unwrap();
            let mut preface = [0; PREFACE_LEN];
            if is_answer && from.read_exact(&mut preface).is_ok() {
                assert_eq!(preface, Preface { version: ProtocolVersion::V2 }.encode());
                drop(to.write_all(&preface));
            }
            drop(std::io::copy(&mut from, &mut to));
            to.shutdown(Shutdown::Write).ok();
            from.shutdown(Shutdown::Read).ok();
        });
    }
}

#[test]
fn a_vm_is_protected_and_taken_over_in_the_version_of_the_release_before() {
    let Some(world) = World::plain() else { return };
    let mut standby = world.standby(Side::B);
    let older = OlderStandby::start(&world, Side::A);
    let mut primary = world.run_with(Side::A, &["--standby", &older.addr]);
    primary.wait_protected();
    primary.wait_says("the standby is older: the next attempt is in its version 2", 1);
    standby.wait_says("version=2", 1);
    assert_eq!(
        older.refused.load(Ordering::Relaxed),
        2,
        "the question before the start, and the first introduction; then in its words"
    );

    let mut client = Client::connect(&world);
    assert_eq!(client.ask("SET release before"), Ok(Value::Status("OK".into())));
    primary.kill();
    let before = Ok(Value::Bulk(Some(b"before".to_vec())));
    standby.wait_takeover();
    assert_eq!(client.ask("GET release"), before);

    // Without the older release between them they use the newest version.
    let successor = world.standby(Side::A);
    standby.wait_protected();
    successor.wait_says(&format!("version={}", ProtocolVersion::CURRENT as u32), 1);
    assert_eq!(client.ask("GET release"), before);
}
