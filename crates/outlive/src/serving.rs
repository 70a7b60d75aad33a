//! A thread that serves clients of this host, in a `poll` loop, until its handle is dropped.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use nix::sys::eventfd::{EfdFlags, EventFd};

/// The running thread. Dropping it makes the thread's `quit` readable and waits for the thread's end.
#[derive(Debug)]
pub(crate) struct ServingThread {
    name: &'static str,
    quit: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl ServingThread {
    /// Starts `serve`, which ends soon after its argument becomes readable.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn start(
        name: &'static str,
        serve: impl FnOnce(&EventFd) + Send + 'static,
    ) -> io::Result<Self> {
        let quit = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let told = quit.clone();
        let thread = outlive_machine::spawn(name, move || serve(&told))?;
        Ok(Self { name, quit, thread: Some(thread) })
    }
}

impl Drop for ServingThread {
    fn drop(&mut self) {
        // Fails only if the counter is full, and then the thread is being woken anyway.
        let _ = self.quit.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread '{}' had panicked", self.name);
        }
    }
}
