//! `outlive top`.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use super::options::TopOptions;
use super::say::{Outcome, Said, print_line};
use super::table::width;
use super::{OK, asking};
use crate::definition::is_name;
use crate::remote::OpenKeys;
use crate::top::{Asker, State, Told, as_text, follow, give_back, is_terminal, now, show};

/// As wide as a picture is where nobody says.
const USUAL: usize = 100;
/// As wide as it gets.
const WIDEST: usize = 500;
/// How long whoever has the terminal may take to end.
const ENDS: Duration = Duration::from_millis(500);

pub(super) fn command(
    options: &TopOptions,
    stops: impl FnOnce() -> io::Result<Receiver<&'static str>>,
    keys: OpenKeys,
) -> Outcome {
    let name = options.name.as_deref();
    if let Some(name) = name.filter(|name| !is_name(name)) {
        return Err(Said::Name(name.to_owned()));
    }
    if !options.once && !is_terminal() {
        return Err(Said::NoTerminal);
    }
    if options.once {
        let mut asker = Asker::new(asking(&options.whom, keys)?);
        let state = first(&mut asker, name)?;
        let columns = width().unwrap_or(USUAL).min(WIDEST) as u16;
        return print_line(as_text(&state, columns).trim_end());
    }
    // Before any thread: each has what its parent has.
    let stops = stops().map_err(Said::Terminal)?;
    let (tell, told) = channel();
    let (orders, given) = channel();
    let ends = tell.clone();
    start("stops", move || end_when_told(&stops, &ends))?;
    let mut asker = Asker::new(asking(&options.whom, keys)?);
    let follower = asking(&options.whom, keys)?;
    // Whoever may not ask hears it while the terminal is as it was.
    let mut state = first(&mut asker, name)?;
    let (asks, follows) = (tell.clone(), tell.clone());
    start("asker", move || asker.run(&given, &asks))?;
    start("events", move || follow(&follower, &follows))?;
    show(&mut state, &told, tell, &orders).map_err(Said::Terminal)
}

fn start(name: &str, work: impl FnOnce() + Send + 'static) -> Outcome {
    thread::Builder::new().name(name.into()).spawn(work).map(drop).map_err(Said::Terminal)
}

/// An order to stop is obeyed by whoever has the terminal, or here: a node may not have answered yet, and a terminal may
/// take nothing more.
fn end_when_told(stops: &Receiver<&'static str>, tell: &Sender<Told>) {
    if stops.recv().is_ok() {
        let _ = tell.send(Told::Stop);
        thread::sleep(ENDS);
        give_back();
        std::process::exit(OK.into());
    }
}

/// What the node says first; `name` is looked at.
fn first(asker: &mut Asker, name: Option<&str>) -> Result<State, Said> {
    name.map(|name| asker.look_for(name)).transpose()?;
    let heard = asker.ask()?;
    Ok(State::new(&heard, name, now()))
}
