//! The table of commands.

use super::{Context, Outcome, connection, disk, strings, system, work};

/// One command.
pub(super) struct Command {
    /// In lower case.
    pub(super) name: &'static str,
    /// Number of arguments with the name; negative: at least this many.
    pub(super) arity: i32,
    /// First key, last key (negative: from the end) and step between keys; zeros for none.
    pub(super) keys: (i32, i32, i32),
    /// Its function.
    pub(super) run: fn(&mut Context<'_>) -> Outcome,
}

impl Command {
    /// True when the command takes this many arguments.
    pub(super) fn takes(&self, count: usize) -> bool {
        let count = i32::try_from(count).unwrap_or(i32::MAX);
        if self.arity < 0 { count >= -self.arity } else { count == self.arity }
    }
}

const NONE: (i32, i32, i32) = (0, 0, 0);
const ONE: (i32, i32, i32) = (1, 1, 1);
const ALL: (i32, i32, i32) = (1, -1, 1);

const fn command(
    name: &'static str,
    arity: i32,
    keys: (i32, i32, i32),
    run: fn(&mut Context<'_>) -> Outcome,
) -> Command {
    Command { name, arity, keys, run }
}

/// All commands, the frequent ones first: the search is linear.
pub(super) static COMMANDS: [Command; 35] = [
    command("get", 2, ONE, strings::get),
    command("set", -3, ONE, strings::set),
    command("incr", 2, ONE, strings::incr),
    command("ping", -1, NONE, connection::ping),
    command("mset", -3, (1, -1, 2), strings::mset),
    command("mget", -2, ALL, strings::mget),
    command("del", -2, ALL, strings::del),
    command("exists", -2, ALL, strings::exists),
    command("incrby", 3, ONE, strings::incrby),
    command("decr", 2, ONE, strings::decr),
    command("decrby", 3, ONE, strings::decrby),
    command("append", 3, ONE, strings::append),
    command("strlen", 2, ONE, strings::strlen),
    command("getset", 3, ONE, strings::getset),
    command("setnx", 3, ONE, strings::setnx),
    command("getdel", 2, ONE, strings::getdel),
    command("unlink", -2, ALL, strings::del),
    command("type", 2, ONE, strings::kind),
    command("echo", 2, NONE, connection::echo),
    command("select", 2, NONE, connection::select),
    command("hello", -1, NONE, connection::hello),
    command("client", -2, NONE, connection::client),
    command("quit", -1, NONE, connection::quit),
    command("reset", 1, NONE, connection::reset),
    command("auth", -2, NONE, connection::auth),
    command("dbsize", 1, NONE, system::dbsize),
    command("flushall", -1, NONE, system::flush),
    command("flushdb", -1, NONE, system::flush),
    command("info", -1, NONE, system::info),
    command("config", -2, NONE, system::config),
    command("command", -1, NONE, system::command),
    command("shutdown", -1, NONE, system::shutdown),
    command("debug", -2, NONE, system::debug),
    command("work", -2, NONE, work::work),
    command("disk", -2, NONE, disk::disk),
];

/// The command of this name, in any case.
pub(super) fn find(name: &[u8]) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| name.eq_ignore_ascii_case(command.name.as_bytes()))
}
