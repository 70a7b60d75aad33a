//! Commands on keys and values.

use super::super::resp::{Reply, decimal, number};
use super::super::store::StoreError;
use super::{Context, Outcome};

pub(super) fn get(cx: &mut Context<'_>) -> Outcome {
    cx.out.bulk_or_null(cx.store.get(cx.args.get(1)));
    Outcome::Done
}

/// Options of SET that make sense without expiry.
#[derive(Default)]
struct SetOptions {
    only_new: bool,
    only_existing: bool,
    reply_old: bool,
}

impl SetOptions {
    fn read(cx: &Context<'_>) -> Result<Self, &'static str> {
        let mut options = Self::default();
        for index in 3..cx.args.len() {
            if cx.is(index, "nx") {
                options.only_new = true;
            } else if cx.is(index, "xx") {
                options.only_existing = true;
            } else if cx.is(index, "get") {
                options.reply_old = true;
            } else if ["ex", "px", "exat", "pxat", "keepttl"].iter().any(|word| cx.is(index, word)) {
                return Err(
                    "this server does not expire keys: EX, PX, EXAT, PXAT and KEEPTTL are not supported",
                );
            } else {
                return Err("syntax error");
            }
        }
        if options.only_new && options.only_existing { Err("syntax error") } else { Ok(options) }
    }
}

pub(super) fn set(cx: &mut Context<'_>) -> Outcome {
    let options = match SetOptions::read(cx) {
        Ok(options) => options,
        Err(text) => return cx.fail(text),
    };
    if !options.only_new && !options.only_existing && !options.reply_old {
        return store(cx, Reply::ok);
    }
    let (key, value) = (cx.args.get(1), cx.args.get(2));
    let old = cx.store.get(key);
    let skip = if old.is_some() { options.only_new } else { options.only_existing };
    if skip {
        cx.out.bulk_or_null(if options.reply_old { old } else { None });
        return Outcome::Done;
    }
    if !options.reply_old {
        return store(cx, Reply::ok);
    }
    replace(cx, key, value)
}

/// Sets the key to the value of the request and replies by `reply`.
fn store(cx: &mut Context<'_>, reply: fn(&mut Reply)) -> Outcome {
    match cx.store.set(cx.args.get(1), cx.args.get(2)) {
        Ok(()) => {
            reply(cx.out);
            Outcome::Done
        }
        Err(error) => cx.refuse(error),
    }
}

/// Sets `key` and replies with its old value.
fn replace(cx: &mut Context<'_>, key: &[u8], value: &[u8]) -> Outcome {
    // The old value must be in the output before it is overwritten, and must not be there if the write is
    // refused.
    let growth = value.len().saturating_sub(cx.store.get(key).map_or(0, <[u8]>::len));
    if growth > 0 && !cx.store.has_room([(key, value)].into_iter()) {
        return cx.refuse(StoreError::OutOfMemory);
    }
    cx.out.bulk_or_null(cx.store.get(key));
    // With room in the budget this fails only if the heap is too fragmented, and then the reply is out
    // already.
    if cx.store.set(key, value).is_err() { Outcome::Close } else { Outcome::Done }
}

pub(super) fn getset(cx: &mut Context<'_>) -> Outcome {
    let (key, value) = (cx.args.get(1), cx.args.get(2));
    replace(cx, key, value)
}

pub(super) fn setnx(cx: &mut Context<'_>) -> Outcome {
    if cx.store.get(cx.args.get(1)).is_some() {
        cx.out.integer(0);
        return Outcome::Done;
    }
    store(cx, |out| out.integer(1))
}

pub(super) fn getdel(cx: &mut Context<'_>) -> Outcome {
    let key = cx.args.get(1);
    cx.out.bulk_or_null(cx.store.get(key));
    cx.store.remove(key);
    Outcome::Done
}

pub(super) fn mget(cx: &mut Context<'_>) -> Outcome {
    cx.out.array(cx.args.len() - 1);
    for key in cx.args.from(1) {
        cx.out.bulk_or_null(cx.store.get(key));
    }
    Outcome::Done
}

pub(super) fn mset(cx: &mut Context<'_>) -> Outcome {
    let args = cx.args;
    if args.len().is_multiple_of(2) {
        return cx.fail("wrong number of arguments for 'mset' command");
    }
    let pairs = || (1..args.len()).step_by(2).map(|index| (args.get(index), args.get(index + 1)));
    // All or nothing: if not all of them fit, no key is set.
    if !cx.store.has_room(pairs()) {
        return cx.refuse(StoreError::OutOfMemory);
    }
    for (key, value) in pairs() {
        if let Err(error) = cx.store.set(key, value) {
            return cx.refuse(error);
        }
    }
    cx.out.ok();
    Outcome::Done
}

pub(super) fn del(cx: &mut Context<'_>) -> Outcome {
    let removed = cx.args.from(1).filter(|key| cx.store.remove(key)).count();
    cx.out.integer(removed as i64);
    Outcome::Done
}

pub(super) fn exists(cx: &mut Context<'_>) -> Outcome {
    let found = cx.args.from(1).filter(|key| cx.store.get(key).is_some()).count();
    cx.out.integer(found as i64);
    Outcome::Done
}

pub(super) fn append(cx: &mut Context<'_>) -> Outcome {
    match cx.store.append(cx.args.get(1), cx.args.get(2)) {
        Ok(len) => {
            cx.out.integer(len as i64);
            Outcome::Done
        }
        Err(error) => cx.refuse(error),
    }
}

pub(super) fn strlen(cx: &mut Context<'_>) -> Outcome {
    let len = cx.store.get(cx.args.get(1)).map_or(0, <[u8]>::len);
    cx.out.integer(len as i64);
    Outcome::Done
}

pub(super) fn kind(cx: &mut Context<'_>) -> Outcome {
    cx.out.simple(if cx.store.get(cx.args.get(1)).is_some() { "string" } else { "none" });
    Outcome::Done
}

pub(super) fn incr(cx: &mut Context<'_>) -> Outcome {
    add(cx, 1)
}

pub(super) fn decr(cx: &mut Context<'_>) -> Outcome {
    add(cx, -1)
}

pub(super) fn incrby(cx: &mut Context<'_>) -> Outcome {
    match number(cx.arg(2)) {
        Some(delta) => add(cx, delta),
        None => cx.fail("value is not an integer or out of range"),
    }
}

pub(super) fn decrby(cx: &mut Context<'_>) -> Outcome {
    match number(cx.arg(2)) {
        Some(i64::MIN) => cx.fail("decrement would overflow"),
        Some(delta) => add(cx, -delta),
        None => cx.fail("value is not an integer or out of range"),
    }
}

fn add(cx: &mut Context<'_>, delta: i64) -> Outcome {
    let key = cx.args.get(1);
    let Some(value) = cx.store.get(key).map_or(Some(0), number) else {
        return cx.fail("value is not an integer or out of range");
    };
    let Some(sum) = value.checked_add(delta) else {
        return cx.fail("increment or decrement would overflow");
    };
    let mut buffer = [0; 20];
    let digits = decimal(sum, &mut buffer);
    let result = match cx.store.get_mut(key) {
        Some(value) if value.len() == digits.len() => {
            value.copy_from_slice(digits);
            Ok(())
        }
        _ => cx.store.set(key, digits),
    };
    match result {
        Ok(()) => {
            cx.out.integer(sum);
            Outcome::Done
        }
        Err(error) => cx.refuse(error),
    }
}
