//! What a standby says to one peer: queued by the thread that decides, written later.
//!
//! Queuing copies a few bytes, so it is done under the lock of the decisions, and the order of the decisions
//! is the order on the wire. Writing is a system call, so the thread that brought the event does it after
//! dropping that lock: no thread must be woken while a guest's clients wait for an acknowledgement. The write
//! never waits. Bytes that do not fit into the socket stay here until the next write, a heartbeat at the
//! latest; a peer that reads nothing for long is given up.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use outlive_epoch::{EncodeError, Encoder, Preface, ProtocolVersion};

use crate::link::{Closer, Writer};

/// How many bytes may wait here, after the socket has taken what it can.
const MAX_WAITING: usize = 256 << 10;
/// How long a peer may take to read that this standby leaves, and to close.
pub(super) const FAREWELL: Duration = Duration::from_secs(1);

/// Why a connection takes no message.
#[derive(Debug, thiserror::Error)]
pub(super) enum PutError {
    /// It ends after what is queued.
    #[error("the connection is being closed")]
    Closing,
    /// Too much waits for the peer.
    #[error("the primary does not read what this standby sends")]
    NotRead,
    /// The message is too long.
    #[error(transparent)]
    Encode(#[from] EncodeError),
}

/// The outbox; see the module.
pub(super) struct Outbox {
    queue: Mutex<Queue>,
    /// The thread that holds this lock writes. Taken before `queue`, never after it.
    sending: Mutex<Sending>,
    closer: Closer,
}

struct Queue {
    encoder: Encoder,
    greeted: bool,
    bytes: Vec<u8>,
    end: Option<End>,
}

/// What happens after the last byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The peer reads the rest, and closes.
    Finish,
    /// The same, with a peer that still sends: the connection is broken once it has had [`FAREWELL`]. Until
    /// then its reader must drop what comes; see [`Reader::drop_the_rest`](crate::link::Reader::drop_the_rest).
    Leave,
    /// The connection is broken.
    Close,
}

struct Sending {
    writer: Writer,
    bytes: Vec<u8>,
    sent: usize,
    /// Nothing more goes out.
    over: bool,
}

impl Outbox {
    /// For a new connection.
    pub(super) fn new(writer: Writer, closer: Closer) -> Self {
        let (bytes, greeted, end) = (Vec::with_capacity(4096), false, None);
        let queue = Mutex::new(Queue { encoder: Encoder::new(), greeted, bytes, end });
        let sending = Mutex::new(Sending { writer, bytes: Vec::with_capacity(4096), sent: 0, over: false });
        Self { queue, sending, closer }
    }

    /// The peer introduces itself in this version, so that the answer must be in it too. To be called before
    /// the first message.
    pub(super) fn introduce(&self, version: ProtocolVersion) {
        self.queue().encoder.speak(version);
    }

    /// Queues a message, and before the first one the preface. The message does not go out before
    /// [`write`](Self::write).
    ///
    /// # Errors
    /// See [`PutError`].
    pub(super) fn put(
        &self,
        encode: impl FnOnce(&mut Encoder, &mut Vec<u8>) -> Result<(), EncodeError>,
    ) -> Result<(), PutError> {
        let mut queue = self.queue();
        let Queue { encoder, greeted, bytes, end } = &mut *queue;
        if end.is_some() {
            return Err(PutError::Closing);
        }
        if bytes.len() > MAX_WAITING {
            *end = Some(End::Close);
            return Err(PutError::NotRead);
        }
        if !std::mem::replace(greeted, true) {
            bytes.extend_from_slice(&Preface { version: encoder.stream() }.encode());
        }
        Ok(encode(encoder, bytes)?)
    }

    /// Ends the connection after what is queued.
    pub(super) fn end(&self, how: End) {
        let mut queue = self.queue();
        if queue.end != Some(End::Close) {
            queue.end = Some(how);
        }
    }

    /// Whether there may be a last word, or it is a leave.
    pub(super) fn may_leave(&self) -> bool {
        matches!(self.queue().end, None | Some(End::Leave))
    }

    /// Writes as much of the queue as fits, and ends the connection if that is due. Waits for nothing but
    /// another thread that does the same.
    pub(super) fn write(&self) {
        let mut sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        while !sending.over {
            if sending.sent == sending.bytes.len() {
                let mut queue = self.queue();
                sending.bytes.clear();
                sending.sent = 0;
                std::mem::swap(&mut sending.bytes, &mut queue.bytes);
                if sending.bytes.is_empty() {
                    if let Some(end) = queue.end {
                        sending.over = true;
                        drop(queue);
                        self.carry_out(end);
                    }
                    return;
                }
            }
            match sending.writer.write_now(&sending.bytes[sending.sent..]) {
                Ok(count) => sending.sent += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nobody would write the rest later, because the connection ends.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.queue().end.is_none() => {
                    return;
                }
                // The reader of this connection notices and reports the loss.
                Err(_) => {
                    sending.over = true;
                    self.carry_out(End::Close);
                }
            }
        }
    }

    fn carry_out(&self, end: End) {
        match end {
            End::Finish => self.closer.finish(),
            End::Leave => {
                self.closer.finish();
                let closer = self.closer.clone();
                let waits = outlive_machine::spawn("farewell", move || {
                    std::thread::sleep(FAREWELL);
                    closer.close();
                });
                if waits.is_err() {
                    self.closer.close();
                }
            }
            End::Close => self.closer.close(),
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::time::Instant;

    use outlive_epoch::{Ack, LeaveReason, Message, Peer, ReadError, SectionReader};

    use super::*;
    use crate::link::{Listener, Reader, Security};

    /// How many messages a socket takes even if its peer does not read.
    const MANY: u64 = 1000;

    /// An outbox and the other end of its connection. The reader keeps the socket open.
    fn connected() -> (Outbox, Reader, TcpStream) {
        let listener = Listener::reserve("127.0.0.1:0").unwrap();
        listener.listen().unwrap();
        let peer = TcpStream::connect(listener.address().unwrap()).unwrap();
        let connection = listener.accept().unwrap().open(&Security::Open).unwrap();
        (Outbox::new(connection.writer, connection.closer), connection.reader, peer)
    }

    fn ack(outbox: &Outbox, number: u64) -> Result<(), PutError> {
        outbox.put(|encoder, out| {
            encoder.ack(out, &Ack { generation: 1, number, stamp_us: number });
            Ok(())
        })
    }

    fn numbers(peer: &mut TcpStream) -> (Vec<u64>, ReadError) {
        let mut reader = SectionReader::new(Peer::Standby);
        reader.read_preface(peer).unwrap();
        let mut numbers = Vec::new();
        loop {
            match reader.read_section(peer) {
                Ok(section) => match Message::parse(&section).unwrap() {
                    Message::Ack(ack) => numbers.push(ack.number),
                    other => panic!("{other:?}"),
                },
                Err(error) => return (numbers, error),
            }
        }
    }

    #[test]
    fn messages_go_out_in_the_order_in_which_they_were_queued_whoever_writes() {
        let (outbox, _reader, mut peer) = connected();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for number in 1..=MANY {
                    ack(&outbox, number).unwrap();
                    if number % 3 == 0 {
                        outbox.write();
                    }
                }
                outbox.end(End::Finish);
                outbox.write();
            });
            scope.spawn(|| (0..MANY).for_each(|_| outbox.write()));
            let (numbers, error) = numbers(&mut peer);
            assert_eq!(numbers, (1..=MANY).collect::<Vec<_>>());
            assert!(matches!(error, ReadError::Closed), "{error:?}");
        });
        assert!(ack(&outbox, 1).is_err(), "nothing comes after the end");
    }

    #[test]
    fn a_peer_that_reads_nothing_makes_nobody_wait_and_is_given_up() {
        let (outbox, _reader, mut peer) = connected();
        let began = Instant::now();
        let mut number = 0;
        let why = loop {
            number += 1;
            if let Err(why) = ack(&outbox, number) {
                break why.to_string();
            }
            outbox.write();
            assert!(began.elapsed() < Duration::from_secs(60));
        };
        assert!(why.contains("does not read"), "{why}");
        // What is queued is lost; the reader of the connection notices the end.
        outbox.write();
        let mut rest = Vec::new();
        peer.read_to_end(&mut rest).unwrap();
        assert!(!rest.is_empty(), "the socket took nothing");
    }

    fn leave(outbox: &Outbox) {
        let put = outbox.put(|encoder, out| {
            encoder.leave(out, LeaveReason::Released);
            Ok(())
        });
        put.unwrap();
        outbox.end(End::Leave);
        outbox.write();
    }

    /// A primary in the middle of a checkpoint.
    #[test]
    fn a_leave_arrives_although_the_peer_still_sends() {
        let (outbox, mut reader, mut peer) = connected();
        leave(&outbox);
        let reading = std::thread::spawn(move || reader.drop_the_rest());
        for _ in 0..200 {
            peer.write_all(&[0; 64 << 10]).expect("the connection is not reset");
        }
        let mut reader = SectionReader::new(Peer::Standby);
        reader.read_preface(&mut peer).unwrap();
        let section = reader.read_section(&mut peer).unwrap();
        assert!(matches!(Message::parse(&section).unwrap(), Message::Leave(LeaveReason::Released)));
        assert!(matches!(reader.read_section(&mut peer), Err(ReadError::Closed)));
        drop(peer);
        reading.join().unwrap();
    }

    #[test]
    fn a_peer_that_does_not_close_is_not_waited_for() {
        let (outbox, mut reader, _peer) = connected();
        leave(&outbox);
        // Returns; the peer is still there.
        reader.drop_the_rest();
    }

    fn is_out(outbox: &Outbox) -> bool {
        let sending = outbox.sending.lock().unwrap();
        sending.sent == sending.bytes.len()
    }

    #[test]
    fn what_did_not_fit_goes_out_later() {
        let (outbox, _reader, mut peer) = connected();
        let mut last = 0;
        // Until the sockets are full.
        while is_out(&outbox) {
            for _ in 0..1000 {
                last += 1;
                ack(&outbox, last).unwrap();
            }
            outbox.write();
        }
        let reading = std::thread::spawn(move || numbers(&mut peer));
        let began = Instant::now();
        while !is_out(&outbox) {
            assert!(began.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(1));
            outbox.write();
        }
        outbox.end(End::Close);
        outbox.write();
        let (numbers, _) = reading.join().unwrap();
        assert_eq!(numbers, (1..=last).collect::<Vec<_>>());
    }
}
