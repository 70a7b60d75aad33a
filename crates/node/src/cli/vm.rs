//! `outlive vm`.

use std::io::Read;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::options::{One, VmCommand, VmOptions};
use super::say::{Outcome, Said, print, warn};
use super::table::{table, width};
use super::{Asked, client, job};
use crate::client::{ClientError, of_vm};
use crate::definition::{LONGEST, is_name};
use crate::error::BAD_DEFINITION;
use crate::remote::OpenKeys;
use crate::terminal::shown_in_line;
use crate::view::View;

#[derive(Deserialize, Serialize)]
struct Vms {
    vms: Vec<View>,
}

/// The longest reason in a list, in characters. `outlive vm show` has all of it.
const WHY: usize = 60;

pub(super) fn command(options: &VmOptions, keys: OpenKeys) -> Outcome {
    if let Some(name) = options.command.name().filter(|name| !is_name(name)) {
        return Err(Said::Name(name.to_owned()));
    }
    let api = &options.command.api().with(keys);
    match &options.command {
        VmCommand::List(_) => list(api),
        VmCommand::Show(One { name, .. }) => {
            let vm: View = client(api)?.get(&of_vm(name, ""))?;
            print(api.json, &vm, show)
        }
        VmCommand::Define { name, file, .. } => define(name, file, api),
        VmCommand::Undefine(One { name, .. }) => {
            let _: Value = client(api)?.send("DELETE", &of_vm(name, ""), None)?;
            print(api.json, &json!({}), |_| format!("VM {name} is not defined any more\n"))
        }
        VmCommand::Start(One { name, .. }) => job(api, &of_vm(name, "/start"), None::<&()>),
        VmCommand::Stop { name, now, only_standby, .. } => {
            let how = json!({ "now": now, "only_standby": only_standby });
            job(api, &of_vm(name, "/stop"), Some(&how))
        }
        VmCommand::HandOver(One { name, .. }) => job(api, &of_vm(name, "/hand-over"), None::<&()>),
        VmCommand::Logs { name, lines, follow, .. } => logs(name, *lines, *follow, api),
    }
}

fn list(api: &Asked<'_>) -> Outcome {
    let all: Vms = client(api)?.get("/v1/vms")?;
    print(api.json, &all, |all| {
        let rows: Vec<_> = all.vms.iter().map(row).collect();
        table(["NAME", "STATE", "PROTECTED", "PID", "WHY"], &rows, width())
    })
}

fn row(vm: &View) -> [String; 5] {
    let pid = vm.pid.map_or_else(String::new, |pid| pid.to_string());
    let protected = if vm.protected { "yes" } else { "no" };
    let warning = || vm.warnings.first().map(|it| format!("warning: {it}"));
    let why = vm.definition_error.clone().or_else(|| vm.why.clone()).or_else(warning).unwrap_or_default();
    let why =
        if why.chars().count() > WHY { why.chars().take(WHY - 1).collect::<String>() + "…" } else { why };
    [vm.name.clone(), vm.state.name().into(), protected.into(), pid, why]
}

fn show(vm: &View) -> String {
    let protected = if vm.protected { "protected" } else { "UNPROTECTED" };
    let mut text = format!("{}: {}, {protected}, since {}\n", vm.name, vm.state.name(), vm.since);
    let mut line = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            text += &format!("  {name:<12} {}\n", shown_in_line(&value));
        }
    };
    let adopted = if vm.adopted { " (started by an earlier node)" } else { "" };
    line("why", vm.why.clone());
    line("process", vm.pid.map(|pid| format!("{pid}{adopted}")));
    line("desired", Some(format!("{:?}", vm.desired).to_lowercase()));
    line("failures", (vm.failures > 0).then(|| vm.failures.to_string()));
    line("last end", vm.last_end.as_ref().map(|end| format!("{} ({})", end.what, end.at)));
    line("definition", vm.definition_error.clone());
    vm.warnings.iter().for_each(|it| line("warning", Some(it.clone())));
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

/// A VM, and whether its definition is another one now.
#[derive(Deserialize, Serialize)]
struct Defined {
    #[serde(flatten)]
    vm: View,
    changed: bool,
}

fn define(name: &str, file: &Path, api: &Asked<'_>) -> Outcome {
    let shown = if file == Path::new("-") { "standard input".into() } else { file.display().to_string() };
    let text = read(file).map_err(|error| Said::Read(shown.clone(), error))?;
    let answer = client(api)?.send("PUT", &of_vm(name, ""), Some(("application/toml", text)));
    let defined: Defined = answer.map_err(|why| match why {
        // The node has the text and not its file.
        ClientError::Refused(error) if error.code == BAD_DEFINITION => Said::Definition(shown.clone(), error),
        why => why.into(),
    })?;
    if !api.json {
        defined.vm.warnings.iter().for_each(|why| warn(&format!("outlive: warning: {shown}: {why}")));
    }
    print(api.json, &defined, |Defined { vm, changed }| {
        let is = if *changed { "is defined" } else { "is defined so already: nothing was changed" };
        let then = match vm.has_process {
            true if !changed => String::new(),
            true => "; its process keeps what it was started with until its next start".to_owned(),
            false => format!("; `outlive vm start {name}` starts it"),
        };
        format!("VM {name} {is}{then}\n")
    })
}

/// How often a log is asked for what is new.
const LOOKS: Duration = Duration::from_millis(500);

#[derive(Deserialize, Serialize)]
struct Log {
    log: String,
    next: u64,
}

fn logs(name: &str, lines: Option<usize>, follow: bool, api: &Asked<'_>) -> Outcome {
    let client = client(api)?;
    let mut log: Log = client.get(&of_vm(name, "/log"))?;
    if let Some(lines) = lines {
        log.log = last_lines(&log.log, lines).to_owned();
    }
    loop {
        if !log.log.is_empty() || !follow {
            print(api.json, &log, |it| it.log.clone())?;
        }
        if !follow {
            return Ok(());
        }
        std::thread::sleep(LOOKS);
        log = client.get(&of_vm(name, &format!("/log?after={}", log.next)))?;
    }
}

/// The last lines of a text.
fn last_lines(text: &str, count: usize) -> &str {
    let body = text.strip_suffix('\n').unwrap_or(text);
    match count.checked_sub(1) {
        None => "",
        Some(breaks) => body.rmatch_indices('\n').nth(breaks).map_or(text, |(at, _)| &text[at + 1..]),
    }
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
    fn a_list_has_the_beginning_of_a_reason_and_a_show_all_of_it() {
        let vm = json!({
            "name": "web", "state": "failed", "desired": "running", "protected": false, "has_standby": false,
            "why": "x".repeat(100), "since": "", "pid": null, "adopted": false, "failures": 1, "last_end": null,
            "definition_changed": false, "definition_error": null, "status": null
        });
        let vm: View = serde_json::from_value(vm).unwrap();
        let [.., why] = row(&vm);
        assert!(why.chars().count() == WHY && why.ends_with('…'), "{why}");
        assert!(show(&vm).contains(&"x".repeat(100)));
        let vm = View { why: Some("so\n  loss here    none\x1b[A".into()), ..vm };
        assert!(show(&vm).contains("so   loss here    none?[A\n"), "{}", show(&vm));
    }

    #[test]
    fn the_last_lines_are_whole() {
        for (text, count, last) in
            [("a\nb\nc\n", 2, "b\nc\n"), ("a\nb", 1, "b"), ("a\n", 9, "a\n"), ("a\n", 0, "")]
        {
            assert_eq!(last_lines(text, count), last, "{text:?}");
        }
    }
}
