//! `outlive node`, `outlive vm` and `outlive top`: the commands, as clients of the API.

mod events;
mod names;
mod options;
mod page;
mod say;
mod serve;
mod table;
mod top;
mod vm;

pub use options::{Api, NodeCommand, NodeOptions, Serve, TopOptions, VmCommand, VmOptions, Whom};
pub use serve::Service;
pub use table::width;

use std::sync::mpsc::Receiver;

use serde::Serialize;
use serde_json::json;

use self::say::{Outcome, Said, print};
use crate::client::Client;
use crate::jobs::Job;
use crate::node::NodeView;
use crate::program::Program;
use crate::remote::OpenKeys;

/// Done.
pub const OK: u8 = 0;
/// The node refuses, or the job has failed.
pub const FAILED: u8 = 1;
/// Wrong options or definitions, or nobody answers.
pub const USAGE: u8 = 2;

/// `outlive node`: returns the exit code. `service` is needed by those commands that serve.
pub fn node(
    options: &NodeOptions,
    program: Program,
    service: impl FnOnce() -> std::io::Result<Service>,
    keys: OpenKeys,
) -> u8 {
    match &options.command {
        NodeCommand::Run(serve) => serve::run(serve, program, service, keys),
        NodeCommand::Check { vms, host, json } => {
            say::conclude(serve::check(vms, host.as_deref(), *json, &program))
        }
        NodeCommand::Status(api) => say::conclude(status(&api.with(keys))),
        NodeCommand::Drain { stop, wait, api } => {
            let body = json!({ "stop": stop, "wait_s": wait });
            say::conclude(job(&api.with(keys), "/v1/node/drain", Some(&body)))
        }
        NodeCommand::Page { listen, socket, .. } => page::run(*listen, socket, service),
        NodeCommand::Undrain(api) => say::conclude(undrain(&api.with(keys))),
        NodeCommand::Events { after, api } => say::conclude(events::command(after.clone(), &api.with(keys))),
    }
}

/// `outlive vm`: returns the exit code.
pub fn vm(options: &VmOptions, keys: OpenKeys) -> u8 {
    say::conclude(vm::command(options, keys))
}

/// `outlive top`: returns the exit code. `stops` tells of orders to stop.
pub fn top(
    options: &TopOptions,
    stops: impl FnOnce() -> std::io::Result<Receiver<&'static str>>,
    keys: OpenKeys,
) -> u8 {
    say::conclude(top::command(options, stops, keys))
}

/// Where a command asks, with what, and how it shows what it hears.
struct Asked<'a> {
    api: &'a Api,
    json: bool,
    keys: OpenKeys,
}

impl Api {
    fn with(&self, keys: OpenKeys) -> Asked<'_> {
        Asked { api: self, json: self.json, keys }
    }
}

/// The variables that stand for `--host` and `--keys`.
const HOST: &str = "OUTLIVE_HOST";
const KEYS: &str = "OUTLIVE_KEYS";

fn client(asked: &Asked<'_>) -> Result<Client, Said> {
    asking(&asked.api.whom, asked.keys)
}

fn asking(whom: &Whom, open: OpenKeys) -> Result<Client, Said> {
    let said = |name: &str| std::env::var(name).ok().filter(|it| !it.is_empty());
    let of_variable = || match said(HOST) {
        Some(text) if whom.socket.is_none() => text.parse().map(Some).map_err(Said::Host),
        _ => Ok(None),
    };
    let host = whom.host.clone().map_or_else(of_variable, |host| Ok(Some(host)))?;
    let client = match host {
        Some(host) => {
            let keys = whom.keys.clone().or_else(|| said(KEYS).map(Into::into));
            Client::there(&host, open(keys.as_deref()))
        }
        None => Client::here(whom.socket.as_deref().unwrap_or(std::path::Path::new(options::API))),
    };
    client.map_err(Said::Runtime)
}

fn status(api: &Asked<'_>) -> Outcome {
    let node: NodeView = client(api)?.get("/v1/node")?;
    print(api.json, &node, |node| {
        let mut text = format!(
            "host {}: {}, release {}, since {}\n",
            node.host,
            node.mode.name(),
            node.version,
            node.since
        );
        node.warnings.iter().for_each(|why| text += &format!("  WARNING: {why}\n"));
        for (state, count) in &node.vms {
            text += &format!("  {count} {state}\n");
        }
        if !node.unprotected.is_empty() {
            text += &format!("  UNPROTECTED: {}\n", node.unprotected.join(", "));
        }
        text
    })
}

fn undrain(api: &Asked<'_>) -> Outcome {
    let node: NodeView = client(api)?.send("POST", "/v1/node/undrain", None)?;
    print(api.json, &node, |node| format!("host {} is {}\n", node.host, node.mode.name()))
}

/// Begins a job, follows it, and says what it has come to.
fn job(api: &Asked<'_>, route: &str, body: Option<&impl Serialize>) -> Outcome {
    let client = client(api)?;
    // Plain data: this cannot fail.
    let text =
        body.map(|it| ("application/json", serde_json::to_string(it).expect("a request is plain data")));
    let job: Job = client.send("POST", route, text)?;
    let job = client.follow(job, |job| {
        if !api.json && !job.progress.now.is_empty() {
            say::warn(&job.progress.now);
        }
    })?;
    say::job(api.json, job)
}
