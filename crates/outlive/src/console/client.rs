//! A client of a port: it attached to a socket, reads, and perhaps writes.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use nix::poll::PollFlags;
use outlive_machine::devices::port::PortInput;

use super::hub::Hub;

/// Bytes on their way from a hub to one reader.
#[derive(Debug)]
pub(crate) struct ClientOutput {
    position: u64,
    bytes: Box<[u8]>,
    from: usize,
    to: usize,
    /// The destination has no room.
    pub(crate) blocked: bool,
}

/// Room for a part of the output and for the note about what is missing before it.
const PART: usize = 4096;
const NOTE: usize = 64;

impl ClientOutput {
    /// Begins with the oldest byte that is kept.
    pub(crate) fn new(hub: &Hub) -> Self {
        let bytes = vec![0; NOTE + PART].into_boxed_slice();
        Self { position: hub.oldest(), bytes, from: 0, to: 0, blocked: false }
    }

    /// Everything printed before `end` has been written.
    pub(crate) fn is_done(&self, end: u64) -> bool {
        self.position >= end && self.from == self.to
    }

    /// There was something to write.
    pub(crate) fn is_due(&self, end: u64) -> bool {
        !self.blocked && !self.is_done(end)
    }

    /// Writes, at most `most` bytes at once, until there is no more output or no room. Fails when the
    /// destination is gone.
    pub(crate) fn pump(&mut self, hub: &Hub, to: &mut impl Write, most: usize) -> io::Result<()> {
        while !self.blocked {
            if self.from == self.to && !self.fill(hub) {
                return Ok(());
            }
            let part = self.from..self.to.min(self.from + most);
            match to.write(&self.bytes[part]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => self.from += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.blocked = true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes once, at most `most` bytes: for a destination that reported room and may block on a second
    /// write.
    pub(crate) fn pump_once(&mut self, hub: &Hub, to: &mut impl Write, most: usize) -> io::Result<()> {
        if self.from == self.to && !self.fill(hub) {
            return Ok(());
        }
        let part = self.from..self.to.min(self.from + most);
        match to.write(&self.bytes[part]) {
            Ok(count) => self.from += count,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn fill(&mut self, hub: &Hub) -> bool {
        let read = hub.read(&mut self.position, &mut self.bytes[NOTE..]);
        (self.from, self.to) = (NOTE, NOTE + read.count);
        if read.lost > 0 {
            let note = format!("\r\n[outlive: {} bytes lost]\r\n", read.lost);
            self.from = NOTE - note.len();
            self.bytes[self.from..NOTE].copy_from_slice(note.as_bytes());
        }
        self.from < self.to
    }
}

/// A client that attached to a socket.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) socket: UnixStream,
    pub(crate) out: ClientOutput,
    /// The client may still send.
    sends: bool,
    /// The client has hung up; only what it sent before matters.
    hung_up: bool,
}

/// Whether a client stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Stays,
    Goes,
}

impl Client {
    pub(crate) fn new(socket: UnixStream, hub: &Hub) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, out: ClientOutput::new(hub), sends: true, hung_up: false })
    }

    /// What to wait for; `None` means nothing at all, not even the client's end.
    pub(crate) fn interest(&self, room: usize) -> Option<PollFlags> {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::POLLIN, self.sends && room > 0);
        flags.set(PollFlags::POLLOUT, self.out.blocked && !self.hung_up);
        // `poll` always reports a hang-up. After a known one the client must not be polled, or `poll` would
        // never wait.
        (!self.hung_up || !flags.is_empty()).then_some(flags)
    }

    /// Acts on what `poll` reported.
    pub(crate) fn ready(&mut self, found: PollFlags, input: &PortInput, buffer: &mut [u8]) -> Fate {
        if found.contains(PollFlags::POLLOUT) {
            self.out.blocked = false;
        }
        if found.contains(PollFlags::POLLIN) && self.sends {
            self.sends = self.receive(input, buffer);
        }
        if found.intersects(PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL) {
            self.hung_up = true;
            if found.contains(PollFlags::POLLERR) {
                self.sends = false;
            }
        }
        if self.hung_up && !self.sends { Fate::Goes } else { Fate::Stays }
    }

    /// Writes what is due.
    pub(crate) fn pump(&mut self, hub: &Hub) -> Fate {
        if self.hung_up {
            return Fate::Stays;
        }
        let Self { socket, out, .. } = self;
        if out.pump(hub, socket, PART).is_ok() { Fate::Stays } else { Fate::Goes }
    }

    fn receive(&mut self, input: &PortInput, buffer: &mut [u8]) -> bool {
        let room = input.room().min(buffer.len());
        if room == 0 {
            return true;
        }
        match self.socket.read(&mut buffer[..room]) {
            Ok(0) => false,
            Ok(count) => {
                // Only other clients take room, and this thread serves them too.
                input.push(&buffer[..count]);
                true
            }
            Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
    }
}
