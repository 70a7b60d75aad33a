//! The machine: memory, vCPUs, devices and their life from creation to the end.
// UNSAFETY: tells the tracker what memory the slots of the VM are.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvm_ioctls::VmFd;
use outlive_dirty::{BackendChoice, DirtyBackend, HotPages, MemoryLayout, Tracker, TrackerConfig};
use outlive_epoch::image::StateVersions;

use crate::board::{Board, BoardError};
use crate::boot::{self, BootError, PayloadOptions};
use crate::bus::Bus;
use crate::check::DiskHash;
use crate::devices::Device;
use crate::devices::gate::DeviceGate;
use crate::devices::port::PortEnd;
use crate::devices::serial::{SerialHost, SerialPort};
use crate::devices::valve::{HeldOutput, Lease, OutputMode, Permit, Valve};
use crate::devices::virtio::blk::{BlockDevice, DiskOptions, WriteLog};
use crate::devices::virtio::console::ConsoleDevice;
use crate::devices::virtio::net::{NetConfig, NetDevice};
use crate::devices::virtio::rng::RngDevice;
use crate::event::{EventSink, MachineEvent};
use crate::irq::IrqLines;
use crate::kvm::{Host, HostError, MAX_VCPUS};
use crate::map::{lines, ports};
use crate::memory::{GuestMemory, MemoryError, Ram};
use crate::restart::FreshState;
use crate::shape::StateTooLarge;
use crate::vcpu::platform::{GuestKind, Platform};
use crate::vcpu::set::{Parts, VcpuSet};
use crate::vcpu::{VcpuError, state};
use crate::vm_state::{self, RestartCount, VmStateError};

/// What a machine is made of.
#[derive(Clone)]
pub struct Options {
    /// 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Guest memory in bytes, a multiple of 1 MiB.
    pub memory: u64,
    /// Bytes behind it that hold what a Linux guest boots from
    /// ([`LinuxBoot::firmware_bytes`](crate::LinuxBoot)); 0 for the payload guest.
    pub firmware_bytes: u64,
    /// The mode of output at first.
    pub output: OutputMode,
    /// The network card, if any.
    pub net: Option<NetConfig>,
    /// Disks, in the order in which the guest sees them.
    pub disks: Vec<DiskOptions>,
    /// An entropy device.
    pub rng: bool,
    /// A virtio console.
    pub console: Option<PortEnd>,
    /// The first serial port; without it nothing answers there.
    pub serial: Option<PortEnd>,
    /// Which back end tracks dirty pages.
    pub tracker: BackendChoice,
    /// Dirty pages at which a checkpoint should be taken early.
    pub trigger: usize,
    /// How many dirty pages lists and staging have room for.
    pub max_dirty: usize,
    /// Receives the events of the guest.
    pub events: EventSink,
}

/// Why a machine could not be created.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// KVM.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A device.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// No back end for dirty tracking.
    #[error("dirty tracking: {0}")]
    Probe(#[from] outlive_dirty::ProbeError),
    /// The tracker.
    #[error("dirty tracking: {0}")]
    Tracker(#[from] outlive_dirty::NewError),
    /// The memory slots.
    #[error("dirty tracking: {0}")]
    Layout(#[from] outlive_dirty::LayoutError),
    /// A memory slot was refused.
    #[error("KVM_SET_USER_MEMORY_REGION: {0}")]
    Slot(kvm_ioctls::Error),
    /// A thread could not be started.
    #[error("cannot start a vCPU thread: {0}")]
    Thread(std::io::Error),
    /// A vCPU's state could not be read.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The state of the VM's chips could not be read.
    #[error(transparent)]
    Vm(#[from] VmStateError),
    /// Its state has no room in a checkpoint.
    #[error(transparent)]
    State(#[from] StateTooLarge),
}

/// Why a guest could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The program.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The registers.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
}

/// A virtual machine. Its threads exist from creation on; the guest runs after [`resume`](Self::resume).
///
/// Fields are dropped in order: threads before what they use.
pub struct Machine {
    pub(crate) vcpus: VcpuSet,
    /// By slot.
    pub(crate) devices: Vec<Arc<dyn Device>>,
    pub(crate) net: Option<Arc<NetDevice<GuestMemory>>>,
    pub(crate) disks: Vec<Arc<BlockDevice<GuestMemory>>>,
    valve: Arc<Valve>,
    pub(crate) write_log: Arc<WriteLog>,
    pub(crate) serial: Option<SerialPort>,
    pub(crate) irq_lines: IrqLines,
    pub(crate) gate: Arc<DeviceGate>,
    pub(crate) tracker: Arc<Tracker>,
    pub(crate) running: bool,
    /// When the pages of the last checkpoint were copied, if the guest continued after it.
    pub(crate) copied_at: Option<Instant>,
    pub(crate) constants: Vec<Vec<u8>>,
    pub(crate) constants_sent: bool,
    pub(crate) scratch: Vec<u8>,
    pub(crate) check_due: Option<Vec<DiskHash>>,
    pub(crate) fresh: FreshState,
    pub(crate) state_versions: StateVersions,
    pub(crate) restarts: RestartCount,
    pub(crate) host: Arc<Host>,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) ram: Arc<Ram>,
    /// Since when the guest, which ran before, has been stopped.
    pub(crate) stopped_at: Option<Instant>,
    pub(crate) stop_budget: Option<Duration>,
    pub(crate) progress: Arc<Progress>,
    tsc_khz: u32,
}

/// The guest is told of a stop of this length, because its watchdogs look for lockups of seconds.
const LONG_STOP: Duration = Duration::from_secs(1);

/// The progress of a machine and its driver, for threads that watch from outside.
///
/// The count grows each time all vCPUs and all devices have come to a stop, and whenever the driver of the
/// machine has finished a step. So a count that stays the same while stops are due means that a thread is
/// stuck.
#[derive(Debug, Default)]
pub struct Progress(AtomicU64);

impl Progress {
    /// The count.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Counts a step.
    pub fn bump(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Machine {
    /// Creates the machine with all its memory, devices and threads. Nothing runs yet.
    ///
    /// # Errors
    /// [`CreateError`]; nothing is left behind then.
    pub fn new(host: Arc<Host>, options: &Options) -> Result<Self, CreateError> {
        let ram = Ram::with_firmware(options.memory, options.firmware_bytes, options.max_dirty)?;
        Self::with_memory(host, options, Arc::new(ram))
    }

    /// The same with memory that a machine had before, and that nobody else has ([`Ram::is_of`] these options): its
    /// contents stay.
    ///
    /// # Errors
    /// [`CreateError`]; nothing is left behind then.
    pub fn with_memory(host: Arc<Host>, options: &Options, ram: Arc<Ram>) -> Result<Self, CreateError> {
        ram.log().unwatch();
        if options.vcpus == 0 || options.vcpus > MAX_VCPUS {
            return Err(HostError::Vcpus(options.vcpus).into());
        }
        let count = usize::from(options.vcpus);
        let vm = Arc::new(host.create_vm()?);
        // Before the first vCPU: the ring cannot be switched on later.
        let backend = DirtyBackend::probe(fd_of(host.kvm()), fd_of(&*vm), options.tracker, count)?;
        // About 20 ms, once in a process.
        let backend = backend.with_self_test(fd_of(host.kvm()));
        set_slots(&vm, &ram)?;
        let mut fds = Vec::new();
        for index in 0..options.vcpus {
            fds.push(host.create_vcpu(&vm, index, options.vcpus)?);
        }
        let config = TrackerConfig::default()
            .with_max_dirty_pages(options.max_dirty)
            .with_trigger(options.trigger)
            // KVM makes a ring exact by holding entries back, and then nothing is left for a guest whose kernel
            // is emulated and overruns the limit (kvm_pvm). The coordinator counts, which costs no system call.
            .with_exact(false)
            // A trap costs as much as ten to twenty copies.
            .with_hot(HotPages::Auto);
        let vcpu_fds: Vec<_> = fds.iter().map(fd_of).collect();
        let layout = MemoryLayout::new(ram.slots())?;
        let log = ram.log().clone();
        // SAFETY: the slots were made from `ram.slots()`, of memory that `Ram` keeps mapped; the VM and the
        // tracker go before it.
        let tracker = unsafe { Tracker::new(layout, config, backend, log, fd_of(&*vm), &vcpu_fds) }?;
        let tracker = Arc::new(tracker);
        drop(vcpu_fds);
        let msrs = host.readable_msrs(&fds[0])?;
        let tsc_khz =
            fds[0].get_tsc_khz().map_err(|source| HostError::Ioctl { what: "KVM_GET_TSC_KHZ", source })?;
        let guest = if options.firmware_bytes > 0 { GuestKind::Linux } else { GuestKind::Payload };
        let platform = Arc::new(Platform::new(count, guest));
        let gate = Arc::new(DeviceGate::new());
        let mut mmio = Bus::new();
        let mut board = Board::new(&vm, &ram, &gate, &platform, &mut mmio);
        let permit = Arc::new(Permit::new(options.output, Lease::new()));
        let card = |net| board.add(|host| NetDevice::new(net, permit.clone(), host));
        let net = options.net.as_ref().map(card).transpose()?;
        let full = options.events.clone();
        let write_log = WriteLog::new(move || full(MachineEvent::DiskLogFull));
        let mut disks = Vec::new();
        for (index, disk) in options.disks.iter().enumerate() {
            let (index, log, permit) = (index as u16, write_log.clone(), permit.clone());
            let device = board.add(|host| BlockDevice::new(disk, index, log, permit, host))?;
            device.report_faults_to(options.events.clone());
            disks.push(device);
        }
        if options.rng {
            board.add(|host| RngDevice::new(host).map_err(BoardError::Start))?;
        }
        if let Some(end) = options.console.clone() {
            board.add(|host| ConsoleDevice::new(end, host).map_err(BoardError::Start))?;
        }
        let mut pio = Bus::new();
        let serial =
            options.serial.clone().map(|end| add_serial(end, &mut board, &gate, &mut pio)).transpose()?;
        let (devices, irq_lines) = board.finish();
        let valve = Arc::new(Valve::new(permit, outputs(net.as_ref(), &disks)));
        let parts = Parts {
            platform,
            pio: Arc::new(pio),
            mmio: Arc::new(mmio),
            events: options.events.clone(),
            ram: ram.clone(),
        };
        let mut vcpus = VcpuSet::spawn(fds, &msrs, host.xsave(), parts).map_err(CreateError::Thread)?;
        // Before the vCPUs know the tracker, because there is nothing to harvest yet.
        let fresh = FreshState::take(&mut vcpus, &vm)?;
        vcpus.set_tracker(tracker.clone());
        let most =
            devices.iter().map(|it| it.state_bytes()).chain(serial.iter().map(SerialPort::state_bytes));
        let scratch = most.fold(vm_state::CAPACITY, usize::max);
        let mut machine = Self {
            vcpus,
            devices,
            net,
            disks,
            valve,
            write_log,
            serial,
            irq_lines,
            gate,
            tracker,
            running: false,
            copied_at: None,
            constants: Vec::new(),
            constants_sent: false,
            scratch: Vec::with_capacity(scratch),
            check_due: None,
            fresh,
            state_versions: StateVersions::NEWEST,
            restarts: RestartCount::default(),
            host,
            vm,
            ram,
            stopped_at: None,
            stop_budget: None,
            progress: Arc::default(),
            tsc_khz,
        };
        machine.read_constants()?;
        machine.check_state_sizes()?;
        Ok(machine)
    }

    /// Loads the payload guest and sets all vCPUs to its entry. [`resume`](Self::resume) starts it.
    ///
    /// # Errors
    /// [`StartError`] when the program does not fit the machine.
    pub fn boot_payload(&mut self, elf: &[u8], options: &PayloadOptions) -> Result<(), StartError> {
        let vcpus = self.vcpus.len() as u8;
        let entry = boot::load(&self.ram, elf, vcpus, self.tsc_khz, self.net.is_some(), options)?;
        self.vcpus.on_each(|index| {
            Box::new(move |fd| {
                let ioctl = |item| move |source| state::VcpuStateError::Ioctl { item, source };
                let fresh = fd.get_sregs().map_err(ioctl(state::Item::Sregs))?;
                let (sregs, regs) = boot::start_registers(fresh, entry, index as u32);
                fd.set_sregs(&sregs).map_err(ioctl(state::Item::Sregs))?;
                fd.set_regs(&regs).map_err(ioctl(state::Item::Regs))?;
                state::make_runnable(fd)
            })
        })?;
        Ok(())
    }

    /// Lets the guest run.
    pub fn resume(&mut self) {
        self.release(true);
    }

    /// Stops the guest at a point where all its I/O is completed. Devices rest too.
    pub fn pause(&mut self) {
        self.quiesce();
    }

    /// Sets how long vCPUs and devices may take to stop for a checkpoint or a round of base synchronisation;
    /// after that it fails with [`CaptureError::Stuck`](crate::CaptureError::Stuck). Without a budget it
    /// waits forever.
    pub fn set_stop_budget(&mut self, budget: Option<Duration>) {
        self.stop_budget = budget;
    }

    /// The machine's progress.
    pub fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    /// Treats the reported [fault of this host](MachineEvent::HostFault) as the guest's own doing: its last
    /// checkpoint can be taken, with the vCPU's state as KVM reports it.
    pub fn blame_guest(&mut self) {
        self.vcpus.forget_faults();
    }

    /// Guest memory.
    pub fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// The dirty tracker.
    pub fn tracker(&self) -> &Arc<Tracker> {
        &self.tracker
    }

    /// The network card.
    pub fn net(&self) -> Option<&Arc<NetDevice<GuestMemory>>> {
        self.net.as_ref()
    }

    /// The disks, in the order of [`Options::disks`].
    pub fn disks(&self) -> &[Arc<BlockDevice<GuestMemory>>] {
        &self.disks
    }

    /// Whether the disks of this host have failed requests of which the guest has not heard.
    pub fn has_failed_requests(&self) -> bool {
        self.disks.iter().any(|disk| disk.has_failed())
    }

    /// Lets the guest hear of the requests that the disks of this host have failed
    /// ([`MachineEvent::DiskFault`]).
    pub fn tell_disk_errors(&self) {
        self.disks.iter().for_each(|disk| disk.tell_errors());
    }

    /// All held output: of the network card and of the shared disks.
    pub fn valve(&self) -> &Arc<Valve> {
        &self.valve
    }

    /// The log of the guest's disk writes, for a standby's copy of the disks.
    pub fn write_log(&self) -> &Arc<WriteLog> {
        &self.write_log
    }

    /// The VM begins to run on this host: devices work from now on and check their queues, and with
    /// `announce` the network is told where the guest went. [`resume`](Self::resume) follows.
    pub fn go_live(&self, announce: bool) {
        self.devices.iter().for_each(|device| device.go_live(announce));
        self.serial.iter().for_each(SerialPort::go_live);
        self.vcpus.tell_asked();
    }

    /// Makes the next checkpoint a base, which also carries the constant state. State is written in these
    /// versions from now on, which the receiver must be able to read.
    pub fn next_is_base(&mut self, versions: StateVersions) {
        self.constants_sent = false;
        self.state_versions = versions;
    }

    /// How often the guest has restarted: on the host that it came from, or as it was [set](Self::set_restarts).
    pub fn restarts(&self) -> RestartCount {
        self.restarts
    }

    /// Goes with every checkpoint from now on.
    pub fn set_restarts(&mut self, restarts: RestartCount) {
        self.restarts = restarts;
    }

    /// A stop begins. Returns whether the guest was running.
    pub(crate) fn begin_stop(&mut self) -> bool {
        let was_running = std::mem::replace(&mut self.running, false);
        if was_running {
            self.stopped_at = Some(Instant::now());
        }
        was_running
    }

    /// Stops vCPUs and devices. Returns whether they ran.
    pub(crate) fn quiesce(&mut self) -> bool {
        let was_running = self.begin_stop();
        self.vcpus.stop();
        self.gate.close();
        self.progress.bump();
        was_running
    }

    /// Undoes [`quiesce`](Self::quiesce) when the VM ran before it. For the controller only: after a long stop it
    /// waits for every vCPU's thread.
    pub(crate) fn release(&mut self, run: bool) {
        if run && !self.running && self.stopped_long() {
            self.tell_of_stop();
        }
        self.release_untold(run);
    }

    /// The same without a word to the guest, however long it was stopped. Waits for no vCPU's thread, so any of
    /// them may do it.
    pub(crate) fn release_untold(&mut self, run: bool) {
        if run && !self.running {
            self.running = true;
            self.stopped_at = None;
            // The guest first, since it is what waits: a device that it asks for meanwhile is told by its
            // doorbell, and stays behind the gate until the next line. Nothing of the guest's is done by a
            // vCPU's own thread that needs the gate.
            self.vcpus.run();
            self.gate.open();
        }
    }

    /// Whether the guest has been stopped for so long that it must be told.
    pub(crate) fn stopped_long(&self) -> bool {
        self.stopped_at.is_some_and(|at| at.elapsed() >= LONG_STOP)
    }

    /// Tells the guest's watchdogs that the guest was stopped, so that they do not take it for a lockup
    /// (KVM_KVMCLOCK_CTRL). A guest that does not use kvmclock has no such bit, and KVM returns EINVAL.
    fn tell_of_stop(&mut self) {
        let told = self.vcpus.on_each(|_| {
            Box::new(|fd| {
                fd.kvmclock_ctrl().ok();
                Ok(())
            })
        });
        if let Err(error) = told {
            tracing::debug!(%error, "cannot tell the guest that it was stopped");
        }
    }

    fn read_constants(&mut self) -> Result<(), VcpuError> {
        let (tx, rx) = std::sync::mpsc::channel();
        self.vcpus.on_each(|index| {
            let tx = tx.clone();
            Box::new(move |fd| {
                let mut bytes = Vec::new();
                state::save_constant(fd, &mut bytes)?;
                // The receiver outlives the task.
                tx.send((index, bytes)).ok();
                Ok(())
            })
        })?;
        drop(tx);
        let mut constants: Vec<_> = rx.into_iter().collect();
        constants.sort();
        self.constants = constants.into_iter().map(|(_, bytes)| bytes).collect();
        Ok(())
    }
}

/// The output of the devices.
fn outputs(
    net: Option<&Arc<NetDevice<GuestMemory>>>,
    disks: &[Arc<BlockDevice<GuestMemory>>],
) -> Vec<Arc<dyn HeldOutput>> {
    let frames = net.map(|net| net.output().clone() as Arc<dyn HeldOutput>);
    let shared = disks.iter().filter(|disk| disk.is_shared());
    frames.into_iter().chain(shared.map(|disk| disk.clone() as Arc<dyn HeldOutput>)).collect()
}

/// Puts COM1 on the port bus.
fn add_serial(
    end: PortEnd,
    board: &mut Board<'_>,
    gate: &Arc<DeviceGate>,
    pio: &mut Bus,
) -> Result<SerialPort, BoardError> {
    let host = SerialHost { gate: gate.clone(), interrupt: board.interrupt(lines::COM1)? };
    let serial = SerialPort::new(host, end).map_err(BoardError::Serial)?;
    pio.insert(ports::COM1.first.into(), ports::COM1.count.into(), serial.registers())?;
    Ok(serial)
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("vcpus", &self.vcpus.len())
            .field("ram", &self.ram)
            .field("tracking", &self.tracker.is_enabled())
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}

mod raw {
    // UNSAFETY: KVM maps our memory by address; kvm-ioctls gives its descriptors only as numbers.
    #![allow(unsafe_code)]

    use std::os::fd::{AsRawFd, BorrowedFd};

    use super::{CreateError, Ram, VmFd};
    use crate::memory::PAGE_SIZE;
    use kvm_bindings::kvm_userspace_memory_region;

    /// The descriptor of a KVM object, for as long as the object is borrowed.
    pub(super) fn fd_of<T: AsRawFd>(object: &T) -> BorrowedFd<'_> {
        // SAFETY: the object owns the descriptor and outlives the borrow.
        unsafe { BorrowedFd::borrow_raw(object.as_raw_fd()) }
    }

    pub(crate) fn set_slots(vm: &VmFd, ram: &Ram) -> Result<(), CreateError> {
        for slot in ram.slots() {
            let region = kvm_userspace_memory_region {
                slot: slot.id,
                flags: 0,
                guest_phys_addr: slot.base.0 * PAGE_SIZE as u64,
                memory_size: slot.pages * PAGE_SIZE as u64,
                userspace_addr: slot.host_addr,
            };
            // SAFETY: the range is a mapping of `ram`, which `Machine` drops after the VM's threads.
            unsafe { vm.set_user_memory_region(region) }.map_err(CreateError::Slot)?;
        }
        Ok(())
    }
}
use raw::fd_of;
pub(crate) use raw::set_slots;
