//! Commands about the server and the machine.

use core::fmt::Write;

use super::super::resp::{MAX_BULK, Reply, number};
use super::table::{self, COMMANDS};
use super::{Context, Outcome};

/// The version of Redis whose behaviour the commands follow.
pub(super) const VERSION: &str = "7.2.0";

/// Numbers about the machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Facts {
    /// Microseconds since boot, without the time for which the VM was stopped.
    pub uptime_us: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// Frames sent.
    pub frames_sent: u64,
    /// Notifications of the network card.
    pub net_kicks: u64,
    /// Times vCPU 0 went to sleep.
    pub idles: u64,
}

/// Counters of the server.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Commands since boot.
    pub commands: u64,
    /// Connections since boot.
    pub connections: u64,
    /// Connections now.
    pub clients: usize,
    /// Most connections.
    pub max_clients: usize,
    /// New connections dropped because there were too many.
    pub dropped_connections: u64,
    /// Bytes in buffers of clients.
    pub client_bytes: usize,
}

/// The client.
#[derive(Debug)]
pub struct Client {
    /// Number of the connection, from 1.
    pub id: u64,
    name: [u8; 64],
    name_len: usize,
}

impl Client {
    /// Client number `id`.
    pub fn new(id: u64) -> Self {
        Self { id, name: [0; 64], name_len: 0 }
    }

    /// The name the client gave itself.
    pub fn name(&self) -> &[u8] {
        &self.name[..self.name_len]
    }

    /// False, with the name unchanged, when the name is too long or not printable.
    pub fn set_name(&mut self, name: &[u8]) -> bool {
        let good = name.len() <= self.name.len() && name.iter().all(u8::is_ascii_graphic);
        if good {
            self.name[..name.len()].copy_from_slice(name);
            self.name_len = name.len();
        }
        good
    }
}

pub(super) fn dbsize(cx: &mut Context<'_>) -> Outcome {
    cx.out.integer(cx.store.len() as i64);
    Outcome::Done
}

pub(super) fn flush(cx: &mut Context<'_>) -> Outcome {
    if cx.args.len() > 2 || (cx.args.len() == 2 && !cx.is(1, "sync") && !cx.is(1, "async")) {
        return cx.syntax_error();
    }
    cx.store.clear();
    cx.out.ok();
    Outcome::Done
}

pub(super) fn info(cx: &mut Context<'_>) -> Outcome {
    let facts = cx.machine.facts();
    let mut text = Reply::default();
    let wanted = |name: &str| {
        cx.args.len() == 1
            || (1..cx.args.len())
                .any(|i| cx.is(i, name) || cx.is(i, "all") || cx.is(i, "default") || cx.is(i, "everything"))
    };
    // Writing to a `Reply` never fails; if memory runs out the reply is marked as broken.
    if wanted("server") {
        let _ = write!(text, "# Server\r\nserver_name:outlive-payload\r\nredis_version:{VERSION}\r\n");
        let _ = write!(text, "redis_mode:standalone\r\narch_bits:64\r\ntcp_port:6379\r\n");
        let _ = write!(text, "uptime_in_seconds:{}\r\n\r\n", facts.uptime_us / 1_000_000);
    }
    if wanted("clients") {
        let _ = write!(text, "# Clients\r\nconnected_clients:{}\r\n", cx.totals.clients);
        let _ = write!(text, "maxclients:{}\r\n", cx.totals.max_clients);
        let _ = write!(text, "client_buffer_bytes:{}\r\n\r\n", cx.totals.client_bytes);
    }
    if wanted("memory") {
        let _ =
            write!(text, "# Memory\r\nused_memory:{}\r\nmaxmemory:{}\r\n", cx.store.used(), cx.store.limit());
        let _ =
            write!(text, "maxmemory_policy:noeviction\r\ntotal_system_memory:{}\r\n\r\n", facts.memory_bytes);
    }
    if wanted("stats") {
        let _ = write!(text, "# Stats\r\ntotal_connections_received:{}\r\n", cx.totals.connections);
        let _ = write!(text, "total_commands_processed:{}\r\n", cx.totals.commands);
        let _ = write!(text, "rejected_connections:{}\r\n\r\n", cx.totals.dropped_connections);
    }
    if wanted("machine") {
        let _ = write!(text, "# Machine\r\nvcpus:{}\r\nframes_sent:{}\r\n", facts.vcpus, facts.frames_sent);
        let _ = write!(text, "net_kicks:{}\r\nidles:{}\r\n\r\n", facts.net_kicks, facts.idles);
    }
    if wanted("keyspace") {
        let _ = write!(text, "# Keyspace\r\n");
        if cx.store.len() > 0 {
            let _ = write!(text, "db0:keys={},expires=0,avg_ttl=0\r\n", cx.store.len());
        }
    }
    if text.overflowed() {
        return cx.fail("not enough memory");
    }
    cx.out.bulk(text.pending());
    Outcome::Done
}

/// The settings that CONFIG GET knows.
fn setting(cx: &Context<'_>, index: usize, value: &mut Reply) -> Option<&'static str> {
    let (name, number) = match index {
        0 => ("maxmemory", cx.store.limit()),
        1 => ("maxclients", cx.totals.max_clients),
        2 => ("proto-max-bulk-len", MAX_BULK),
        3 => ("databases", 1),
        4 => ("port", 6379),
        5 => ("save", 0),
        6 => ("appendonly", 0),
        7 => ("maxmemory-policy", 0),
        _ => return None,
    };
    let _ = match name {
        "save" => Ok(()),
        "appendonly" => value.write_str("no"),
        "maxmemory-policy" => value.write_str("noeviction"),
        _ => write!(value, "{number}"),
    };
    Some(name)
}

pub(super) fn config(cx: &mut Context<'_>) -> Outcome {
    if cx.is(1, "resetstat") && cx.args.len() == 2 {
        (cx.totals.commands, cx.totals.connections, cx.totals.dropped_connections) = (0, 0, 0);
        cx.out.ok();
        return Outcome::Done;
    }
    if cx.is(1, "set") {
        return cx.fail("CONFIG SET is not supported: the settings follow from the size of the VM");
    }
    if !cx.is(1, "get") || cx.args.len() < 3 {
        return cx.unknown_subcommand();
    }
    let mut found = Reply::default();
    let mut count = 0;
    for index in 0.. {
        let mut value = Reply::default();
        let Some(name) = setting(cx, index, &mut value) else { break };
        if cx.args.from(2).any(|pattern| matches_glob(pattern, name)) {
            found.bulk(name.as_bytes());
            found.bulk(value.pending());
            count += 2;
        }
    }
    cx.out.array(count);
    cx.out.raw(found.pending());
    Outcome::Done
}

/// A name in any case, or the start of a name and `*`.
fn matches_glob(pattern: &[u8], name: &str) -> bool {
    let name = name.as_bytes();
    match pattern {
        [head @ .., b'*'] => name.len() >= head.len() && name[..head.len()].eq_ignore_ascii_case(head),
        _ => pattern.eq_ignore_ascii_case(name),
    }
}

pub(super) fn command(cx: &mut Context<'_>) -> Outcome {
    if cx.args.len() == 1 {
        cx.out.array(COMMANDS.len());
        COMMANDS.iter().for_each(|command| describe(cx.out, Some(command)));
    } else if cx.is(1, "count") {
        cx.out.integer(COMMANDS.len() as i64);
    } else if cx.is(1, "docs") {
        // redis-cli asks for hints; none is a valid answer.
        cx.out.array(0);
    } else if cx.is(1, "info") {
        cx.out.array(cx.args.len() - 2);
        cx.args.from(2).for_each(|name| describe(cx.out, table::find(name)));
    } else {
        return cx.unknown_subcommand();
    }
    Outcome::Done
}

fn describe(out: &mut Reply, command: Option<&table::Command>) {
    let Some(command) = command else { return out.raw(b"*-1\r\n") };
    out.array(6);
    out.bulk(command.name.as_bytes());
    out.integer(command.arity.into());
    out.array(0);
    for position in [command.keys.0, command.keys.1, command.keys.2] {
        out.integer(position.into());
    }
}

pub(super) fn shutdown(cx: &mut Context<'_>) -> Outcome {
    let known = |index| ["nosave", "now", "force"].iter().any(|word| cx.is(index, word));
    if cx.is(1, "save") {
        return cx.fail("SHUTDOWN SAVE is not supported: nothing is kept beyond the VM");
    }
    if !(1..cx.args.len()).all(known) {
        return cx.syntax_error();
    }
    Outcome::Shutdown
}

pub(super) fn debug(cx: &mut Context<'_>) -> Outcome {
    if cx.is(1, "sleep") && cx.args.len() == 3 {
        let Some(us) = seconds(cx.arg(2)) else { return cx.fail("value is not a valid float") };
        return Outcome::Sleep(us);
    }
    if cx.is(1, "panic") {
        panic!("DEBUG PANIC");
    }
    cx.unknown_subcommand()
}

/// Seconds with an optional fraction, as microseconds; at most an hour.
fn seconds(text: &[u8]) -> Option<u64> {
    let mut parts = text.splitn(2, |byte| *byte == b'.');
    let whole = parts.next().filter(|digits| !digits.is_empty()).unwrap_or(b"0");
    let fraction = parts.next().unwrap_or(b"");
    let whole = u64::try_from(number(whole)?).ok()?;
    let mut us = 0;
    for place in 0..6 {
        let digit = fraction.get(place).copied().unwrap_or(b'0');
        us = us * 10 + u64::from(digit.checked_sub(b'0').filter(|digit| *digit < 10)?);
    }
    whole.checked_mul(1_000_000)?.checked_add(us).filter(|us| *us <= 3_600_000_000)
}
