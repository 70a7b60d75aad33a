//! The console without a guest: hubs, sockets, terminals (pseudo-terminals of the kernel) and the attaching
//! side.

mod attach;
mod hub;
mod server;

use std::fs::File;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use nix::pty::openpty;
use nix::sys::termios::{LocalFlags, tcgetattr};

/// A terminal: the person's side and the program's.
fn terminal() -> (File, File) {
    let pair = openpty(None, None).unwrap();
    (pair.master.into(), pair.slave.into())
}

fn is_raw(terminal: &File) -> bool {
    !tcgetattr(terminal).unwrap().local_flags.contains(LocalFlags::ICANON)
}

fn wait_for(what: &str, mut until: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !until() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Reads until the bytes read end with `end`.
fn read_to(from: &mut impl Read, end: &[u8]) -> Vec<u8> {
    let mut got = Vec::new();
    while !got.ends_with(end) {
        let mut byte = [0];
        from.read_exact(&mut byte)
            .unwrap_or_else(|e| panic!("{e} after {:?}", String::from_utf8_lossy(&got)));
        got.push(byte[0]);
    }
    got
}

fn put(to: &mut impl Write, bytes: &[u8]) {
    to.write_all(bytes).unwrap();
}
