//! Hears what the processes of this host have counted.
//!
//! They are asked side by side, each for a limited time. A process that stands still, or says what nobody understands, costs
//! its own metrics and nobody else's.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::report::{Report, Unsound};
use super::tell;
use crate::socket;

/// How long an answer may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);
/// How soon a process at which many ask is tried again.
const AGAIN: Duration = Duration::from_millis(2);
/// The longest answer, in bytes.
const LONGEST: usize = 128 << 10;
/// The most processes that are asked.
const MOST: usize = 128;
/// How many are asked at a time: if half of them stood still, all would be asked within a few seconds.
const AT_A_TIME: usize = 32;

/// Where processes are looked for.
#[derive(Clone, Debug)]
pub(super) enum Places {
    /// All that are in these folders.
    Folders(Vec<PathBuf>),
    /// Those with these status sockets.
    Sockets(Vec<PathBuf>),
}

/// What all processes said at one time.
#[derive(Debug)]
pub(super) struct Scrape {
    /// The processes, by their sockets.
    pub(super) processes: Vec<Process>,
    /// Folders that are there, and whether they can be looked into.
    pub(super) folders: Vec<(PathBuf, bool)>,
    /// Processes that were not asked, because there are too many.
    pub(super) ignored: usize,
    /// When that was.
    pub(super) at: SystemTime,
}

/// One process.
#[derive(Debug)]
pub(super) struct Process {
    /// Its status socket.
    pub(super) socket: PathBuf,
    /// Name of its VM, as it says or has said, else as the socket is called.
    pub(super) vm: String,
    /// How long the answer took.
    pub(super) took: Duration,
    /// The answer.
    pub(super) report: Result<Report, AskError>,
}

/// Why a process tells nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum AskError {
    /// It has ended without removing its socket, or stands still, or may not be asked.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Its answer does not end.
    #[error("its answer is longer than {LONGEST} bytes")]
    Long,
    /// Its answer is no report.
    #[error("its answer is not understood: {0}")]
    Malformed(#[from] serde_json::Error),
    /// Its answer cannot be true.
    #[error(transparent)]
    Unsound(#[from] Unsound),
}

/// Asks, and remembers the names of VMs: a process that has died cannot say which one it had.
#[derive(Debug)]
pub(super) struct Asker {
    places: Places,
    names: Mutex<BTreeMap<PathBuf, String>>,
}

impl Asker {
    /// Asks in these places.
    pub(super) fn new(places: Places) -> Self {
        Self { places, names: Mutex::default() }
    }

    /// Asks everybody.
    pub(super) fn ask_all(&self) -> Scrape {
        let (mut sockets, folders) = match &self.places {
            Places::Sockets(sockets) => (sockets.clone(), Vec::new()),
            Places::Folders(folders) => look(folders),
        };
        once_each(&mut sockets);
        let ignored = sockets.len().saturating_sub(MOST);
        if ignored > 0 {
            // Sockets that dead processes have left must not hide living ones.
            sockets.sort_by_cached_key(|socket| is_dead(socket));
        }
        sockets.truncate(MOST);
        let named = matches!(self.places, Places::Sockets(_));
        let answers = side_by_side(&sockets);
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.retain(|socket, _| sockets.contains(socket));
        let mut processes = Vec::new();
        for (socket, (took, report)) in sockets.into_iter().zip(answers) {
            // It has ended in order since the folder was read.
            let gone = matches!(&report, Err(AskError::Io(error)) if error.kind() == ErrorKind::NotFound);
            if gone && !named {
                continue;
            }
            if let Ok(Report { vm: Some(name), .. }) = &report {
                names.insert(socket.clone(), name.clone());
            }
            let vm = names.get(&socket).cloned().unwrap_or_else(|| match &report {
                Ok(_) => String::new(),
                Err(_) => socket.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
            });
            processes.push(Process { socket, vm, took, report });
        }
        Scrape { processes, folders, ignored, at: SystemTime::now() }
    }
}

/// Leaves out what was named twice: nobody takes metrics in which a series comes twice.
fn once_each(sockets: &mut Vec<PathBuf>) {
    let mut seen = BTreeSet::new();
    sockets.retain(|socket| {
        let file = std::fs::metadata(tell::beside(socket));
        seen.insert(file.map_or_else(|_| Err(socket.clone()), |file| Ok((file.dev(), file.ino()))))
    });
}

/// Whether nobody listens there.
fn is_dead(status: &Path) -> bool {
    socket::connect(&tell::beside(status)).is_err_and(|error| error.kind() != ErrorKind::WouldBlock)
}

/// The status sockets of the processes in these folders.
fn look(folders: &[PathBuf]) -> (Vec<PathBuf>, Vec<(PathBuf, bool)>) {
    let (mut sockets, mut seen) = (Vec::new(), Vec::new());
    for folder in folders {
        match std::fs::read_dir(folder) {
            Ok(files) => {
                let names = files.flatten().map(|file| file.path());
                let status = |path: PathBuf| path.to_str()?.strip_suffix(tell::SUFFIX).map(PathBuf::from);
                sockets.extend(names.filter_map(status));
                seen.push((folder.clone(), true));
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(_) => seen.push((folder.clone(), false)),
        }
    }
    sockets.sort();
    (sockets, seen)
}

type Answer = (Duration, Result<Report, AskError>);

/// Asks all of them, a number at a time, and returns their answers in order.
fn side_by_side(sockets: &[PathBuf]) -> Vec<Answer> {
    let next = AtomicUsize::new(0);
    let answers: Mutex<Vec<Option<Answer>>> = Mutex::new(sockets.iter().map(|_| None).collect());
    let work = || {
        while let Some((at, socket)) =
            Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|at| Some((at, sockets.get(at)?)))
        {
            let began = Instant::now();
            let report = ask(socket, began + PATIENCE);
            answers.lock().unwrap_or_else(PoisonError::into_inner)[at] = Some((began.elapsed(), report));
        }
    };
    std::thread::scope(|scope| {
        // This thread does its part, whether or not others can be started.
        for number in 1..sockets.len().min(AT_A_TIME) {
            if std::thread::Builder::new().name(format!("ask-{number}")).spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    let answers = answers.into_inner().unwrap_or_else(PoisonError::into_inner);
    answers.into_iter().map(|answer| answer.expect("every number was drawn by somebody")).collect()
}

/// Asks the process with this status socket.
///
/// # Errors
/// See [`AskError`].
pub(super) fn ask(status: &Path, deadline: Instant) -> Result<Report, AskError> {
    let mut socket = loop {
        match socket::connect(&tell::beside(status)) {
            // Others ask, too.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if Instant::now() >= deadline {
                    let why = "too many wait for its answer: it stands still, or somebody asks without end";
                    return Err(io::Error::new(ErrorKind::TimedOut, why).into());
                }
                std::thread::sleep(AGAIN);
            }
            socket => break socket?,
        }
    };
    let mut bytes = Vec::new();
    let mut part = [0; 16 << 10];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(silent());
        }
        socket.set_read_timeout(Some(left))?;
        match socket.read(&mut part) {
            Ok(0) => break,
            Ok(_) if bytes.len() + part.len() > LONGEST => return Err(AskError::Long),
            Ok(length) => bytes.extend_from_slice(&part[..length]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(silent()),
            Err(error) => return Err(error.into()),
        }
    }
    parse(&bytes)
}

/// What a process says, if it can be true.
///
/// # Errors
/// [`AskError::Malformed`] and [`AskError::Unsound`].
pub(super) fn parse(bytes: &[u8]) -> Result<Report, AskError> {
    let report: Report = serde_json::from_slice(bytes)?;
    report.check()?;
    Ok(report)
}

fn silent() -> AskError {
    let why = format!("it has not answered for {} s", PATIENCE.as_secs());
    io::Error::new(ErrorKind::TimedOut, why).into()
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    use super::super::report::{AuditedDisk, Running};
    use super::*;
    use crate::events::Role;
    use crate::status::Standing;

    fn listen(folder: &Path, name: &str) -> UnixListener {
        UnixListener::bind(folder.join(format!("{name}.sock.metrics"))).unwrap()
    }

    /// Processes that died long ago have left their sockets, and come first by name.
    #[test]
    fn dead_sockets_hide_no_living_process_and_each_is_asked_once() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let well = Standing::new(Role::Primary, Some("well"), "why");
        let _told = super::super::tell(&at.join("zz.sock"), well).unwrap();
        (0..MOST + 2).for_each(|number| drop(listen(at, &format!("a{number}"))));
        let scrape = Asker::new(Places::Folders(vec![at.to_owned()])).ask_all();
        assert_eq!((scrape.processes.len(), scrape.ignored), (MOST, 3));
        assert_eq!(scrape.processes.iter().filter(|it| it.report.is_ok()).count(), 1);
        let (plain, other) = (at.join("zz.sock"), at.join(".").join("zz.sock"));
        let scrape = Asker::new(Places::Sockets(vec![plain.clone(), plain, other])).ask_all();
        assert_eq!(scrape.processes.len(), 1);
    }

    /// Some connect all the time and say nothing.
    #[test]
    fn whoever_floods_a_process_does_not_make_it_look_dead() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let standing = Standing::new(Role::Primary, Some("well"), "why");
        let _told = super::super::tell(&at.join("a.sock"), standing).unwrap();
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        let _ = socket::connect(&at.join("a.sock.metrics"));
                    }
                });
            }
            let asked = (0..20).map(|_| ask(&at.join("a.sock"), Instant::now() + 20 * PATIENCE).is_ok());
            let answered = asked.filter(|&answered| answered).count();
            over.store(true, Ordering::Relaxed);
            assert_eq!(answered, 20);
        });
    }

    /// Whatever the others do, each answers for itself.
    #[test]
    fn a_process_that_does_not_answer_costs_its_own_metrics_only() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let well = Standing::new(Role::Primary, Some("well"), "why");
        let _told = super::super::tell(&at.join("well.sock"), well).unwrap();
        let _silent = listen(at, "silent");
        drop(listen(at, "dead"));
        let says = |name: &str, what: Vec<u8>| {
            let listener = listen(at, name);
            std::thread::spawn(move || {
                for client in listener.incoming() {
                    // It hangs up before everything is said.
                    let _ = client.unwrap().write_all(&what);
                }
            });
        };
        says("wrong", b"{\"format\":1}\n".to_vec());
        says("endless", vec![b' '; LONGEST * 2]);
        // It drips.
        let drips = listen(at, "drips");
        std::thread::spawn(move || {
            let (mut client, _) = drips.accept().unwrap();
            while client.write_all(b" ").is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let asker = Asker::new(Places::Folders(vec![at.join("missing"), at.to_owned()]));
        let scrape = asker.ask_all();
        let said = |name: &str| {
            let process = scrape.processes.iter().find(|it| it.vm == name).expect(name);
            process.report.as_ref().map(|report| report.vm.clone()).map_err(ToString::to_string)
        };
        assert_eq!(said("well"), Ok(Some("well".into())));
        assert!(said("silent").unwrap_err().contains("not answered for 1 s"));
        assert!(said("drips").unwrap_err().contains("not answered for 1 s"));
        assert!(said("dead").unwrap_err().contains("refused"));
        assert!(said("wrong").unwrap_err().contains("not understood"));
        assert!(said("endless").unwrap_err().contains("longer than"));
        assert_eq!((scrape.processes.len(), scrape.ignored), (6, 0));
        assert_eq!(scrape.folders, [(at.to_owned(), true)]);
    }

    #[test]
    fn a_process_that_has_died_keeps_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let asker = Asker::new(Places::Sockets(vec![socket.clone()]));
        let standing = Standing::new(Role::Primary, Some("web"), "why");
        let told = super::super::tell(&socket, standing).unwrap();
        let [process] = &asker.ask_all().processes[..] else { panic!("one was asked") };
        assert!(process.report.is_ok() && process.vm == "web");
        drop(told);
        let [process] = &asker.ask_all().processes[..] else { panic!("one was asked") };
        assert!(process.report.is_err() && process.vm == "web");
    }

    #[test]
    fn reports_that_cannot_be_are_not_believed() {
        let standing = Standing::new(Role::Standby, Some("web"), "why");
        // Numbers that a decimal fraction has to the last bit.
        let report = Report { started: 0.5, since: 0.25, ..standing.report(None) };
        assert_eq!(report.check(), Ok(()));
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
        assert_eq!(Report { format: 2, ..report.clone() }.check(), Err(Unsound::Format(2)));
        let named = |vm: String| Report { vm: Some(vm), ..report.clone() }.check();
        assert_eq!(named("x".repeat(300)), Err(Unsound::Impossible));
        assert_eq!(named("a\nb".into()), Err(Unsound::Impossible));
        let mut lies = report;
        // Without a bound, and with a value.
        lies.takeovers.total.counts = vec![1, 1];
        assert_eq!(lies.check(), Err(Unsound::Impossible));
        let disks = |indices: &[u16]| {
            let disks = indices.iter().map(|&disk| AuditedDisk { disk, ..AuditedDisk::default() }).collect();
            Report { running: Some(Running { disks, ..Running::default() }), ..standing.report(None) }.check()
        };
        assert_eq!(disks(&[0, 2, 9]), Ok(()));
        for twice in [[0, 0], [2, 1]] {
            assert_eq!(disks(&twice), Err(Unsound::Impossible), "one series twice");
        }
        assert_eq!(disks(&(0..65).collect::<Vec<_>>()), Err(Unsound::Impossible));
    }
}
