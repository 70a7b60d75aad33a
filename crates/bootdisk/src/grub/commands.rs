//! GRUB's commands, as far as they decide what is booted.

use std::collections::BTreeMap;

use super::environment::{Environment, parse_block};
use super::menu::{self, Body, Item};
use super::syntax::{self, Command, Script};
use super::test_command::{Look, test};
use super::words::Word;
use crate::error::short;
use crate::volumes::{Place, Volumes};
use crate::{Entry, ReadError, bls};

/// Most commands that are carried out.
const STEPS: u32 = 100_000;
/// How deep functions, blocks and sourced files may be within each other.
const DEPTH: u32 = 32;
/// Most entries of all menus.
const ITEMS: usize = 2_000;
/// How deep menus may be within each other.
const MENUS: usize = 8;
/// Longest environment block; they have 1024 bytes.
const BLOCK: u64 = 64 << 10;
/// Files that are sourced, all together.
const SOURCED: u32 = 16;
/// Most notes for the log.
const NOTES: usize = 16;
/// What a command costs in bytes, whatever it is: what it keeps is small, but each is work.
const COMMAND: usize = 64;
/// What the lines of an environment block are made into, for each letter.
const LINES: usize = 64;

/// What GRUB says of itself and of the machine.
const FEATURES: [&str; 9] = [
    "feature_200_final",
    "feature_all_video_module",
    "feature_chainloader_bpb",
    "feature_default_font_path",
    "feature_menuentry_id",
    "feature_menuentry_options",
    "feature_nativedisk_cmd",
    "feature_ntldr",
    "feature_platform_search_hint",
];
const SILENT: [&str; 20] = [
    "true",
    ":",
    "echo",
    "insmod",
    "rmmod",
    "export",
    "save_env",
    "set_background",
    "background_image",
    "background_color",
    "terminal_input",
    "terminal_output",
    "serial",
    "play",
    "sleep",
    "clear",
    "boot",
    "loadfont",
    "keymap",
    "devicetree",
];

/// GRUB with a configuration.
pub(super) struct Grub<'a> {
    volumes: &'a Volumes,
    environment: Environment,
    functions: BTreeMap<String, Script>,
    items: Vec<Item>,
    entry: Entry,
    steps: u32,
    depth: u32,
    sourced: u32,
    all_items: usize,
    status: bool,
    /// What the log should say.
    pub(super) notes: Vec<String>,
}

impl Look for Grub<'_> {
    fn length(&self, path: &str) -> Result<Option<u64>, ReadError> {
        let Some(place) = self.place(path) else { return Ok(None) };
        self.volumes.files(place.volume).map_or(Ok(None), |files| files.length(&place.path))
    }

    fn is_directory(&self, path: &str) -> Result<bool, ReadError> {
        let Some(place) = self.place(path) else { return Ok(false) };
        self.volumes.files(place.volume).map_or(Ok(false), |files| files.is_directory(&place.path))
    }
}

impl<'a> Grub<'a> {
    /// GRUB as it begins with a configuration at this place.
    pub(super) fn new(volumes: &'a Volumes, volume: usize, path: &str) -> Self {
        let mut environment = Environment::default();
        let device = volumes.device(volume);
        let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory);
        environment.set("root", &device);
        environment.set("prefix", &format!("({device}){directory}"));
        environment.set("config_directory", &format!("({device}){directory}"));
        environment.set("config_file", &format!("({device}){path}"));
        environment.set("grub_cpu", "i386");
        environment.set("grub_platform", "pc");
        environment.set("feature_timeout_style", "y");
        FEATURES.iter().for_each(|feature| environment.set(feature, "y"));
        Self {
            volumes,
            environment,
            functions: BTreeMap::new(),
            items: Vec::new(),
            entry: Entry::default(),
            steps: 0,
            depth: 0,
            sourced: 0,
            all_items: 0,
            status: true,
            notes: Vec::new(),
        }
    }

    /// Carries a script out.
    pub(super) fn run(&mut self, script: &Script) -> Result<bool, ReadError> {
        self.run_with(script, &[])
    }

    /// What the default entry boots. `None` if the menu is empty and no kernel was loaded outside of it.
    pub(super) fn choose(&mut self) -> Result<Option<Entry>, ReadError> {
        let default = self.environment.get("default").to_owned();
        let mut way = default.as_str();
        for _ in 0..MENUS {
            let (step, rest) = menu::step(way);
            if !menu::has(&self.items, &step) {
                let step = short(&step);
                self.note(format!("no entry is named '{step}', as the default says; the first one is taken"));
            }
            let Some(item) = menu::find(&self.items, &step).cloned() else {
                return Ok(self.entry.kernel.is_some().then(|| std::mem::take(&mut self.entry)));
            };
            way = rest;
            self.environment.set("chosen", &item.title);
            match &item.body {
                Body::Submenu(script) => {
                    self.items.clear();
                    self.run_with(script, &item.arguments)?;
                }
                Body::Entry(script) => {
                    self.entry = Entry { title: item.title.clone(), ..Entry::default() };
                    self.run_with(script, &item.arguments)?;
                    return Ok(Some(std::mem::take(&mut self.entry)));
                }
                Body::Bls { volume, entry } => {
                    let expand = |text: &str| self.environment.expand_text(text, self.volumes.source());
                    return entry.entry(self.volumes, *volume, &expand).map(Some);
                }
            }
        }
        Ok(None)
    }

    fn run_with(&mut self, script: &Script, arguments: &[String]) -> Result<bool, ReadError> {
        self.depth += 1;
        let mut done = Ok(true);
        for command in script.iter() {
            // A script that goes on and on ends here, as if it had ended by itself.
            if self.depth > DEPTH || self.steps > STEPS {
                break;
            }
            self.steps += 1;
            done = self.volumes.source().think(COMMAND).and_then(|()| self.command(command, arguments));
            self.status = *done.as_ref().unwrap_or(&false);
            if done.is_err() {
                break;
            }
        }
        self.depth -= 1;
        done
    }

    fn command(&mut self, command: &Command, arguments: &[String]) -> Result<bool, ReadError> {
        match command {
            Command::Simple(words) => self.simple(words, arguments),
            Command::If { branches, otherwise } => {
                for (condition, body) in branches {
                    if self.run_with(condition, arguments)? {
                        return self.run_with(body, arguments);
                    }
                }
                self.run_with(otherwise, arguments)
            }
            Command::While { until, condition, body } => {
                while self.steps <= STEPS && self.run_with(condition, arguments)? != *until {
                    self.steps += 1;
                    self.run_with(body, arguments)?;
                }
                Ok(true)
            }
            Command::For { name, words, body } => {
                for value in self.expand(words, arguments)? {
                    self.volumes.source().think(COMMAND + name.len() + value.len())?;
                    self.environment.set(name, &value);
                    self.run_with(body, arguments)?;
                }
                Ok(true)
            }
            Command::Function { name, body } => {
                if self.functions.len() < ITEMS {
                    self.volumes.source().think(COMMAND + 2 * name.len())?;
                    self.functions.insert(name.clone(), body.clone());
                }
                Ok(true)
            }
            Command::Entry { submenu, words, body } => {
                let words = self.expand(words, arguments)?;
                let body = if *submenu { Body::Submenu(body.clone()) } else { Body::Entry(body.clone()) };
                self.add(Item::new(words, body));
                Ok(true)
            }
        }
    }

    fn expand(&self, words: &[Word], arguments: &[String]) -> Result<Vec<String>, ReadError> {
        self.environment.expand(words, arguments, self.volumes.source())
    }

    fn note(&mut self, note: String) {
        if self.notes.len() < NOTES {
            self.notes.push(note);
        }
    }

    fn add(&mut self, item: Item) {
        self.all_items += 1;
        if self.all_items <= ITEMS {
            self.items.push(item);
        }
    }

    fn simple(&mut self, words: &[Word], arguments: &[String]) -> Result<bool, ReadError> {
        let status = if self.status { "0" } else { "1" };
        self.environment.set("?", status);
        let words = self.expand(words, arguments)?;
        let Some((name, arguments)) = words.split_first() else { return Ok(true) };
        if let Some(function) = self.functions.get(name).cloned() {
            return self.run_with(&function, arguments);
        }
        match name.as_str() {
            "[" => {
                let end = arguments.len() - usize::from(arguments.last().is_some_and(|it| it == "]"));
                return test(&arguments[..end], self);
            }
            "test" => return test(arguments, self),
            "!" => return Ok(!self.invert(arguments)?),
            "set" => arguments.iter().for_each(|it| self.assign(it)),
            "unset" => arguments.iter().for_each(|it| self.environment.unset(it)),
            "load_env" => return self.load_env(arguments),
            "linux" | "linux16" | "linuxefi" => return self.linux(arguments),
            "initrd" | "initrd16" | "initrdefi" => {
                let places: Option<Vec<Place>> =
                    arguments.iter().filter(|it| !it.starts_with("--")).map(|it| self.place(it)).collect();
                self.entry.initrds = places.ok_or_else(|| self.no_device(arguments))?;
            }
            "blscfg" => return self.blscfg(),
            "source" | "." | "configfile" => return self.source(name, arguments),
            _ if name == "search" || name.starts_with("search.") => return self.search(name, arguments),
            _ if SILENT.contains(&name.as_str()) => {}
            _ if name.contains('=') && arguments.is_empty() => self.assign(name),
            // Unknown here, as in a GRUB without the module.
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn invert(&mut self, arguments: &[String]) -> Result<bool, ReadError> {
        match arguments.split_first() {
            Some((name, rest)) if name == "[" => test(&rest[..rest.len().saturating_sub(1)], self),
            Some((name, rest)) if name == "test" => test(rest, self),
            _ => Ok(false),
        }
    }

    fn assign(&mut self, text: &str) {
        if let Some((name, value)) = text.split_once('=') {
            self.environment.set(name, value);
        }
    }

    fn linux(&mut self, arguments: &[String]) -> Result<bool, ReadError> {
        let mut arguments = arguments.iter().skip_while(|it| it.starts_with("--"));
        let Some(path) = arguments.next() else { return Ok(false) };
        let place = self.place(path).ok_or_else(|| self.no_device(std::slice::from_ref(path)))?;
        self.entry.kernel = Some(place);
        self.entry.initrds.clear();
        let quoted = |word: &String| {
            if word.contains(char::is_whitespace) { format!("\"{word}\"") } else { word.clone() }
        };
        self.entry.command_line = arguments.map(quoted).collect::<Vec<_>>().join(" ");
        Ok(true)
    }

    fn no_device(&self, paths: &[String]) -> ReadError {
        let device = self.environment.get("root").to_owned();
        ReadError::NoDevice { entry: self.entry.title.clone(), what: paths.join(" "), device }
    }

    fn load_env(&mut self, arguments: &[String]) -> Result<bool, ReadError> {
        let mut path = format!("{}/grubenv", self.environment.get("prefix"));
        let mut names: Vec<&String> = Vec::new();
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "-f" | "--file" => path = arguments.next().cloned().unwrap_or_default(),
                "-s" | "--skip-sig" => {}
                _ => match argument.strip_prefix("--file=") {
                    Some(file) => path = file.to_owned(),
                    None => names.push(argument),
                },
            }
        }
        let Some(text) = self.contents(&path, BLOCK)? else { return Ok(false) };
        self.volumes.source().think(text.len().saturating_mul(LINES))?;
        for (name, value) in parse_block(&text) {
            if !names.is_empty() && !names.contains(&&name) {
                continue;
            }
            if name == "next_entry" {
                if !value.is_empty() {
                    let value = short(&value);
                    self.note(format!(
                        "the choice of '{value}' for one boot (grub-reboot) is not followed: it could not be taken back"
                    ));
                }
                continue;
            }
            self.environment.set(&name, &value);
        }
        Ok(true)
    }

    fn source(&mut self, command: &str, arguments: &[String]) -> Result<bool, ReadError> {
        let Some(path) = arguments.first() else { return Ok(false) };
        self.sourced += 1;
        if self.sourced > SOURCED {
            return Ok(false);
        }
        let Some(text) = self.contents(path, super::CONFIGURATION)? else { return Ok(false) };
        let script = syntax::parse(&text, self.volumes.source()).map_err(|fault| fault.of(path))?;
        if command == "configfile" {
            self.items.clear();
            if let Some(place) = self.place(path) {
                let device = self.volumes.device(place.volume);
                let directory = place.path.rsplit_once('/').map_or("", |(directory, _)| directory);
                self.environment.set("config_directory", &format!("({device}){directory}"));
            }
        }
        self.run(&script)
    }

    /// Entries of the Boot Loader Specification become entries of the menu.
    fn blscfg(&mut self) -> Result<bool, ReadError> {
        let root = self.volumes.of_device(self.environment.get("root"));
        let own = self.place(self.environment.get("config_file")).map(|place| place.volume);
        for volume in [root, own].into_iter().flatten() {
            let Some(files) = self.volumes.files(volume) else { continue };
            let entries = bls::entries(files)?;
            if entries.is_empty() {
                continue;
            }
            for entry in entries {
                let (title, id) = (entry.title.clone(), entry.id.clone());
                let body = Body::Bls { volume, entry: Box::new(entry) };
                self.add(Item { title, id, arguments: Vec::new(), body });
            }
            return Ok(true);
        }
        Ok(false)
    }

    /// `search --fs-uuid --set=root UUID`, and `search.fs_uuid UUID root`.
    fn search(&mut self, command: &str, arguments: &[String]) -> Result<bool, ReadError> {
        let (mut by, mut variable, mut wanted) = ("file", None, None);
        let old = command.strip_prefix("search.");
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let (option, value) = argument.split_once('=').unwrap_or((argument, ""));
            match option {
                "-u" | "--fs-uuid" => by = "uuid",
                "-l" | "--label" | "--fs-label" => by = "label",
                "-f" | "--file" => by = "file",
                "-s" | "--set" if !value.is_empty() => variable = Some(value.to_owned()),
                "-s" | "--set" => variable = Some("root".to_owned()),
                "--hint" if value.is_empty() => drop(arguments.next()),
                _ if option.starts_with("--") || option == "-n" => {}
                _ if wanted.is_none() => wanted = Some(argument.clone()),
                _ if old.is_some() && variable.is_none() => variable = Some(argument.clone()),
                _ => {}
            }
        }
        let Some(wanted) = wanted else { return Ok(false) };
        let by = match old {
            Some("fs_uuid") => "uuid",
            Some("fs_label") => "label",
            Some(_) => "file",
            None => by,
        };
        let found = match by {
            "uuid" => self.volumes.of_uuid(&wanted),
            "label" => self.volumes.of_label(&wanted),
            _ => self.volumes.with_file(&wanted)?,
        };
        let Some(volume) = found else { return Ok(false) };
        let device = self.volumes.device(volume);
        self.environment.set(variable.as_deref().unwrap_or("root"), &device);
        Ok(true)
    }

    /// Where a path of GRUB is: `(device)/path`, or a path on `$root`.
    fn place(&self, path: &str) -> Option<Place> {
        let (device, path) = match path.strip_prefix('(') {
            Some(rest) => rest.split_once(')')?,
            None => (self.environment.get("root"), path),
        };
        let device = if device.is_empty() { self.environment.get("root") } else { device };
        Some(Place { volume: self.volumes.of_device(device)?, path: path.to_owned() })
    }

    fn contents(&self, path: &str, limit: u64) -> Result<Option<String>, ReadError> {
        let Some(place) = self.place(path) else { return Ok(None) };
        let files = self.volumes.files(place.volume);
        let contents = files.map(|files| files.read(&place.path, limit)).transpose()?.flatten();
        Ok(contents.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }
}
