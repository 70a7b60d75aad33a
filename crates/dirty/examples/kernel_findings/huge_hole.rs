//! Small pages that are given back (MADV_DONTNEED) read as zero and are reported as written. A transparent
//! huge page that is given back leaves no page table behind, and what has none is passed over.
// UNSAFETY: advises memory of its own.
#![allow(unsafe_code)]

use std::io;

use crate::guest::{Mapping, PAGE};
use crate::watch::{HUGE, Watch};
use crate::{Failure, Verdict};

const LARGE: u64 = 2 << 20;

pub(crate) fn run() -> Result<Verdict, Failure> {
    let memory = Mapping::map(4 * LARGE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
    let first = LARGE - memory.address() % LARGE;
    advise(&memory, 0, 4 * LARGE, libc::MADV_HUGEPAGE)?;
    (0..4 * LARGE / PAGE).for_each(|page| memory.write(page * PAGE, &[1; 8]));
    let watch = match Watch::new(&memory) {
        Ok(watch) => watch,
        Err(error) => return Ok(Verdict::Skipped(format!("no asynchronous write-protection: {error}"))),
    };
    let huge = watch.scan(HUGE, false, 64)?;
    if !huge.extents.iter().any(|extent| {
        extent.start <= memory.address() + first && extent.end >= memory.address() + first + LARGE
    }) {
        return Ok(Verdict::Skipped("the kernel gave no transparent huge page".into()));
    }
    advise(&memory, first, LARGE, libc::MADV_DONTNEED)?;
    let large = watch.take()?.pages();
    advise(&memory, first + LARGE, PAGE, libc::MADV_DONTNEED)?;
    let small = watch.take()?.pages();
    let figures = format!(
        "a huge page of 512 pages given back, which reads as {} now: {large} pages reported; one small page: {small}",
        memory.word(first)
    );
    Ok(if large == 0 { Verdict::Shown(figures) } else { Verdict::NotShown(figures) })
}

fn advise(memory: &Mapping, offset: u64, bytes: u64, advice: i32) -> io::Result<()> {
    // SAFETY: advice on our own mapping, of which no reference is held.
    match unsafe { libc::madvise(memory.pointer(offset, bytes as usize).cast(), bytes as usize, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
