//! The terminal: taken, painted, and given back however this ends.

use std::io::{self, IsTerminal, Stdout, Write, stdin, stdout};
use std::panic;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::{Hide, Show};
use ratatui::crossterm::event::{Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers, read};
use ratatui::crossterm::terminal::{
    EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};
use ratatui::crossterm::{execute, queue};
use ratatui::layout::Rect;

use super::ask::{HandOver, Told};
use super::draw::{Colours, paint};
use super::state::{Key, State, Wish};
use super::text;

/// How often the picture changes by itself: it has times in it.
const TICK: Duration = Duration::from_secs(1);

/// Whether a person looks at standard output, and keys come from standard input.
pub(crate) fn is_terminal() -> bool {
    let dumb = std::env::var("TERM").is_ok_and(|it| it == "dumb");
    stdin().is_terminal() && stdout().is_terminal() && !dumb
}

/// Shows the picture until the operator has seen enough. `told` hears everything; `tell` is its other end.
///
/// # Errors
/// The terminal's.
pub(crate) fn show(
    state: &mut State,
    told: &Receiver<Told>,
    tell: Sender<Told>,
    orders: &Sender<HandOver>,
) -> io::Result<()> {
    let mut screen = Screen::take()?;
    thread::Builder::new().name("keys".into()).spawn(move || keys(&tell))?;
    let colours = Colours::wanted();
    loop {
        state.at(text::now());
        screen.terminal.draw(|frame| {
            let area = frame.area();
            paint(state, colours, area, frame.buffer_mut());
        })?;
        match told.recv_timeout(TICK) {
            Ok(first) => {
                // All that has come is in the next picture.
                for it in [first].into_iter().chain(told.try_iter()) {
                    match hear(state, it, orders)? {
                        Wish::End => return Ok(()),
                        Wish::Redraw => screen.forget()?,
                        Wish::Nothing | Wish::HandOver(_) => {}
                    }
                }
            }
            // A terminal that was closed says nothing, for ever.
            Err(RecvTimeoutError::Timeout) => {
                rustix::termios::tcgetattr(stdin())?;
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

pub(super) fn hear(state: &mut State, told: Told, orders: &Sender<HandOver>) -> io::Result<Wish> {
    match told {
        Told::Heard(heard) => state.take(&heard, text::now()),
        Told::Lost(why) => state.lose(&why),
        Told::Happened(event) => state.happened(&event),
        Told::Missed => state.missed(),
        Told::Begun(job) => state.begun(&job),
        Told::Refused(why) => state.refused(&why),
        Told::Resized => {}
        Told::NoTerminal(why) => return Err(why),
        Told::Stop => return Ok(Wish::End),
        Told::Pressed(key) => {
            let wish = state.press(key);
            if let Wish::HandOver(vm) = &wish {
                let order = HandOver { vm: vm.clone(), said: Instant::now() };
                if orders.send(order).is_err() {
                    state.refused("nobody can give the order any more: end this, and begin it anew");
                }
            }
            return Ok(wish);
        }
    }
    Ok(Wish::Nothing)
}

/// Reads keys until nobody listens.
fn keys(tell: &Sender<Told>) {
    loop {
        let told = match read() {
            Ok(Event::Key(event)) if event.kind != KeyEventKind::Release => Told::Pressed(key(event)),
            Ok(Event::Resize(..)) => Told::Resized,
            Ok(_) => continue,
            Err(why) => Told::NoTerminal(why),
        };
        let ends = matches!(told, Told::NoTerminal(_));
        if tell.send(told).is_err() || ends {
            return;
        }
    }
}

fn key(event: KeyEvent) -> Key {
    let with_control = event.modifiers.contains(KeyModifiers::CONTROL);
    match event.code {
        KeyCode::Char('c' | 'd') if with_control => Key::End,
        KeyCode::Char('l') if with_control => Key::Redraw,
        KeyCode::Char(_) if with_control => Key::Other,
        KeyCode::Char(letter) => Key::Letter(letter),
        KeyCode::Up => Key::Up,
        KeyCode::Down => Key::Down,
        KeyCode::PageUp => Key::PageUp,
        KeyCode::PageDown => Key::PageDown,
        KeyCode::Home => Key::First,
        KeyCode::End => Key::Last,
        KeyCode::Esc => Key::Back,
        _ => Key::Other,
    }
}

/// A terminal that shows nothing but the picture. Dropping it, and a panic of any thread, gives it back.
struct Screen {
    terminal: Terminal<CrosstermBackend<Stdout>>,
    _taken: Taken,
}

struct Taken;

/// Whether there is something to give back.
static TAKEN: AtomicBool = AtomicBool::new(false);

impl Screen {
    fn take() -> io::Result<Self> {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            give_back();
            before(panic);
        }));
        TAKEN.store(true, Ordering::SeqCst);
        let taken = Taken;
        enable_raw_mode()?;
        execute!(stdout(), EnterAlternateScreen, Hide)?;
        Ok(Self { terminal: Terminal::new(CrosstermBackend::new(stdout()))?, _taken: taken })
    }
}

impl Screen {
    /// Forgets what the terminal shows, so that all of it is painted anew. `Terminal::clear` would ask the terminal where its
    /// cursor is, and the answer would come among the keys.
    fn forget(&mut self) -> io::Result<()> {
        let size = self.terminal.size()?;
        self.terminal.resize(Rect::new(0, 0, size.width, size.height))
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        give_back();
    }
}

/// The terminal is as it was. Where it is gone, nothing needs to be. It may be said twice.
pub(crate) fn give_back() {
    if !TAKEN.swap(false, Ordering::SeqCst) {
        return;
    }
    let _ = disable_raw_mode();
    let mut out = stdout();
    let _ = queue!(out, LeaveAlternateScreen, Show);
    let _ = out.flush();
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::process::{Command, Stdio};

    use nix::pty::{Winsize, openpty};
    use nix::sys::termios::{LocalFlags, tcgetattr};

    use super::*;

    const PANICS: &str = "OUTLIVE_PANICS";

    /// No test: it ends like a release that panics, without unwinding, if the test below runs this.
    #[test]
    fn panics_on_a_terminal() {
        if std::env::var_os(PANICS).is_none() {
            return;
        }
        let _screen = Screen::take().unwrap();
        let _ = thread::spawn(|| panic!("a planted panic")).join();
        std::process::exit(7);
    }

    #[test]
    fn a_panic_of_any_thread_gives_the_terminal_back() {
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        let pair = openpty(&size, None).unwrap();
        let terminal = File::from(pair.slave);
        let stdio = || Stdio::from(terminal.try_clone().unwrap());
        let before = tcgetattr(&terminal).unwrap().local_flags;
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "top::screen::tests::panics_on_a_terminal", "--nocapture"]).env(PANICS, "1");
        let mut program = command.stdin(stdio()).stdout(stdio()).stderr(stdio()).spawn().unwrap();
        drop(command);
        let mut keyboard = File::from(pair.master);
        let reader = thread::spawn(move || {
            let mut shown = Vec::new();
            // It ends with an error when nobody has the terminal any more.
            let _ = keyboard.read_to_end(&mut shown);
            String::from_utf8_lossy(&shown).into_owned()
        });
        assert_eq!(program.wait().unwrap().code(), Some(7));
        let after = tcgetattr(&terminal).unwrap().local_flags;
        assert!(after == before && after.contains(LocalFlags::ICANON | LocalFlags::ECHO), "{after:?}");
        drop(terminal);
        let shown = reader.join().unwrap();
        let (taken, given_back) = shown.split_once("\x1b[?1049l").unwrap_or_else(|| panic!("{shown:?}"));
        assert!(taken.contains("\x1b[?1049h") && taken.contains("\x1b[?25l"), "{shown:?}");
        assert!(given_back.contains("\x1b[?25h") && given_back.contains("a planted panic"), "{shown:?}");
    }
}
