//! A scan of more than 512 regions flushes the kernel's buffer on its way, and the end that it records there
//! stays: `walk_end` is short of the end although everything was reported.

use crate::guest::{Mapping, PAGE};
use crate::watch::Watch;
use crate::{Failure, Verdict};

pub(crate) fn run() -> Result<Verdict, Failure> {
    let memory = Mapping::private(4096 * PAGE)?;
    let watch = match Watch::new(&memory) {
        Ok(watch) => watch,
        Err(error) => return Ok(Verdict::Skipped(format!("no asynchronous write-protection: {error}"))),
    };
    let mut lines = Vec::new();
    let mut short = false;
    for regions in [100, 511, 512, 513, 1000, 2000] {
        (0..regions).for_each(|index| memory.write(index * 2 * PAGE, &[1]));
        let scanned = watch.take()?;
        let pages = scanned.pages();
        if pages != regions || watch.take()?.pages() != 0 {
            return Err(format!("{pages} of {regions} pages were reported").into());
        }
        short |= scanned.walk_end != scanned.end;
        let before = (scanned.end - scanned.walk_end) / PAGE;
        lines.push(format!("{regions} regions, all reported: walk_end {before} pages before the end"));
    }
    let figures = lines.join("\n");
    Ok(if short { Verdict::Shown(figures) } else { Verdict::NotShown(figures) })
}
