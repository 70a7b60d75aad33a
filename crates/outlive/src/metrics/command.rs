//! `outlive metrics`: prints or serves the metrics of this host.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use nix::unistd::geteuid;

use super::ask::{Asker, Places, Process, Scrape};
use super::http::{self, Page};
use super::text::{Format, text};
use crate::cli::MetricsOptions;
use crate::serving::ServingThread;
use crate::{exit, logs, notify, serving, status};

/// `outlive metrics`: returns the exit code.
pub fn command(options: &MetricsOptions) -> u8 {
    let places = match &options.sockets[..] {
        [] => Places::Folders(status::folders()),
        sockets => Places::Sockets(sockets.to_vec()),
    };
    let asker = Asker::new(places);
    let done = match &options.listen {
        None => print(&asker, options.openmetrics, &mut outlive_node::printed()),
        Some(address) => serve(asker, address, options.exit_with_stdin),
    };
    match done {
        Ok(()) => exit::OK,
        Err(line) => exit::usage(line),
    }
}

/// Why there are no metrics.
#[derive(Debug, thiserror::Error)]
enum MetricsError {
    /// Nobody answers at the usual places.
    #[error(
        "no VM or standby that you may ask runs on this host (none answers in {}): give the path of its --status with \
         --socket, or ask as the user who runs it",
        listed(.0)
    )]
    Nobody(Vec<PathBuf>),
    /// The process that the user names does not answer.
    #[error("{} tells nothing: {why}; give the --status path of a running outlive run or standby, or none to see all", .socket.display())]
    Silent { socket: PathBuf, why: String },
    /// They cannot be shown.
    #[error("cannot print: {0}")]
    Print(#[source] io::Error),
    /// The address cannot be used.
    #[error(
        "cannot listen on {address}: {source}; give --listen an address of this host, for example 127.0.0.1:9753"
    )]
    Listen { address: String, source: io::Error },
    /// The system refuses something else.
    #[error("cannot serve: {0}")]
    System(#[source] io::Error),
}

fn listed(folders: &[PathBuf]) -> String {
    let folders: Vec<_> = folders.iter().map(|folder| folder.display().to_string()).collect();
    folders.join(" or ")
}

fn print(asker: &Asker, openmetrics: bool, out: &mut impl Write) -> Result<(), MetricsError> {
    let scrape = asker.ask_all();
    if let Some(why) = nothing(&scrape) {
        return Err(why);
    }
    let format = if openmetrics { Format::OpenMetrics } else { Format::Prometheus };
    out.write_all(text(scrape, format).as_bytes()).map_err(MetricsError::Print)
}

/// Why there is nothing worth printing.
fn nothing(scrape: &Scrape) -> Option<MetricsError> {
    match &scrape.processes[..] {
        [] => Some(MetricsError::Nobody(status::folders())),
        all if all.iter().any(|it| it.report.is_ok()) => None,
        [Process { socket, report, .. }, ..] => {
            let why = report.as_ref().err().map_or_else(String::new, ToString::to_string);
            Some(MetricsError::Silent { socket: socket.clone(), why })
        }
    }
}

/// What is served: everybody is asked anew each time, and one scrape at a time.
struct Served(Mutex<Asker>);

impl Page for Served {
    fn metrics(&self, format: Format) -> String {
        let asker = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let scrape = asker.ask_all();
        drop(asker);
        for Process { socket, report, .. } in &scrape.processes {
            if let Err(why) = report {
                tracing::debug!("{} tells nothing: {why}", socket.display());
            }
        }
        text(scrape, format)
    }
}

fn serve(asker: Asker, address: &str, exit_with_stdin: bool) -> Result<(), MetricsError> {
    let (listener, address) = serving::listen(address)
        .map_err(|source| MetricsError::Listen { address: address.to_owned(), source })?;
    let stops = serving::stops(exit_with_stdin).map_err(MetricsError::System)?;
    if geteuid().is_root() {
        tracing::warn!(
            "this process needs no right of root: run it as another user (systemd/outlive-metrics.service)"
        );
    }
    if !address.ip().to_canonical().is_loopback() {
        tracing::warn!(
            "whoever reaches {address} can read the metrics: they are neither encrypted nor authenticated"
        );
    }
    logs::say(&format!("metrics are at http://{address}/metrics"));
    let page = Arc::new(Served(Mutex::new(asker)));
    let thread = ServingThread::start("http", move |quit| http::serve(&listener, &page, quit));
    let thread = thread.map_err(MetricsError::System)?;
    notify::ready();
    let why = stops.recv().unwrap_or("told to stop");
    notify::stopping();
    tracing::info!("{why}");
    drop(thread);
    Ok(())
}
