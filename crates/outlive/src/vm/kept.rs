//! The memory that a host keeps of a VM which it has handed over, and the tap of its card: to make either anew takes longer
//! than everything else until the VM is protected again.
//!
//! It is what the VM runs on from at its new host. As a standby this host needs only what is written there from then
//! on, and protection is back within moments. The decision whether a primary's base may build on it is
//! [`KeptMemory`]'s; what is ensured here is that not one byte of it has changed:
//!
//! 1. The vCPUs stay stopped after the checkpoint with which the VM was handed over
//!    ([`Primary::handed_over`](outlive_pair::Primary::handed_over)).
//! 2. From before the pause ended, the log of all other writes is watched
//!    ([`GlobalLog::watch`](outlive_dirty::GlobalLog::watch)): a device's thread that writes marks it, whenever that is.
//! 3. The machine is gone, with its threads, before the log is asked: nobody is left who could write.
//!    It is asked once more when somebody takes the memory.
//! 4. Whoever takes the memory has it alone, and it is never put back.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use outlive_epoch::Hello;
use outlive_machine::{Ram, Tap};
use outlive_pair::{Introduction, KeptMemory};

/// How long it is kept. Later nobody can use it: the new host knows for a while only what was written.
const KEPT_FOR: Duration = Duration::from_secs(20);

struct Kept {
    about: KeptMemory,
    vm: KeptVm,
    until: Instant,
    /// The machine is gone, and the memory is unchanged.
    is_proven: bool,
}

/// What is kept of a VM.
pub(crate) struct KeptVm {
    pub(crate) ram: Arc<Ram>,
    /// The tap of its card.
    pub(crate) tap: Option<Tap>,
}

/// Where a process keeps it when its role changes. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Shelf(Arc<Mutex<Option<Kept>>>);

impl Shelf {
    /// Puts what is kept of a machine here that ends next.
    pub(crate) fn put(&self, about: KeptMemory, vm: KeptVm) {
        let until = Instant::now() + KEPT_FOR;
        *self.shelf() = Some(Kept { about, vm, until, is_proven: false });
    }

    /// Whether it has this tap.
    pub(crate) fn has_tap(&self, name: &str) -> bool {
        self.shelf().as_ref().and_then(|kept| kept.vm.tap.as_ref()).is_some_and(|tap| tap.name() == name)
    }

    /// The machine is gone: drops its memory if somebody still has it, or has written to it.
    pub(crate) fn prove(&self) {
        let mut shelf = self.shelf();
        let Some(mut kept) = shelf.take() else { return };
        let KeptVm { ram, .. } = &kept.vm;
        let (alone, same) = (Arc::strong_count(ram) == 1, ram.log().is_unwritten());
        if alone && same {
            kept.is_proven = true;
            *shelf = Some(kept);
        } else {
            tracing::info!(alone, same, "the memory of the VM that was handed over is not kept");
        }
    }

    /// Takes it if a primary's base may build on it; drops it otherwise, because that primary's VM is the next that this
    /// host has a copy of.
    pub(crate) fn take_for(&self, hello: &Hello, introduction: &Introduction) -> Option<KeptVm> {
        let kept = self.shelf().take()?;
        let ram = &kept.vm.ram;
        let serves = kept.is_proven
            && ram.log().is_unwritten()
            && kept.about.serves(introduction, hello.since)
            && ram.is_of(hello.memory_bytes, hello.firmware_bytes);
        serves.then_some(kept.vm)
    }

    /// Frees memory that nobody has come for.
    pub(crate) fn tidy(&self) {
        let mut shelf = self.shelf();
        if shelf.as_ref().is_some_and(|kept| kept.until <= Instant::now()) {
            *shelf = None;
        }
    }

    fn shelf(&self) -> MutexGuard<'_, Option<Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use outlive_dirty::Gfn;
    use outlive_epoch::{Moment, VmId};

    use super::*;

    const MEMORY: u64 = 32 << 20;
    const MOMENT: Moment = Moment { generation: 4, checkpoint: 90 };

    fn ram() -> Arc<Ram> {
        let ram = Arc::new(Ram::new(MEMORY, 64).unwrap());
        assert!(ram.write_page(Gfn(3), &[7; 4096]));
        ram.log().watch();
        ram
    }

    fn put(shelf: &Shelf, ram: Arc<Ram>) {
        shelf.put(KeptMemory { vm: VmId([1; 16]), moment: MOMENT }, KeptVm { ram, tap: None });
        shelf.prove();
    }

    fn hello() -> (Hello, Introduction) {
        let hello = Hello {
            vm: VmId([1; 16]),
            generation: 5,
            memory_bytes: MEMORY,
            since: Some(MOMENT),
            ..crate::primary::test_hello()
        };
        let introduction = Introduction {
            vm: hello.vm,
            generation: hello.generation,
            slots: 1,
            dead_after: Duration::from_secs(1),
            shared_storage: false,
        };
        (hello, introduction)
    }

    #[test]
    fn memory_that_nobody_has_touched_is_given_once_to_the_next_host() {
        let (shelf, (hello, introduction)) = (Shelf::default(), hello());
        put(&shelf, ram());
        let kept = shelf.take_for(&hello, &introduction).unwrap().ram;
        let mut page = [0; 4096];
        assert!(kept.read_page(Gfn(3), &mut page) && page == [7; 4096]);
        assert!(shelf.take_for(&hello, &introduction).is_none());
    }

    #[test]
    fn memory_that_was_written_or_is_shared_is_not_kept() {
        let (shelf, (hello, introduction)) = (Shelf::default(), hello());
        let late = ram();
        // A device's thread comes late.
        late.log().mark(Gfn(9));
        put(&shelf, late);
        assert!(shelf.take_for(&hello, &introduction).is_none(), "written");
        let shared = ram();
        let other = shared.clone();
        put(&shelf, shared);
        assert!(shelf.take_for(&hello, &introduction).is_none(), "shared");
        drop(other);
        let kept = KeptVm { ram: ram(), tap: None };
        shelf.put(KeptMemory { vm: VmId([1; 16]), moment: MOMENT }, kept);
        assert!(shelf.take_for(&hello, &introduction).is_none(), "its machine may still be there");
    }

    #[test]
    fn memory_of_another_size_or_for_another_vm_is_dropped() {
        let (shelf, (hello, introduction)) = (Shelf::default(), hello());
        put(&shelf, ram());
        let larger = Hello { memory_bytes: 2 * MEMORY, ..hello.clone() };
        assert!(shelf.take_for(&larger, &introduction).is_none());
        put(&shelf, ram());
        assert!(shelf.take_for(&Hello { since: None, ..hello.clone() }, &introduction).is_none());
        assert!(shelf.take_for(&hello, &introduction).is_none(), "it was dropped for the other one");
    }
}
