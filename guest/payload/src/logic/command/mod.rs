//! The commands: their arguments, their work, their replies.

mod connection;
mod disk;
mod strings;
mod system;
mod table;
mod work;

#[cfg(test)]
mod tests;

use alloc::vec::Vec;

pub use disk::{BLOCK, Disk};
pub use system::{Client, Facts, Totals};
pub use work::verification_result;

use super::resp::{Args, Reply};
use super::store::{Store, StoreError};
use super::work::Control;

/// The machine as the commands see it.
pub trait Machine {
    /// Numbers for INFO and WORK STAT.
    fn facts(&self) -> Facts;
    /// The first disk, if the VM has one that can be used.
    fn disk(&mut self) -> Option<&mut dyn Disk>;
    /// The board of the work load.
    fn control(&self) -> &Control;
    /// Number of its workers.
    fn workers(&self) -> usize;
    /// Most pages one worker has.
    fn worker_pages(&self) -> u64;
    /// The board changed: wake the workers.
    fn wake_workers(&mut self);
}

/// The server's task after a command. The reply is in the output already unless stated otherwise.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing.
    Done,
    /// Close the connection when the output is sent.
    Close,
    /// List the clients, then reply.
    ListClients,
    /// Hold the connection until this verification is finished, then reply with its result.
    AwaitVerification(u32),
    /// Execute nothing for this many microseconds, then reply OK.
    Sleep(u64),
    /// Close all connections and power off.
    Shutdown,
}

/// Everything that a command works on.
pub struct Context<'a> {
    /// The request.
    pub args: &'a Args,
    /// The data.
    pub store: &'a mut Store,
    /// The machine.
    pub machine: &'a mut dyn Machine,
    /// The client.
    pub client: &'a mut Client,
    /// Counters of the server.
    pub totals: &'a mut Totals,
    /// The destination of the reply.
    pub out: &'a mut Reply,
}

impl Context<'_> {
    fn arg(&self, index: usize) -> &[u8] {
        self.args.get(index)
    }

    /// True when argument `index` is the given word in any case.
    fn is(&self, index: usize, word: &str) -> bool {
        self.arg(index).eq_ignore_ascii_case(word.as_bytes())
    }

    fn fail(&mut self, text: &str) -> Outcome {
        self.out.error(format_args!("ERR {text}"));
        Outcome::Done
    }

    fn syntax_error(&mut self) -> Outcome {
        self.fail("syntax error")
    }

    fn refuse(&mut self, error: StoreError) -> Outcome {
        match error {
            StoreError::OutOfMemory => {
                self.out.error(format_args!("OOM command not allowed when used memory > 'maxmemory'."));
                Outcome::Done
            }
            StoreError::TooLong => self.fail("string exceeds maximum allowed size (proto-max-bulk-len)"),
        }
    }

    /// The error for a subcommand that does not exist.
    fn unknown_subcommand(&mut self) -> Outcome {
        let (command, sub) = (lossy(self.args.get(0), 32, true), lossy(self.args.get(1), 64, false));
        self.out.error(format_args!("ERR unknown subcommand '{}'. Try {} HELP.", Text(&sub), Text(&command)));
        Outcome::Done
    }
}

/// Runs the command in `context.args`.
pub fn execute(context: &mut Context<'_>) -> Outcome {
    context.totals.commands += 1;
    let Some(command) = table::find(context.arg(0)) else { return unknown(context) };
    if !command.takes(context.args.len()) {
        context.out.error(format_args!("ERR wrong number of arguments for '{}' command", command.name));
        return Outcome::Done;
    }
    (command.run)(context)
}

fn unknown(context: &mut Context<'_>) -> Outcome {
    let name = lossy(context.args.get(0), 128, false);
    let mut shown = Vec::new();
    for arg in context.args.from(1) {
        let piece = lossy(arg, 128 - shown.len().min(128), false);
        if shown.try_reserve(piece.len() + 3).is_err() || shown.len() >= 128 {
            break;
        }
        shown.push(b'\'');
        shown.extend_from_slice(&piece);
        shown.extend_from_slice(b"' ");
    }
    context.out.error(format_args!(
        "ERR unknown command '{}', with args beginning with: {}",
        Text(&name),
        Text(&shown)
    ));
    Outcome::Done
}

/// The first `limit` bytes as printable ASCII; empty when there is no memory for them.
fn lossy(bytes: &[u8], limit: usize, upper: bool) -> Vec<u8> {
    let bytes = &bytes[..bytes.len().min(limit)];
    let mut text = Vec::new();
    if text.try_reserve_exact(bytes.len()).is_ok() {
        let show = |byte: &u8| if byte.is_ascii_graphic() || *byte == b' ' { *byte } else { b'?' };
        text.extend(bytes.iter().map(show).map(|byte| if upper { byte.to_ascii_uppercase() } else { byte }));
    }
    text
}

/// ASCII bytes for formatting.
struct Text<'a>(&'a [u8]);

impl core::fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(core::str::from_utf8(self.0).unwrap_or("?"))
    }
}
