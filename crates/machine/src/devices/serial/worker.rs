//! The thread that brings input to the serial port.
//!
//! It only begins: it fills an empty FIFO when something is typed. From then on the FIFO is filled again when
//! the guest has emptied it, on the vCPU's thread.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use std::os::fd::AsRawFd;
use tracing::error;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::device::{Uart, lock};
use crate::devices::gate::DeviceGate;
use crate::devices::port::PortInput;
use crate::signals;

/// The running thread; dropping it ends the thread, also from behind a closed gate.
pub(super) struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    gate: Arc<DeviceGate>,
    control: EventFd,
    quit: AtomicBool,
}

impl Worker {
    pub(super) fn start(
        gate: Arc<DeviceGate>,
        uart: Arc<Mutex<Uart>>,
        input: Arc<PortInput>,
    ) -> io::Result<Self> {
        let control = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let epoll = Epoll::new()?;
        for fd in [control.as_raw_fd(), input.arrived().as_raw_fd()] {
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, 0))?;
        }
        let shared = Arc::new(Shared { gate, control, quit: AtomicBool::new(false) });
        let thread = {
            let shared = shared.clone();
            // The input goes along: its eventfd must stay open while it is waited for.
            thread::Builder::new()
                .name("outlive-serial".into())
                .spawn(move || run(&shared, &epoll, &uart, &input))?
        };
        Ok(Self { shared, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::Release);
        self.shared.gate.recheck();
        // Fails only if the counter is full, and then the thread is being woken anyway.
        let _ = self.shared.control.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("the serial port's thread had panicked");
        }
    }
}

fn run(shared: &Shared, epoll: &Epoll, uart: &Mutex<Uart>, input: &PortInput) {
    signals::block_all(false);
    let mut events = [EpollEvent::default(); 2];
    loop {
        match epoll.wait(-1, &mut events) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                // The descriptors are all ours and open: this does not happen.
                error!(%error, "the serial port cannot wait for input and takes no more");
                return;
            }
        }
        let Some(_pass) = shared.gate.enter_unless(&shared.quit) else { return };
        if !input.is_empty() {
            lock(uart).refill();
        }
    }
}
