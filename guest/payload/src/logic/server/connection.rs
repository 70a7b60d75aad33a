//! One connection: input to the parser, commands, output to the socket.

use core::fmt::Write;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{Socket, State};

use super::super::command::{self, Client, Context, Machine, Outcome, Totals};
use super::super::resp::{Fed, ParseError, Parser, Reply};
use super::super::store::Store;

/// A client with this much unread output is not read from: it has to take its replies first.
const OUTPUT_HIGH: usize = 64 << 10;
/// Commands of one connection before the others get their turn.
const COMMANDS_PER_TURN: usize = 64;
/// A connection may use this much buffer even when the budget of all connections is used up.
const FREE_BUFFER: usize = 64 << 10;
/// After our end is closed, the client gets this long to close its own.
const LINGER_US: u64 = 5_000_000;

/// The server's task after a turn.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Nothing until something happens.
    Wait,
    /// Give another turn soon.
    Again,
    /// The connection is over.
    Remove,
    /// DEBUG SLEEP: run no command for this many microseconds.
    Sleep(u64),
    /// Append the list of clients to the output.
    ListClients,
    /// Shut everything down.
    Shutdown,
}

/// The inputs of a connection's turn.
pub(super) struct Turn<'a, 'b> {
    pub(super) socket: &'a mut Socket<'b>,
    pub(super) store: &'a mut Store,
    pub(super) totals: &'a mut Totals,
    pub(super) machine: &'a mut dyn Machine,
    pub(super) now_us: u64,
    /// No commands now.
    pub(super) asleep: bool,
    /// The budget for the buffers of all connections is used up.
    pub(super) buffers_full: bool,
}

/// One connection.
pub(super) struct Connection {
    pub(super) handle: SocketHandle,
    /// The handshake was completed.
    pub(super) greeted: bool,
    pub(super) out: Reply,
    client: Client,
    parser: Parser,
    /// The verification whose end the client waits for.
    awaiting: Option<u32>,
    /// DEBUG SLEEP replies when the sleep is over.
    sleeping: bool,
    /// No more commands; close when the output is sent.
    closing: bool,
    /// When our end was closed.
    closed_at: Option<u64>,
}

impl Connection {
    pub(super) fn new(handle: SocketHandle, id: u64) -> Self {
        Self {
            handle,
            greeted: false,
            out: Reply::default(),
            client: Client::new(id),
            parser: Parser::default(),
            awaiting: None,
            sleeping: false,
            closing: false,
            closed_at: None,
        }
    }

    /// Bytes of heap in use beside the socket.
    pub(super) fn footprint(&self) -> usize {
        self.out.footprint() + self.parser.footprint()
    }

    /// Close when the output is sent.
    pub(super) fn close(&mut self) {
        self.closing = true;
    }

    /// One line of CLIENT LIST.
    pub(super) fn describe(&self, socket: &Socket<'_>, text: &mut Reply) {
        let name = core::str::from_utf8(self.client.name()).unwrap_or("");
        let _ = write!(text, "id={} ", self.client.id);
        if let Some(remote) = socket.remote_endpoint() {
            let _ = write!(text, "addr={remote} ");
        }
        let _ = writeln!(
            text,
            "name={name} db=0 qbuf={} omem={} resp=2",
            self.parser.footprint(),
            self.out.footprint()
        );
    }

    /// Sends, reads and executes as much as possible.
    pub(super) fn serve(&mut self, mut turn: Turn<'_, '_>) -> Next {
        match turn.socket.state() {
            // A reset during the handshake sends the socket back to LISTEN.
            State::Closed | State::Listen => return Next::Remove,
            State::SynReceived => return Next::Wait,
            _ => {}
        }
        if let Some(since) = self.closed_at {
            return drain(turn.socket, since, turn.now_us);
        }
        self.flush(turn.socket);
        if !turn.asleep {
            self.finish_waiting(turn.machine);
        }
        let next = self.run_commands(&mut turn);
        self.flush(turn.socket);
        if self.out.overflowed() {
            turn.socket.abort();
            return Next::Again;
        }
        let peer_done = !turn.socket.may_recv() && self.awaiting.is_none();
        if (self.closing || peer_done) && self.out.pending().is_empty() && next != Next::ListClients {
            turn.socket.close();
            self.closed_at = Some(turn.now_us);
        }
        next
    }

    fn flush(&mut self, socket: &mut Socket<'_>) {
        if !self.out.pending().is_empty() && socket.can_send() {
            let sent = socket.send_slice(self.out.pending()).unwrap_or(0);
            self.out.advance(sent);
        }
    }

    fn finish_waiting(&mut self, machine: &mut dyn Machine) {
        if core::mem::take(&mut self.sleeping) {
            self.out.ok();
        }
        if let Some(number) = self.awaiting
            && machine.control().is_verified(machine.workers(), number)
        {
            self.awaiting = None;
            command::verification_result(machine, &mut self.out);
        }
    }

    fn run_commands(&mut self, turn: &mut Turn<'_, '_>) -> Next {
        for _ in 0..COMMANDS_PER_TURN {
            if self.closing
                || turn.asleep
                || self.awaiting.is_some()
                || self.out.pending().len() >= OUTPUT_HIGH
            {
                return Next::Wait;
            }
            if !turn.socket.can_recv() {
                return Next::Wait;
            }
            if turn.buffers_full && self.footprint() > FREE_BUFFER {
                self.fail(format_args!("ERR the memory for client buffers is used up"));
                return Next::Again;
            }
            match self.read(turn.socket) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => {
                    self.fail(format_args!("ERR {error}"));
                    return Next::Again;
                }
            }
            match self.execute(turn) {
                Outcome::Done => {}
                Outcome::Close => {
                    self.closing = true;
                    return Next::Again;
                }
                Outcome::ListClients => return Next::ListClients,
                Outcome::AwaitVerification(number) => {
                    self.awaiting = Some(number);
                    return Next::Again;
                }
                Outcome::Sleep(us) => {
                    self.sleeping = true;
                    return Next::Sleep(us);
                }
                Outcome::Shutdown => return Next::Shutdown,
            }
        }
        Next::Again
    }

    /// Feeds the parser. True when a command is complete.
    fn read(&mut self, socket: &mut Socket<'_>) -> Result<bool, ParseError> {
        let parser = &mut self.parser;
        let fed = socket.recv(|input| match parser.feed(input) {
            Ok(Fed::More) => (input.len(), Ok(false)),
            Ok(Fed::Command(len)) => (len, Ok(true)),
            Err(error) => (input.len(), Err(error)),
        });
        fed.unwrap_or(Ok(false))
    }

    fn execute(&mut self, turn: &mut Turn<'_, '_>) -> Outcome {
        let outcome = command::execute(&mut Context {
            args: self.parser.args(),
            store: &mut *turn.store,
            machine: &mut *turn.machine,
            client: &mut self.client,
            totals: &mut *turn.totals,
            out: &mut self.out,
        });
        self.parser.finish();
        outcome
    }

    fn fail(&mut self, text: core::fmt::Arguments<'_>) {
        self.out.error(text);
        self.closing = true;
    }
}

/// Throws input away until the client has closed its end too.
fn drain(socket: &mut Socket<'_>, since_us: u64, now_us: u64) -> Next {
    while socket.can_recv() {
        if socket.recv(|input| (input.len(), ())).is_err() {
            break;
        }
    }
    if now_us.saturating_sub(since_us) > LINGER_US && socket.state() == State::FinWait2 {
        socket.abort();
        return Next::Again;
    }
    Next::Wait
}
