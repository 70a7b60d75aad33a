//! Commands about the connection itself.

use super::super::resp::number;
use super::system::VERSION;
use super::{Context, Outcome};

pub(super) fn ping(cx: &mut Context<'_>) -> Outcome {
    match cx.args.len() {
        1 => cx.out.simple("PONG"),
        2 => cx.out.bulk(cx.args.get(1)),
        _ => return cx.fail("wrong number of arguments for 'ping' command"),
    }
    Outcome::Done
}

pub(super) fn echo(cx: &mut Context<'_>) -> Outcome {
    cx.out.bulk(cx.args.get(1));
    Outcome::Done
}

pub(super) fn select(cx: &mut Context<'_>) -> Outcome {
    match number(cx.arg(1)) {
        Some(0) => {
            cx.out.ok();
            Outcome::Done
        }
        Some(_) => cx.fail("DB index is out of range"),
        None => cx.fail("value is not an integer or out of range"),
    }
}

pub(super) fn quit(cx: &mut Context<'_>) -> Outcome {
    cx.out.ok();
    Outcome::Close
}

pub(super) fn reset(cx: &mut Context<'_>) -> Outcome {
    cx.client.set_name(b"");
    cx.out.simple("RESET");
    Outcome::Done
}

pub(super) fn auth(cx: &mut Context<'_>) -> Outcome {
    cx.fail("Client sent AUTH, but no password is set. This server knows no passwords.")
}

pub(super) fn hello(cx: &mut Context<'_>) -> Outcome {
    if cx.args.len() > 1 {
        match number(cx.arg(1)) {
            Some(2) => {}
            Some(_) => {
                cx.out.error(format_args!("NOPROTO unsupported protocol version"));
                return Outcome::Done;
            }
            None => return cx.fail("Protocol version is not an integer or out of range"),
        }
    }
    let mut index = 2;
    while index < cx.args.len() {
        if cx.is(index, "setname") && index + 1 < cx.args.len() {
            if !cx.client.set_name(cx.args.get(index + 1)) {
                return bad_name(cx);
            }
            index += 2;
        } else if cx.is(index, "auth") {
            return auth(cx);
        } else {
            return cx.syntax_error();
        }
    }
    cx.out.array(14);
    for (name, value) in [("server", "redis"), ("version", VERSION)] {
        cx.out.bulk(name.as_bytes());
        cx.out.bulk(value.as_bytes());
    }
    cx.out.field("proto", 2);
    cx.out.field("id", cx.client.id);
    for (name, value) in [("mode", "standalone"), ("role", "master")] {
        cx.out.bulk(name.as_bytes());
        cx.out.bulk(value.as_bytes());
    }
    cx.out.bulk(b"modules");
    cx.out.array(0);
    Outcome::Done
}

fn bad_name(cx: &mut Context<'_>) -> Outcome {
    cx.fail(
        "Client names cannot contain spaces, newlines or special characters and are at most 64 bytes long.",
    )
}

pub(super) fn client(cx: &mut Context<'_>) -> Outcome {
    let count = cx.args.len();
    if cx.is(1, "id") && count == 2 {
        cx.out.integer(cx.client.id as i64);
    } else if cx.is(1, "getname") && count == 2 {
        let name = cx.client.name();
        cx.out.bulk_or_null(if name.is_empty() { None } else { Some(name) });
    } else if cx.is(1, "setname") && count == 3 {
        if !cx.client.set_name(cx.args.get(2)) {
            return bad_name(cx);
        }
        cx.out.ok();
    } else if (cx.is(1, "setinfo") && count == 4)
        || ((cx.is(1, "no-evict") || cx.is(1, "no-touch")) && count == 3)
    {
        // Nothing is ever evicted here and no statistics are kept per key.
        cx.out.ok();
    } else if cx.is(1, "list") {
        return Outcome::ListClients;
    } else {
        return cx.unknown_subcommand();
    }
    Outcome::Done
}
