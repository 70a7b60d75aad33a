//! A person's terminal.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use nix::sys::termios::{
    InputFlags, LocalFlags, SetArg, SpecialCharacterIndices, Termios, tcgetattr, tcsetattr,
};

/// Ctrl-], which begins an order to Outlive itself, as in telnet.
pub(crate) const ESCAPE: u8 = 0x1d;

/// Most bytes that go to a terminal at once: what it takes without blocking when it says that it is writable.
pub(crate) const TERMINAL_WRITE: usize = 256;

/// A terminal in raw mode: keys come one by one and have no meaning here. Dropping it restores the terminal.
///
/// Output is still processed, so that log lines between the guest's lines look right.
#[derive(Debug)]
pub(crate) struct RawTerminal {
    terminal: OwnedFd,
    before: Termios,
}

impl RawTerminal {
    /// Takes the terminal; `None` when standard input is no terminal.
    pub(crate) fn take(terminal: impl AsFd) -> io::Result<Option<Self>> {
        let Ok(before) = tcgetattr(&terminal) else { return Ok(None) };
        let mut raw = before.clone();
        raw.input_flags &= !(InputFlags::IGNBRK
            | InputFlags::BRKINT
            | InputFlags::PARMRK
            | InputFlags::ISTRIP
            | InputFlags::INLCR
            | InputFlags::IGNCR
            | InputFlags::ICRNL
            | InputFlags::IXON);
        raw.local_flags &= !(LocalFlags::ECHO
            | LocalFlags::ECHONL
            | LocalFlags::ICANON
            | LocalFlags::ISIG
            | LocalFlags::IEXTEN);
        raw.control_chars[SpecialCharacterIndices::VMIN as usize] = 1;
        raw.control_chars[SpecialCharacterIndices::VTIME as usize] = 0;
        let terminal = terminal.as_fd().try_clone_to_owned()?;
        *TAKEN.lock().unwrap_or_else(PoisonError::into_inner) = Some((terminal.try_clone()?, before.clone()));
        tcsetattr(&terminal, SetArg::TCSANOW, &raw)?;
        Ok(Some(Self { terminal, before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        TAKEN.lock().unwrap_or_else(PoisonError::into_inner).take();
        restore(&self.terminal, &self.before);
    }
}

/// The terminal that was taken last, for a process that ends without dropping anything.
static TAKEN: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);

/// Gives the terminal back, if one was taken. Never waits, so it may be called from anywhere.
pub(crate) fn restore_terminal() {
    if let Ok(taken) = TAKEN.try_lock()
        && let Some((terminal, before)) = &*taken
    {
        restore(terminal, before);
    }
}

fn restore(terminal: &OwnedFd, before: &Termios) {
    // A closed terminal needs nothing. Waiting output is still written in raw mode.
    let _ = tcsetattr(terminal, SetArg::TCSANOW, before);
}

/// What a key means in `--console stdio`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    /// It is for the guest.
    Send(u8),
    /// The first half of an order.
    Nothing,
    /// End the VM.
    End,
    /// Not an order: show the list of orders.
    Help,
}

/// Tells keys for the guest from orders.
#[derive(Debug, Default)]
pub(crate) struct Keys {
    escaped: bool,
}

impl Keys {
    pub(crate) fn press(&mut self, key: u8) -> Key {
        match (std::mem::take(&mut self.escaped), key) {
            (false, ESCAPE) => {
                self.escaped = true;
                Key::Nothing
            }
            (false, key) => Key::Send(key),
            (true, ESCAPE) => Key::Send(ESCAPE),
            (true, b'x' | b'X') => Key::End,
            (true, _) => Key::Help,
        }
    }
}
