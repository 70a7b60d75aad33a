//! A restarted machine against a new one, on real KVM: a checkpoint saves the same of both, whatever the
//! guest has done before.

// UNSAFETY: looks into the union of KVM's interrupt chips.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io::Write;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MP_STATE_HALTED,
    KVM_VCPUEVENT_VALID_NMI_PENDING, Msrs, kvm_irqchip, kvm_mp_state, kvm_msi, kvm_msr_entry, kvm_pit_state2,
};
use kvm_ioctls::VcpuFd;
use outlive_dirty::BackendChoice;
use outlive_epoch::image::StateKind;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_STATUS,
};

use super::*;
use crate::boot::linux::tests::bzimage;
use crate::capture::{After, InPause, SpillError};
use crate::devices::port::{NoSink, PortEnd};
use crate::devices::valve::OutputMode;
use crate::devices::virtio::blk::DiskOptions;
use crate::devices::virtio::net::tests::tap::in_namespace;
use crate::devices::virtio::net::{MacAddr, NetConfig, OutputLimits, Tap};
use crate::event::{PowerRequest, ResetWay};
use crate::kvm::msrs::{MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE};
use crate::kvm::{Host, HostError};
use crate::machine::Options;
use crate::outgoing::Outgoing;
use crate::state::FieldReader;
use crate::vm_state::Item as VmItem;

const VCPUS: u8 = 2;

/// A machine with a guest that has not run, and devices on lines of both 8259s.
fn booted(dir: &std::path::Path) -> Option<Machine> {
    booted_from(dir, &plain(), None)
}

fn plain() -> LinuxBoot {
    LinuxBoot::new(bzimage(), vec![7; 5000], "quiet".into()).unwrap()
}

fn booted_from(dir: &std::path::Path, boot: &LinuxBoot, net: Option<NetConfig>) -> Option<Machine> {
    let host = match Host::open() {
        Ok(host) => Arc::new(host),
        Err(HostError::Missing) => {
            println!("skipped: no /dev/kvm");
            return None;
        }
        Err(other) => panic!("{other}"),
    };
    let disks = (0..3).map(|index| {
        let path = dir.join(format!("disk{index}"));
        std::fs::File::create(&path).unwrap().write_all(&[0; 4096]).unwrap();
        DiskOptions::new(path)
    });
    let options = Options {
        vcpus: VCPUS,
        memory: 64 << 20,
        firmware_bytes: boot.firmware_bytes(),
        output: OutputMode::PassThrough,
        net,
        disks: disks.collect(),
        rng: true,
        console: Some(PortEnd::new(Arc::new(NoSink)).unwrap()),
        serial: Some(PortEnd::new(Arc::new(NoSink)).unwrap()),
        tracker: BackendChoice::Auto,
        trigger: 8192,
        max_dirty: 16384,
        events: Arc::new(|_| ()),
    };
    let mut machine = Machine::new(host, &options).unwrap();
    machine.boot_linux(boot).unwrap();
    machine.enable_tracking().unwrap();
    Some(machine)
}

struct Nothing;

impl InPause for Nothing {
    fn counted(&mut self, _pages: usize) {}

    fn spill(&mut self, _outgoing: &mut Outgoing) -> Result<(), SpillError> {
        Err("a checkpoint in parts".into())
    }
}

/// StateKind, index and field of the saved state; 0 for a section that is one field.
type Saved = BTreeMap<(StateKind, u16, u16), Vec<u8>>;

/// What a checkpoint saves, except for time, which continues through a restart.
fn saved(machine: &mut Machine) -> Saved {
    let mut outgoing = Outgoing::new(16384, 0).unwrap();
    machine.checkpoint(&mut outgoing, After::Stay, &mut Nothing).unwrap();
    let mut all = Saved::new();
    for section in outgoing.state().sections().filter(|section| section.kind != StateKind::VcpuConstant) {
        let parts = match section.kind {
            StateKind::Vcpu | StateKind::Vm => FieldReader::new(section.bytes).unwrap().fields(),
            _ => vec![(0, section.bytes)],
        };
        for (field, bytes) in parts {
            all.insert((section.kind, section.index, field), bytes.to_vec());
        }
    }
    all.retain(|key, _| *key != (StateKind::Vm, 0, VmItem::Clock as u16));
    for index in 0..VCPUS.into() {
        let msrs = all.get_mut(&(StateKind::Vcpu, index, state::Item::Msrs as u16)).unwrap();
        let words = |msr: &[u8]| u32::from_le_bytes(msr[..4].try_into().unwrap());
        *msrs = msrs
            .chunks_exact(16)
            .filter(|msr| ![MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE].contains(&words(msr)))
            .collect::<Vec<_>>()
            .concat();
        // The processor may say that a component is in use although its values are those of an unused one.
        let xsave = all.get_mut(&(StateKind::Vcpu, index, state::Item::Xsave as u16)).unwrap();
        xsave[512..520].fill(0);
    }
    let pit = all.get_mut(&(StateKind::Vm, 0, VmItem::Pit as u16)).unwrap();
    // `count_load_time`, the last word of each of three channels.
    pit.chunks_exact_mut(24).take(3).for_each(|channel| channel[16..].fill(0));
    all
}

/// Where two states differ.
fn differences(one: &Saved, other: &Saved) -> Vec<(StateKind, u16, u16)> {
    assert!(one.keys().eq(other.keys()));
    one.iter().filter(|(key, bytes)| other[key] != **bytes).map(|(key, _)| *key).collect()
}

/// Gives every part of a vCPU a state that a new vCPU does not have.
fn spoil_vcpu(fd: &VcpuFd, index: usize, msrs: &[u32]) {
    if index == 0 {
        fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_HALTED }).unwrap();
    } else {
        state::make_runnable(fd).unwrap();
    }
    let mut regs = fd.get_regs().unwrap();
    (regs.rax, regs.rip, regs.rsp, regs.r15) = (1, 0x1234, 0x5678, 9);
    fd.set_regs(&regs).unwrap();
    let mut sregs = fd.get_sregs().unwrap();
    (sregs.cr2, sregs.cr8, sregs.idt.base) = (0x5000, 5, 0x6000);
    fd.set_sregs(&sregs).unwrap();
    let mut xcrs = fd.get_xcrs().unwrap();
    if xcrs.nr_xcrs > 0 {
        xcrs.xcrs[0].value ^= 0b10;
        fd.set_xcrs(&xcrs).unwrap();
    }
    let mut xsave = fd.get_xsave().unwrap();
    // An XMM register, and the bits that say that the first two components are in use.
    (xsave.region[40], xsave.region[128]) = (0x5a5a, 3);
    // SAFETY: an XSAVE area as KVM returned it; no component in it needs more room.
    unsafe { fd.set_xsave(&xsave) }.unwrap();
    let mut debug = fd.get_debug_regs().unwrap();
    (debug.db[0], debug.dr7) = (0x1000, 0x401);
    fd.set_debug_regs(&debug).unwrap();
    let mut apic = fd.get_lapic().unwrap();
    let mut set = |register: usize, value: u32| {
        let bytes = value.to_le_bytes().map(|byte| byte as i8);
        apic.regs[register..register + 4].copy_from_slice(&bytes);
    };
    set(0x80, 0x20); // task priority
    set(0xf0, 0x1ff); // on
    set(0x210, 1 << 7); // requested: vector 39
    set(0x130, 1 << 9); // in service: vector 105
    set(0x320, 0x2_0031); // timer, periodic, vector 49
    set(0x350, 0x1_0700); // LINT0 masked
    set(0x380, 1 << 30); // counts
    set(0x3e0, 0xb);
    fd.set_lapic(&apic).unwrap();
    for &msr in msrs.iter().filter(|msr| ![MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE].contains(msr)) {
        spoil_msr(fd, msr);
    }
    let mut events = fd.get_vcpu_events().unwrap();
    (events.nmi.pending, events.interrupt.injected, events.interrupt.nr) = (1, 1, 0x77);
    events.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING;
    fd.set_vcpu_events(&events).unwrap();
}

/// Gives an MSR another value, if it takes any of those tried.
fn spoil_msr(fd: &VcpuFd, index: u32) {
    let one = |data| {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        Msrs::from_entries(&[entry]).unwrap()
    };
    let mut now = one(0);
    if fd.get_msrs(&mut now).is_ok_and(|got| got == 1) {
        let now = now.as_slice()[0].data;
        let taken = |data: u64| fd.set_msrs(&one(data)).is_ok_and(|set| set == 1);
        [now ^ 0x1000, now ^ 1, now ^ 2, now ^ 0x800].into_iter().any(taken);
    }
}

/// Does the same to the chips.
fn spoil_chips(vm: &kvm_ioctls::VmFd) {
    for (chip_id, base) in [(KVM_IRQCHIP_PIC_MASTER, 0x20), (KVM_IRQCHIP_PIC_SLAVE, 0x28)] {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).unwrap();
        // SAFETY: the variant that belongs to the number; any bytes are a valid state.
        let pic = unsafe { &mut chip.chip.pic };
        (pic.irq_base, pic.isr, pic.auto_eoi, pic.init4) = (base, 1, 1, 1);
        vm.set_irqchip(&chip).unwrap();
    }
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    vm.get_irqchip(&mut chip).unwrap();
    // SAFETY: as above.
    let ioapic = unsafe { &mut chip.chip.ioapic };
    (ioapic.ioregsel, ioapic.id) = (5, 3);
    for (pin, entry) in ioapic.redirtbl.iter_mut().enumerate() {
        // Every second one is open.
        entry.bits = (0x30 + pin as u64) | ((pin as u64 & 1) << 16);
    }
    vm.set_irqchip(&chip).unwrap();
    let mut pit: kvm_pit_state2 = vm.get_pit2().unwrap();
    (pit.channels[0].mode, pit.channels[0].count, pit.channels[2].gate) = (2, 1193, 1);
    vm.set_pit2(&pit).unwrap();
}

/// And to the VMM's own state.
fn spoil_devices(machine: &Machine) {
    for device in &machine.devices {
        let registers = device.registers();
        let mut registers = registers.lock().unwrap();
        let mut set = |register: u32, value: u32| registers.write(register.into(), &value.to_le_bytes());
        set(VIRTIO_MMIO_STATUS, 1);
        set(VIRTIO_MMIO_STATUS, 3);
        set(VIRTIO_MMIO_DRIVER_FEATURES, 1);
        set(VIRTIO_MMIO_QUEUE_SEL, 0);
        set(VIRTIO_MMIO_QUEUE_NUM, 2);
    }
    let serial = machine.serial.as_ref().unwrap().registers();
    let mut serial = serial.lock().unwrap();
    serial.write(1, &[3]); // interrupts
    serial.write(7, &[0x55]); // scratch
    machine.vcpus.set_asked(Some(PowerRequest::Reset(ResetWay::Keyboard)));
}

/// Sends a start-up IPI to the second vCPU. KVM keeps it outside of all saved state, and forgets it when it
/// is given events that say that there is none.
fn send_startup(vm: &kvm_ioctls::VmFd) {
    const INIT: u32 = 5 << 8;
    const STARTUP: u32 = 6 << 8 | 0x9a;
    for data in [INIT, STARTUP] {
        let msi = kvm_msi { address_lo: 0xfee0_0000 | 1 << 12, data, ..Default::default() };
        assert_eq!(vm.signal_msi(msi).unwrap(), 1, "it has come");
    }
}

fn spoil(machine: &mut Machine) {
    let new = FieldReader::new(&machine.fresh.vcpus[0]).unwrap();
    let msrs: Vec<kvm_msr_entry> = new.get_array(state::Item::Msrs as u16).unwrap();
    let msrs: Vec<u32> = msrs.iter().map(|msr| msr.index).collect();
    machine
        .vcpus
        .on_each(|index| {
            let msrs = msrs.clone();
            Box::new(move |fd| {
                spoil_vcpu(fd, index, &msrs);
                Ok(())
            })
        })
        .unwrap();
    spoil_chips(&machine.vm);
    spoil_devices(machine);
    machine.irq_lines.trigger_all();
}

/// By construction: the test first shows that each part of the saved state differs, so it finds a part that
/// the restart forgets.
#[test]
fn a_restarted_machine_is_a_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let Some(machine) = booted(dir.path()) else { return };
    is_new_after_restarts(machine);
}

/// A card that the guest has used, too.
#[test]
fn a_restarted_machine_with_a_card_is_a_new_one() {
    in_namespace(|| {
        let dir = tempfile::tempdir().unwrap();
        let net = NetConfig {
            tap: Some(Arc::new(Tap::open("restart0").unwrap())),
            mac: MacAddr([2, 0, 0, 0, 0, 9]),
            pairs: 1,
            mtu: Some(1400),
            limits: OutputLimits::default(),
        };
        let Some(machine) = booted_from(dir.path(), &plain(), Some(net)) else { return };
        is_new_after_restarts(machine);
    });
}

fn is_new_after_restarts(mut machine: Machine) {
    let new = saved(&mut machine);
    assert_eq!(differences(&new, &saved(&mut machine)), [], "a checkpoint changes nothing");
    for round in 0..3 {
        spoil(&mut machine);
        let spoilt = saved(&mut machine);
        let same: Vec<_> = new.keys().filter(|key| new[key] == spoilt[key]).collect();
        assert!(same.is_empty(), "{same:?} is not spoilt");
        send_startup(&machine.vm);
        machine.reset().unwrap();
        assert_eq!(differences(&new, &saved(&mut machine)), [], "round {round}");
    }
}

/// A kernel thread carries an edge from a device to the chips. An edge that is on its way when the guest
/// restarts must not arrive in the guest's next life, where the chips are as after power-on and let every
/// line through.
#[test]
fn an_interrupt_of_before_does_not_arrive_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut machine) = booted(dir.path()) else { return };
    let new = saved(&mut machine);
    for round in 0..30 {
        machine.irq_lines.trigger_all();
        machine.reset().unwrap();
        std::thread::sleep(std::time::Duration::from_micros(200));
        assert_eq!(differences(&new, &saved(&mut machine)), [], "round {round}");
    }
    machine.irq_lines.trigger_all();
    let arrived = || {
        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_PIC_SLAVE, ..Default::default() };
        machine.vm.get_irqchip(&mut chip).unwrap();
        // SAFETY: the variant that belongs to the number.
        (unsafe { chip.chip.pic }).irr != 0
    };
    assert!(
        (0..2000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            arrived()
        }),
        "the lines are connected again"
    );
}

/// The flag is for watchdogs: without it a guest takes the time in which it did not run for a lockup of its
/// own.
#[test]
fn a_guest_that_was_stopped_for_long_is_told_so() {
    const CLOCK: u32 = 0x4b56_4d01;
    const PAGE: u64 = 0x300;
    /// `flags` of `struct pvclock_vcpu_time_info`.
    const FLAGS: usize = 29;
    const GUEST_STOPPED: u8 = 2;
    let dir = tempfile::tempdir().unwrap();
    let Some(mut machine) = booted(dir.path()) else { return };
    machine
        .vcpus
        .on_each(|index| {
            Box::new(move |fd| {
                let entry = kvm_msr_entry { index: CLOCK, data: PAGE << 12 | 1, ..Default::default() };
                if index == 0 {
                    assert_eq!(fd.set_msrs(&Msrs::from_entries(&[entry]).unwrap()).unwrap(), 1);
                }
                Ok(())
            })
        })
        .unwrap();
    let ram = machine.ram().clone();
    let clock = || {
        let mut page = [0; crate::memory::PAGE_SIZE];
        assert!(ram.read_page(outlive_dirty::Gfn(PAGE), &mut page));
        page
    };
    let wait_for = |what: &str, done: &dyn Fn() -> bool| {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while !done() {
            assert!(std::time::Instant::now() < deadline, "{what}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    };
    machine.resume();
    wait_for("KVM writes the clock", &|| clock()[..4] != [0; 4]);
    let was_running = machine.quiesce();
    machine.release(was_running);
    assert_eq!(clock()[FLAGS] & GUEST_STOPPED, 0, "a stop of a moment");
    let was_running = machine.quiesce();
    std::thread::sleep(std::time::Duration::from_millis(1100));
    machine.release(was_running);
    wait_for("the flag", &|| clock()[FLAGS] & GUEST_STOPPED != 0);
    machine.quiesce();
}

/// A guest that boots the kernel of its disk.
fn of_disk(kernel: Vec<u8>, initrd: u8, bytes: usize) -> LinuxBoot {
    let boot = LinuxBoot::new(kernel, vec![initrd; bytes], "quiet".into()).unwrap();
    boot.of_disk(DiskBoot { disk: 1, append: "panic=10".into() }).unwrap()
}

#[test]
fn a_kernel_from_the_disk_is_started_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut machine) = booted_from(dir.path(), &of_disk(bzimage(), 7, 5000), None) else { return };
    let kept =
        |machine: &Machine| LinuxBoot::read(machine.ram.memory(), machine.ram.firmware().unwrap()).unwrap();
    let new = of_disk(bzimage(), 8, 9000);
    assert!(matches!(machine.reset_with(&new).unwrap(), Restarted::Given));
    assert_eq!(kept(&machine), new);
    assert_eq!(machine.disk_boot(), Some(DiskBoot { disk: 1, append: "panic=10".into() }));

    // It equals a machine that was made with it.
    let other = tempfile::tempdir().unwrap();
    let mut fresh = booted_from(other.path(), &new, None).unwrap();
    assert_eq!(differences(&saved(&mut machine), &saved(&mut fresh)), []);

    let kept_before = |machine: &mut Machine, boot: &LinuxBoot| {
        let started = machine.reset_with(boot).unwrap();
        assert_eq!(kept(machine), new, "the last kernel stays");
        started
    };
    let none = of_disk(vec![1; 5000], 9, 10);
    assert!(matches!(kept_before(&mut machine, &none), Restarted::Before(_)));
    let large = of_disk(bzimage(), 9, 8 << 20);
    assert!(matches!(kept_before(&mut machine, &large), Restarted::NotKept(_)));
    machine.reset().unwrap();
    assert_eq!(kept(&machine), new);
    assert_eq!(differences(&saved(&mut machine), &saved(&mut fresh)), []);
}
