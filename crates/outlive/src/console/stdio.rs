//! `--console stdio`: the guest's serial port at this process's own terminal, or pipes.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use outlive_machine::devices::port::PortInput;

use super::client::ClientOutput;
use super::hub::Hub;
use super::terminal::{Key, Keys, RawTerminal, TERMINAL_WRITE};

const HELP: &[u8] = b"\r\n[outlive: Ctrl-] x ends the VM, Ctrl-] Ctrl-] is a Ctrl-] for the guest]\r\n";

/// Tells the process to end, and why.
pub(crate) type Stop = Box<dyn Fn(&'static str) + Send>;

/// Standard input and output, connected to a port.
pub(crate) struct Stdio {
    keyboard: Option<File>,
    screen: Option<File>,
    out: ClientOutput,
    /// Restores the terminal; none when standard input is no terminal.
    terminal: Option<RawTerminal>,
    keys: Keys,
    stop: Stop,
}

impl Stdio {
    /// Takes over standard input and output.
    ///
    /// # Errors
    /// The operating system's, when one of them is closed.
    pub(crate) fn take(hub: &Hub, stop: Stop) -> io::Result<Self> {
        let keyboard = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let screen = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        Self::with(keyboard, screen, hub, stop)
    }

    pub(crate) fn with(keyboard: File, screen: File, hub: &Hub, stop: Stop) -> io::Result<Self> {
        let terminal = RawTerminal::take(&keyboard)?;
        let out = ClientOutput::new(hub);
        Ok(Self {
            keyboard: Some(keyboard),
            screen: Some(screen),
            out,
            terminal,
            keys: Keys::default(),
            stop,
        })
    }

    /// Keys are always read, because one may be an order; a pipe waits until there is room.
    pub(crate) fn wants_keys(&self, room: usize) -> Option<BorrowedFd<'_>> {
        let keyboard = self.keyboard.as_ref().map(AsFd::as_fd);
        keyboard.filter(|_| room > 0 || self.terminal.is_some())
    }

    pub(crate) fn wants_screen(&self, end: u64) -> Option<BorrowedFd<'_>> {
        self.screen.as_ref().map(AsFd::as_fd).filter(|_| !self.out.is_done(end))
    }

    pub(crate) fn is_done(&self, end: u64) -> bool {
        self.screen.is_none() || self.out.is_done(end)
    }

    /// The screen has room, or is gone.
    pub(crate) fn screen(&mut self, hub: &Hub, found: PollFlags) {
        let Some(screen) = &mut self.screen else { return };
        let gone = !found.contains(PollFlags::POLLOUT);
        // Only one write: others may share the terminal, so it cannot be made non-blocking.
        if gone || self.out.pump_once(hub, screen, TERMINAL_WRITE).is_err() {
            tracing::warn!("standard output was closed: the guest's console is no longer shown");
            self.screen = None;
        }
    }

    /// Handles what was typed.
    pub(crate) fn keys(&mut self, input: &PortInput, buffer: &mut [u8]) {
        let Some(keyboard) = &mut self.keyboard else { return };
        let most = if self.terminal.is_some() { 64 } else { input.room().min(buffer.len()) };
        if most == 0 {
            return;
        }
        match keyboard.read(&mut buffer[..most]) {
            Ok(count) if count > 0 => self.typed(&buffer[..count], input),
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
            _ => self.keyboard = None,
        }
    }

    fn typed(&mut self, bytes: &[u8], input: &PortInput) {
        if self.terminal.is_none() {
            input.push(bytes);
            return;
        }
        for &byte in bytes {
            match self.keys.press(byte) {
                Key::Send(byte) => {
                    if input.push(&[byte]) == 0 {
                        input.lose(1);
                        self.say(b"\x07");
                    }
                }
                Key::Nothing => {}
                Key::Help => self.say(HELP),
                Key::End => (self.stop)("ended at the console"),
            }
        }
    }

    fn say(&mut self, text: &[u8]) {
        let Some(screen) = &mut self.screen else { return };
        // A stopped screen must not keep this thread from seeing the order to end.
        let mut room = [PollFd::new(screen.as_fd(), PollFlags::POLLOUT)];
        if poll(&mut room, PollTimeout::ZERO) == Ok(1) {
            // A screen that is gone is noticed when the guest prints.
            let _ = screen.write(text);
        }
    }
}
