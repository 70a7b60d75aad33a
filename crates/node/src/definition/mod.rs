//! A VM's definition: `NAME.toml`, whose keys are the long options of `outlive run`.
//!
//! ```toml
//! autostart = true
//! memory = "2G"
//! vcpus = 2
//! boot = "disk"
//! disk = ["path=/var/lib/outlive/web/web.img"]
//! arbiter = "outlive:third:7010"
//! listen = "0.0.0.0:7000"
//!
//! [host.hosta]
//! standby = ["hostb:7000"]
//!
//! [host.hostb]
//! standby = ["hosta:7000"]
//! ```

mod claims;
mod error;
mod folder;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

pub use claims::{Claim, Conflict, conflict};
pub use error::{DefinitionError, Fault};
pub(crate) use folder::Seen;
pub use folder::{ENDING, Folder, LONGEST, Read};

use crate::program::{Kind, Program, Remark};

/// Keys that are the node's, and no option of `outlive run`.
pub const AUTOSTART: &str = "autostart";
/// See [`Definition::restart_limit`].
pub const RESTART_LIMIT: &str = "restart-limit";
/// The table of tables with what is different on one host.
const HOST: &str = "host";
/// How often a process may fail in a row.
const USUAL_LIMIT: u32 = 30;

/// One VM, as it is on this host.
#[derive(Clone, Debug, PartialEq)]
pub struct Definition {
    /// Its name, which is its file's.
    pub name: String,
    /// Its file.
    pub file: PathBuf,
    /// Whether it starts by itself where nobody has started or stopped it before.
    pub autostart: bool,
    /// How often in a row its process may fail before it is left alone; 0: as often as it likes.
    pub restart_limit: u32,
    /// The options, with those of this host.
    options: BTreeMap<String, Value>,
}

impl Definition {
    /// Reads a definition for the host of this name.
    ///
    /// # Errors
    /// See [`DefinitionError`].
    pub fn parse(file: &Path, text: &str, host: &str, program: &Program) -> Result<Self, DefinitionError> {
        let wrong = |key: &str, fault: Fault| DefinitionError::new(file, key, fault);
        let name = file.file_stem().and_then(|it| it.to_str()).unwrap_or_default();
        if !is_name(name) {
            return Err(wrong("", Fault::Name(name.to_owned())));
        }
        let mut table: Table = text.parse().map_err(|error: toml::de::Error| {
            let line =
                error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            wrong("", Fault::Syntax { line, what: error.message().trim().replace('\n', " ") })
        })?;
        for (key, value) in of_host(&mut table, host).map_err(|(key, fault)| wrong(&key, fault))? {
            table.insert(key, value);
        }
        let autostart = match table.remove(AUTOSTART) {
            None => false,
            Some(Value::Boolean(it)) => it,
            Some(it) => {
                return Err(wrong(AUTOSTART, Fault::Type { is: plainly(&it), wanted: "true or false" }));
            }
        };
        let restart_limit = match table.remove(RESTART_LIMIT) {
            None => USUAL_LIMIT,
            Some(Value::Integer(it)) if (0..=1_000_000).contains(&it) => it as u32,
            Some(it) => {
                let wanted = "a number from 0 (no limit) to 1000000";
                return Err(wrong(RESTART_LIMIT, Fault::Type { is: plainly(&it), wanted }));
            }
        };
        for (key, value) in &table {
            check(key, value, program).map_err(|fault| wrong(key, fault))?;
        }
        if table.is_empty() {
            return Err(wrong("", Fault::Empty));
        }
        let options = table.into_iter().collect();
        let of_vm = Self { name: name.to_owned(), file: file.to_owned(), autostart, restart_limit, options };
        of_vm.check_whole(program).map_err(|(key, fault)| wrong(&key, fault))?;
        Ok(of_vm)
    }

    /// Whether two hosts have this VM: then both decide with the arbiter which of them starts it.
    pub fn is_of_two_hosts(&self) -> bool {
        self.options.contains_key("standby") || self.options.contains_key("listen")
    }

    /// The options as arguments of `outlive run`.
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = vec![format!("--name={}", self.name)];
        if self.is_of_two_hosts() {
            arguments.push("--or-standby".into());
        }
        for (key, value) in &self.options {
            match value {
                Value::Boolean(true) => arguments.push(format!("--{key}")),
                Value::Boolean(false) => {}
                value => arguments.extend(texts(value).map(|text| format!("--{key}={text}"))),
            }
        }
        arguments
    }

    /// The values of an option.
    pub fn values(&self, key: &str) -> impl Iterator<Item = String> {
        self.options.get(key).into_iter().flat_map(texts)
    }

    /// Each value by itself, so that the key with a wrong one is known; then all of them together.
    fn check_whole(&self, program: &Program) -> Result<(), (String, Fault)> {
        for (key, value) in &self.options {
            for text in texts(value).filter(|_| !value.is_bool()) {
                let alone = program.check(&[format!("--{key}={text}")]);
                // What else this option needs is looked at below.
                alone
                    .or_else(|why| if is_about_others(&why) { Ok(()) } else { Err(why) })
                    .map_err(|why| (key.clone(), Fault::Value(why)))?;
            }
        }
        let missing = OF_PAIR.iter().find(|(key, _)| !self.options.contains_key(*key));
        if let Some((key, why)) = missing.filter(|_| self.is_of_two_hosts()) {
            return Err(((*key).to_owned(), Fault::Needed(why)));
        }
        let arguments = self.arguments();
        program.check(&arguments).map_err(|why| (String::new(), Fault::Together(why)))?;
        match program.judge(&arguments).wrong {
            Some(Remark { key: "", text }) => Err((String::new(), Fault::Together(text))),
            Some(Remark { key, text }) => Err((key.to_owned(), Fault::Value(text))),
            None => Ok(()),
        }
    }

    /// What this host lacks for it at the moment.
    pub fn warnings(&self, program: &Program) -> Vec<Remark> {
        program.judge(&self.arguments()).warnings
    }
}

/// What a VM of two hosts needs, and why.
const OF_PAIR: [(&str, &str); 4] = [
    ("disk", "the images say which is the newest"),
    ("arbiter", "it says which host has the VM (docs/arbitration.md)"),
    ("listen", "it is where this host waits as the standby, like \"0.0.0.0:7000\""),
    ("standby", "it names the other host, like [\"hostb:7000\"]"),
];

/// What clap says of options that are missing, or that do not go with this one.
fn is_about_others(why: &str) -> bool {
    why.starts_with("the following required arguments") || why.contains("cannot be used with")
}

/// Whether this can be a VM's name: it is also a part of files' names.
pub fn is_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (1..=48).contains(&name.len())
        && name.chars().all(good)
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
}

/// Takes the tables of hosts out. Returns this host's.
fn of_host(table: &mut Table, host: &str) -> Result<Table, (String, Fault)> {
    let Some(hosts) = table.remove(HOST) else { return Ok(Table::new()) };
    let Value::Table(mut hosts) = hosts else {
        return Err((HOST.into(), Fault::Type { is: plainly(&hosts), wanted: "tables like [host.hosta]" }));
    };
    if let Some((name, value)) = hosts.iter().find(|(_, value)| !value.is_table()) {
        let fault = Fault::Type { is: plainly(value), wanted: "a table: [host.NAME]" };
        return Err((format!("{HOST}.{name}"), fault));
    }
    match hosts.remove(host) {
        Some(Value::Table(own)) => Ok(own),
        _ => {
            let hosts = hosts.keys().cloned().collect::<Vec<_>>().join(", ");
            Err((HOST.into(), Fault::NotHere { host: host.to_owned(), hosts }))
        }
    }
}

/// Options that the node decides about, and what to do instead.
const OF_NODE: [(&str, &str); 3] = [
    ("name", "the VM's name is its file's: rename the file"),
    ("or-standby", "the node decides it by itself, from listen and standby: leave the key out"),
    ("status", "the node has a place for it: leave the key out"),
];

fn check(key: &str, value: &Value, program: &Program) -> Result<(), Fault> {
    if let Some((_, remedy)) = OF_NODE.iter().find(|(it, _)| *it == key) {
        return Err(Fault::NotHereBut(remedy));
    }
    if key.starts_with("accept-") {
        return Err(Fault::NotHereBut(
            "a danger is accepted for one start and not for ever: stop the VM and run its command once by hand \
             (docs/node.md)",
        ));
    }
    let Some(kind) = program.kind(key) else { return Err(Fault::Unknown(program.similar(key))) };
    let is_single = |it: &Value| matches!(it, Value::String(_) | Value::Integer(_) | Value::Float(_));
    let wanted = match kind {
        Kind::Flag if value.is_bool() => return Ok(()),
        Kind::Value if is_single(value) => return is_usable(key, value),
        Kind::List => match value {
            Value::Array(all) if !all.is_empty() && all.iter().all(is_single) => {
                return all.iter().try_for_each(|it| is_usable(key, it));
            }
            _ => "a list that is not empty, like [\"...\"]",
        },
        Kind::Flag => "true or false",
        Kind::Value => "text, like \"...\", or a number",
    };
    Err(Fault::Type { is: plainly(value), wanted })
}

/// Keys whose values are files or directories.
const PATHS: [&str; 6] = ["kernel", "initrd", "keys", "events", "console", "record"];

/// What is good for a command at a terminal, and not for a service.
fn is_usable(key: &str, value: &Value) -> Result<(), Fault> {
    let text = text(value);
    if key == "console" && text == "stdio" || key == "events" && text == "-" {
        return Err(Fault::NotHereBut("there is no terminal: give a path"));
    }
    let path = match key {
        "disk" => text.split(',').find_map(|it| it.strip_prefix("path=")),
        key if PATHS.contains(&key) => Some(&*text),
        _ => None,
    };
    match path {
        Some(path) if !path.starts_with('/') => Err(Fault::Relative(path.to_owned())),
        _ => Ok(()),
    }
}

/// What somebody has written who does not know TOML.
fn plainly(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "text",
        Value::Integer(_) | Value::Float(_) => "a number",
        Value::Boolean(_) => "true or false",
        Value::Datetime(_) => "a date",
        Value::Array(all) if all.is_empty() => "an empty list",
        Value::Array(_) => "a list",
        Value::Table(_) => "a table",
    }
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// The values of a list, or the only one.
fn texts(value: &Value) -> impl Iterator<Item = String> + use<> {
    let all = match value {
        Value::Array(all) => all.iter().map(text).collect(),
        one => vec![text(one)],
    };
    all.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn parse(text: &str) -> Result<Definition, String> {
        let file = Path::new("/etc/outlive/vms/web.toml");
        Definition::parse(file, text, "hosta", &testing::program()).map_err(|it| it.to_string())
    }

    #[test]
    fn keys_become_options_and_a_host_has_its_own() {
        let text = "memory = '2G'\nvcpus = 2\ninsecure = true\nlock-memory = false\ndisk = ['path=/a', 'path=/b']\n\
                    arbiter = 'file:/x'\nlisten = ':7000'\n[host.hosta]\nstandby = ['b:7000']\nvcpus = 3\n\
                    [host.hostb]\nstandby = ['a:7000']";
        let web = parse(text).unwrap();
        assert_eq!(
            web.arguments(),
            [
                "--name=web",
                "--or-standby",
                "--arbiter=file:/x",
                "--disk=path=/a",
                "--disk=path=/b",
                "--insecure",
                "--listen=:7000",
                "--memory=2G",
                "--standby=b:7000",
                "--vcpus=3"
            ]
        );
        assert!(!web.autostart && web.restart_limit == 30);
        let alone = parse("autostart = true\nrestart-limit = 0\nvcpus = 1").unwrap();
        assert_eq!((alone.autostart, alone.restart_limit), (true, 0));
        assert_eq!(alone.arguments(), ["--name=web", "--vcpus=1"], "a VM of one host asks nobody");
    }

    /// One line each, with the file, the key and what helps.
    #[test]
    fn each_mistake_is_one_clear_line() {
        for (text, key, says) in [
            ("memry = '1G'", "memry", "memory"),
            ("colour = 'red'", "colour", "outlive run --help"),
            ("exit-with-stdin = true", "exit-with-stdin", "unknown"),
            ("memory = ['1G']", "", ": memory is a list: give text"),
            ("disk = 'path=/a'", "", ": disk is text: give a list"),
            ("disk = []", "", "a list"),
            ("insecure = 'yes'", "", "true or false"),
            ("vcpus = true", "", "a number"),
            ("memory = 256", "memory", "256 bytes are too little: give more"),
            ("vcpus = 'many'", "vcpus", "'many'"),
            ("autostart = 1", "", "true or false"),
            ("restart-limit = -1", "", "from 0"),
            ("name = 'x'", "name", "rename the file"),
            ("or-standby = true", "or-standby", "leave the key out"),
            ("status = '/x'", "status", "leave the key out"),
            ("accept-replica = true", "accept-replica", "by hand"),
            ("console = 'stdio'", "console", "no terminal"),
            ("kernel = 'vmlinuz'", "kernel", "absolute path"),
            ("disk = ['path=a,readonly']", "disk", "absolute path"),
            ("standby = ['b:1']", "disk", "a VM that either host may start needs one: the images"),
            ("listen = ':1'\ndisk = ['path=/a']", "arbiter", "either host"),
            ("standby = ['b:1']\ndisk = ['path=/a']\narbiter = 'file:/x'", "listen", "either host"),
            ("listen = ':1'\ndisk = ['path=/a']\narbiter = 'file:/x'", "standby", "either host"),
            ("", "", "says nothing of a VM"),
            ("autostart = true", "", "says nothing of a VM"),
            ("[host.hostb]\nvcpus = 1", "host", "hostb"),
            ("host = 1", "", "[host.hosta]"),
            ("memory = ", "", "line 1"),
            ("a = 1\nb = = 2", "", "line 2"),
        ] {
            let line = parse(text).expect_err(text);
            assert!(
                line.starts_with("/etc/outlive/vms/web.toml: ") && !line.contains('\n'),
                "{text}: {line}"
            );
            assert!(line.contains(says), "{text}: {line}");
            assert!(key.is_empty() || line.contains(&format!(": {key}: ")), "{text}: {line}");
        }
    }

    #[test]
    fn names_are_good_for_files() {
        for bad in ["", ".x", "a b", "a/b", "ä", "-x", &"x".repeat(49)] {
            assert!(!is_name(bad), "{bad}");
        }
        assert!(is_name("web-1.example"));
    }
}
