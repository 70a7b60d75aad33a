//! `outlive vm`.

use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::options::{Api, One, VmCommand, VmOptions};
use super::say::{Outcome, Said, print};
use super::table::{table, width};
use super::{client, job};
use crate::definition::LONGEST;
use crate::view::View;

#[derive(Deserialize, Serialize)]
struct Vms {
    vms: Vec<View>,
}

pub(super) fn command(options: &VmOptions) -> Outcome {
    match &options.command {
        VmCommand::List(api) => list(api),
        VmCommand::Show(One { name, api }) => {
            let vm: View = client(api)?.get(&route(name, ""))?;
            print(api.json, &vm, show)
        }
        VmCommand::Define { name, file, api } => define(name, file, api),
        VmCommand::Undefine(One { name, api }) => {
            let _: Value = client(api)?.send("DELETE", &route(name, ""), None)?;
            print(api.json, &json!({}), |_| format!("VM {name} is not defined any more\n"))
        }
        VmCommand::Start(One { name, api }) => job(api, &route(name, "/start"), None::<&()>),
        VmCommand::Stop { name, now, only_standby, api } => {
            let how = json!({ "now": now, "only_standby": only_standby });
            job(api, &route(name, "/stop"), Some(&how))
        }
        VmCommand::HandOver(One { name, api }) => job(api, &route(name, "/hand-over"), None::<&()>),
        VmCommand::Logs(One { name, api }) => {
            let log: Value = client(api)?.get(&route(name, "/log"))?;
            print(api.json, &log, |log| log["log"].as_str().unwrap_or_default().to_owned())
        }
    }
}

/// A name's bytes that mean something in a URL are no part of it.
fn route(name: &str, rest: &str) -> String {
    let mut route = String::from("/v1/vms/");
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.".contains(&byte) {
            route.push(byte.into());
        } else {
            route += &format!("%{byte:02X}");
        }
    }
    route + rest
}

fn list(api: &Api) -> Outcome {
    let all: Vms = client(api)?.get("/v1/vms")?;
    print(api.json, &all, |all| {
        let rows: Vec<_> = all.vms.iter().map(row).collect();
        table(["NAME", "STATE", "PROTECTED", "PID", "WHY"], &rows, width())
    })
}

fn row(vm: &View) -> [String; 5] {
    let pid = vm.pid.map_or_else(String::new, |pid| pid.to_string());
    let protected = if vm.protected { "yes" } else { "no" };
    let why = vm.definition_error.clone().or_else(|| vm.why.clone()).unwrap_or_default();
    [vm.name.clone(), vm.state.name().into(), protected.into(), pid, why]
}

fn show(vm: &View) -> String {
    let protected = if vm.protected { "protected" } else { "UNPROTECTED" };
    let mut text = format!("{}: {}, {protected}, since {}\n", vm.name, vm.state.name(), vm.since);
    let mut line = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            text += &format!("  {name:<12} {value}\n");
        }
    };
    let adopted = if vm.adopted { " (started by an earlier node)" } else { "" };
    line("why", vm.why.clone());
    line("process", vm.pid.map(|pid| format!("{pid}{adopted}")));
    line("desired", Some(format!("{:?}", vm.desired).to_lowercase()));
    line("failures", (vm.failures > 0).then(|| vm.failures.to_string()));
    line("last end", vm.last_end.as_ref().map(|end| format!("{} ({})", end.what, end.at)));
    line("definition", vm.definition_error.clone());
    let changed = "has changed and counts from the next start";
    line("definition", vm.definition_changed.then(|| changed.to_owned()));
    let told = |key: &str| vm.status.as_ref().map(|it| &it[key]).filter(|it| !it.is_null());
    line("generation", told("generation").map(Value::to_string));
    line("peer", told("peer").and_then(|it| it.as_str().map(str::to_owned)));
    for (key, what) in [("loss_of_this_host", "loss here"), ("loss_of_other_host", "loss there")] {
        line(what, told(key).and_then(|it| it["what"].as_str().map(str::to_owned)));
    }
    text
}

fn define(name: &str, file: &Path, api: &Api) -> Outcome {
    let text = read(file).map_err(|error| Said::Read(file.display().to_string(), error))?;
    let vm: View = client(api)?.send("PUT", &route(name, ""), Some(("application/toml", text)))?;
    print(api.json, &vm, |vm| {
        let then = if vm.pid.is_some() {
            "its process keeps what it was started with until its next start".to_owned()
        } else {
            format!("`outlive vm start {name}` starts it")
        };
        format!("VM {name} is defined; {then}\n")
    })
}

/// Reads a definition, and a little more than one can have, so that the node says so.
fn read(file: &Path) -> std::io::Result<String> {
    let most = LONGEST as u64 + 1;
    let mut text = String::new();
    if file == Path::new("-") {
        std::io::stdin().take(most).read_to_string(&mut text)?;
    } else {
        std::fs::File::open(file)?.take(most).read_to_string(&mut text)?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_leave_their_place_in_a_url() {
        assert_eq!(route("web-1.x", "/start"), "/v1/vms/web-1.x/start");
        assert_eq!(route("a/../b?c#d e", ""), "/v1/vms/a%2F..%2Fb%3Fc%23d%20e");
    }
}
