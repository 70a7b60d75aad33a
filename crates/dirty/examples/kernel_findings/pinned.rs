//! A system call that pins a page and writes it later through the kernel's own mapping takes its write fault
//! when it pins. A scan in between takes the page as written and protects it; the bytes come after that,
//! without a fault.
//!
//! Here the call is process_vm_writev, held between the two by a source page that is missing.
// UNSAFETY: calls process_vm_writev with two mappings of its own.
#![allow(unsafe_code)]

use std::io;
use std::thread;

use crate::guest::{Mapping, PAGE};
use crate::watch::{Faults, Watch};
use crate::{Failure, Verdict};

/// The page that is written.
const TARGET: u64 = 5;

pub(crate) fn run() -> Result<Verdict, Failure> {
    let memory = Mapping::private(64 * PAGE)?;
    let source = Mapping::private(PAGE)?;
    let contents = Mapping::private(PAGE)?;
    contents.write(0, &[7; 8]);
    (0..64).for_each(|page| memory.write(page * PAGE, &[1; 8]));
    let (watch, faults) = match (Watch::new(&memory), Faults::missing(&source)) {
        (Ok(watch), Ok(faults)) => (watch, faults),
        (Err(error), _) => {
            return Ok(Verdict::Skipped(format!("no asynchronous write-protection: {error}")));
        }
        (_, Err(error)) => {
            return Ok(Verdict::Skipped(format!("no userfaultfd for faults of the kernel: {error}")));
        }
    };
    let (during, before) = thread::scope(|scope| -> io::Result<_> {
        let writer = scope.spawn(|| write(&source, &memory));
        // The target is pinned; the call waits for its source.
        faults.wait()?;
        let during = watch.take();
        let before = memory.word(TARGET * PAGE);
        faults.fill(&source, &contents)?;
        writer.join().map_err(|_| io::Error::other("the writer panicked"))??;
        Ok((during?, before))
    })?;
    let after = memory.word(TARGET * PAGE);
    let later = watch.take()?;
    let figures = format!(
        "while the call waits a scan reports {} page, which holds {before:#x}; when it has returned the page holds \
         {after:#x}, and a scan reports {} pages",
        during.pages(),
        later.pages()
    );
    if before == after {
        return Err(format!("the call wrote nothing in time: {figures}").into());
    }
    Ok(if later.pages() == 0 { Verdict::Shown(figures) } else { Verdict::NotShown(figures) })
}

fn write(source: &Mapping, memory: &Mapping) -> io::Result<()> {
    let from = libc::iovec { iov_base: source.pointer(0, 8).cast(), iov_len: 8 };
    let to = libc::iovec { iov_base: memory.pointer(TARGET * PAGE, 8).cast(), iov_len: 8 };
    // SAFETY: 8 bytes of one mapping to another, both of which outlive the call.
    match unsafe { libc::process_vm_writev(libc::getpid(), &from, 1, &to, 1, 0) } {
        8 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
