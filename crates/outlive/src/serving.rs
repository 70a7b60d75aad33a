//! A thread that serves clients, in a `poll` loop, until its handle is dropped; and what a process that does nothing
//! but serve needs beside it.

use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::process;

/// Listens on the first address of a name that is this host's, without ever waiting. Returns which it is.
///
/// # Errors
/// The operating system's.
pub(crate) fn listen(address: &str) -> io::Result<(TcpListener, SocketAddr)> {
    // It tries one address after the other.
    let listener = TcpListener::bind(&*address.to_socket_addrs()?.collect::<Vec<_>>())?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// From now on an order to stop no longer kills the process: it comes here, in words.
///
/// # Errors
/// The operating system's.
pub(crate) fn stops(exit_with_stdin: bool) -> io::Result<Receiver<&'static str>> {
    let (told, stops) = channel();
    process::on_stop(exit_with_stdin, move |why| {
        // Nobody listens once the process ends.
        let _ = told.send(why);
    })?;
    Ok(stops)
}

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
