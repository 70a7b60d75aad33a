//! `DISK WRITE block text`, `DISK READ block`, `DISK SYNC`, `DISK SIZE`: the first disk of the VM.

use super::super::resp::number;
use super::{Context, Outcome};

const BROKEN: &str = "the disk reports an error";

/// Bytes of a block.
pub const BLOCK: usize = 4096;

/// A disk as the commands see it. Every call returns when the disk has answered.
pub trait Disk {
    /// Its size in blocks.
    fn blocks(&self) -> u64;
    /// A block's bytes, or nothing if the disk reports an error.
    fn read(&mut self, block: u64) -> Option<&[u8]>;
    /// Writes a text and zeroes behind it. False if the disk reports an error.
    fn write(&mut self, block: u64, text: &[u8]) -> bool;
    /// Makes all writes durable. False if the disk reports an error.
    fn sync(&mut self) -> bool;
}

pub(super) fn disk(cx: &mut Context<'_>) -> Outcome {
    let count = cx.args.len();
    let (write, read) = (cx.is(1, "write") && count == 4, cx.is(1, "read") && count == 3);
    let (sync, size) = (cx.is(1, "sync") && count == 2, cx.is(1, "size") && count == 2);
    if !(write || read || sync || size) {
        return cx.fail("try DISK WRITE <block> <text>, DISK READ <block>, DISK SYNC or DISK SIZE");
    }
    let args = cx.args;
    let Some(disk) = cx.machine.disk() else { return cx.fail("this VM has no disk") };
    let blocks = disk.blocks();
    if size {
        cx.out.integer(blocks as i64);
        return Outcome::Done;
    }
    let done = if sync {
        disk.sync()
    } else {
        let block = number(args.get(2)).and_then(|block| u64::try_from(block).ok());
        let Some(block) = block.filter(|block| *block < blocks) else {
            cx.out.error(format_args!("ERR the disk has {blocks} blocks, 0 is the first"));
            return Outcome::Done;
        };
        if read {
            return reply(cx, block);
        }
        if args.get(3).len() > BLOCK {
            return cx.fail("a block has 4096 bytes");
        }
        disk.write(block, args.get(3))
    };
    if !done {
        return cx.fail(BROKEN);
    }
    cx.out.ok();
    Outcome::Done
}

/// Replies with the text in a block.
fn reply(cx: &mut Context<'_>, block: u64) -> Outcome {
    let Some(bytes) = cx.machine.disk().and_then(|disk| disk.read(block)) else { return cx.fail(BROKEN) };
    match bytes.iter().rposition(|byte| *byte != 0) {
        Some(last) => cx.out.bulk(&bytes[..=last]),
        None => cx.out.null(),
    }
    Outcome::Done
}
