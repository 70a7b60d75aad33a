//! Interrupts between vCPUs, on real KVM: a checkpoint that says that one was sent says that it came, too.

#![allow(missing_docs)]
// UNSAFETY: names the guest's code by its symbols.
#![allow(unsafe_code)]
#![allow(dead_code, reason = "the guests of the other tests")]

mod support;

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use outlive_dirty::{BackendChoice, Gfn};
use outlive_epoch::image::{StateKind, StateSection};
use outlive_machine::{After, InPause, Machine, Outgoing, PAGE_SIZE, SpillError};
use vm_memory::{Bytes, GuestAddress};

use support::{booted, host, machine};

const VCPUS: u8 = 32;
/// The last vector that vCPU 31 has sent to vCPU 0.
const SENT: u64 = 0x40_0000;
/// Where vCPU 0 copies its interrupt request register to, and how often it has.
const REQUESTED: u64 = 0x40_1000;
const COPIES: u64 = 0x40_1040;
/// vCPU 0 is ready; vCPU 31 may send.
const READY: u64 = 0x40_2000;
const GO: u64 = 0x40_2008;
/// Checkpoints in the middle of the sending, and the time for them. Without the meeting of all vCPUs most
/// lose an interrupt: the last of them runs on for as long as it takes to kick all others.
const ENOUGH: u32 = 12;
const TIME: Duration = Duration::from_secs(40);
const SOON: Duration = Duration::from_secs(5);

// rsi: number of the vCPU. vCPU 31 sends vectors 0x20 to 0xff and says each time what it has sent; vCPU 0 has
// interrupts off, so that what came stays in its local APIC; the others idle until woken.
std::arch::global_asm!(
    ".globl interrupts_guest, interrupts_guest_end",
    "interrupts_guest:",
    "   mov r8d, 0x400000",
    "   mov r9d, 0x401000",
    "   mov r11d, 0x402000",
    "   mov r10d, 0xfee00000",
    "   test esi, esi",
    "   jz 5f",
    "   cmp esi, 31",
    "   je 2f",
    "1: mov eax, 0xffffffff",
    "   mov dx, 0x500",
    "   out dx, eax",
    "   jmp 1b",
    "2: mov dword ptr [r10 + 0xf0], 0x1ff", // the local APIC on
    "3: pause",
    "   cmp qword ptr [r11 + 8], 1",
    "   jne 3b",
    "   mov ebx, 0x20",
    "4: mov dword ptr [r10 + 0x310], 0", // to vCPU 0
    "   mov eax, ebx",
    "   or eax, 0x4000",
    "   mov dword ptr [r10 + 0x300], eax",
    "   mov qword ptr [r8], rbx",
    "   mov ecx, 60",
    "8: pause",
    "   dec ecx",
    "   jnz 8b",
    "   inc ebx",
    "   cmp ebx, 0x100",
    "   jne 4b",
    "9: pause",
    "   jmp 9b",
    "5: mov dword ptr [r10 + 0xf0], 0x1ff",
    "   mov dword ptr [r10 + 0x350], 0x10000", // nothing from the PIC
    "   mov qword ptr [r11], 1",
    "6: xor ecx, ecx",
    "7: mov edx, ecx",
    "   shl edx, 4",
    "   mov eax, dword ptr [r10 + rdx + 0x200]",
    "   mov dword ptr [r9 + rcx * 4], eax",
    "   inc ecx",
    "   cmp ecx, 8",
    "   jne 7b",
    "   inc qword ptr [r9 + 0x40]",
    "   mov ecx, 2000",
    "20: pause",
    "   dec ecx",
    "   jnz 20b",
    "   jmp 6b",
    "interrupts_guest_end:",
);

unsafe extern "C" {
    static interrupts_guest: u8;
    static interrupts_guest_end: u8;
}

fn code() -> &'static [u8] {
    let (start, end) = (&raw const interrupts_guest, &raw const interrupts_guest_end);
    // SAFETY: the bytes between the two symbols are the code above, which nobody changes.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

struct Whole;

impl InPause for Whole {
    fn counted(&mut self, _: usize) {}
    fn spill(&mut self, _: &mut Outgoing) -> Result<(), SpillError> {
        Err("more pages than were expected".into())
    }
}

fn word(machine: &Machine, address: u64) -> u64 {
    machine.ram().memory().read_obj(GuestAddress(address)).unwrap()
}

fn wait(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < end, "{what}");
        thread::sleep(Duration::from_micros(100));
    }
}

/// The vectors up to `last` that did not come, as vCPU 0 sees it after a moment.
fn missing(machine: &Machine, last: u64) -> Vec<u64> {
    let copies = word(machine, COPIES);
    wait("vCPU 0 looks", || word(machine, COPIES) >= copies + 3);
    (0x20..=last)
        .filter(|vector| word(machine, REQUESTED + vector / 64 * 8) >> (vector % 64) & 1 == 0)
        .collect()
}

/// A copy that follows by checkpoints.
#[derive(Default)]
struct Copy {
    pages: BTreeMap<u64, Vec<u8>>,
    constants: Vec<Vec<u8>>,
}

impl Copy {
    fn of(machine: &Machine) -> Self {
        let mut copy = Self::default();
        let mut page = [0; PAGE_SIZE];
        for gfn in machine.ram().gfns() {
            machine.ram().read_page(gfn, &mut page);
            if page != [0; PAGE_SIZE] {
                copy.pages.insert(gfn.0, page.to_vec());
            }
        }
        copy
    }

    /// What was sent as of this checkpoint, and what of it did not come in a machine that goes on from it.
    /// `None` if the sending had not begun or was over.
    fn follow(
        &mut self,
        staging: &Outgoing,
        host: &std::sync::Arc<outlive_machine::Host>,
    ) -> Option<Vec<u64>> {
        for (gfn, bytes) in staging.gfns().iter().zip(staging.page_bytes().chunks_exact(PAGE_SIZE)) {
            self.pages.insert(gfn.0, bytes.to_vec());
        }
        let mut state = Vec::new();
        for section in staging.state().sections() {
            if section.kind == StateKind::VcpuConstant {
                self.constants.push(section.bytes.to_vec());
            } else {
                state.push((section.kind, section.version, section.index, section.bytes.to_vec()));
            }
        }
        let sent = self.pages.get(&(SENT / PAGE_SIZE as u64))?;
        let last = u64::from_le_bytes(sent[..8].try_into().unwrap());
        if !(0x21..0xff).contains(&last) {
            return None;
        }
        let (mut second, _events) = machine(host, VCPUS, BackendChoice::Ring);
        for (gfn, bytes) in &self.pages {
            second.ram().write_page(Gfn(*gfn), bytes.as_slice().try_into().unwrap());
        }
        let section =
            |(kind, version, index, bytes): &(_, _, _, Vec<u8>)| (*kind, *version, *index, bytes.clone());
        let owned: Vec<_> = state.iter().map(section).collect();
        let sections: Vec<_> = owned
            .iter()
            .map(|(kind, version, index, bytes)| StateSection {
                kind: *kind,
                version: *version,
                index: *index,
                bytes,
            })
            .collect();
        second.restore(&self.constants, &sections, Duration::ZERO).unwrap();
        second.resume();
        let lost = missing(&second, last);
        second.pause();
        Some(lost)
    }
}

#[test]
fn an_interrupt_that_was_sent_to_another_vcpu_is_in_the_checkpoint() {
    let Some(host) = host() else { return };
    let (mut looked, end) = (0, Instant::now() + TIME);
    while looked < ENOUGH && Instant::now() < end {
        let (mut first, _events) = booted(&host, VCPUS, BackendChoice::Ring, code());
        first.resume();
        wait("vCPU 0 is ready", || word(&first, READY) == 1);
        first.enable_tracking().unwrap();
        let mut copy = Copy::of(&first);
        let mut staging = Outgoing::new(2048, 0).unwrap();
        first.ram().memory().write_obj(1u64, GuestAddress(GO)).unwrap();
        for _ in 0..6 {
            thread::sleep(Duration::from_micros(50));
            first.checkpoint(&mut staging, After::Resume, &mut Whole).unwrap();
            if let Some(lost) = copy.follow(&staging, &host) {
                looked += 1;
                assert!(lost.is_empty(), "the checkpoint lost the vectors {lost:#x?}");
            }
        }
        first.pause();
    }
    println!("{looked} checkpoints in the middle of the sending");
    assert!(looked > 0, "none was in the middle of the sending");
}
