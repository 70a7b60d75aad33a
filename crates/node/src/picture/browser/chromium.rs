//! A real browser without a window, driven over two pipes (its DevTools protocol).

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine;
use serde_json::{Value, json};

/// How long anything may take; far longer than on a host that is not overloaded.
const PATIENCE: Duration = Duration::from_secs(180);

pub(super) struct Chromium {
    child: Child,
    to: Option<ChildStdin>,
    from: Receiver<Value>,
    number: u64,
    session: Option<String>,
    /// Errors of the page that no test expects.
    pub(super) complaints: Vec<String>,
    _profile: tempfile::TempDir,
}

/// The program itself: the script of Debian's package knows only where it is installed, and not where it is unpacked.
fn program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let script = std::env::split_paths(&path).map(|it| it.join("chromium")).find(|it| it.is_file())?;
    let beside = script.parent()?.parent()?.join("lib/chromium/chromium");
    Some(if beside.is_file() { beside } else { script })
}

impl Chromium {
    /// Starts it with an empty page; `None` where there is none, which is said.
    pub(super) fn start() -> Option<Self> {
        let Some(program) = program() else {
            println!("skipped: no chromium (apt-get install chromium)");
            return None;
        };
        let profile = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        // It hears at 3 and says at 4.
        command.args(["-c", "exec \"$0\" \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1"]).arg(program).args([
            "--headless=new",
            "--remote-debugging-pipe",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--hide-scrollbars",
            "--force-device-scale-factor=1",
        ]);
        if nix::unistd::geteuid().is_root() {
            // It starts as root only so. It sees no page but ours.
            command.arg("--no-sandbox");
        }
        command.arg(format!("--user-data-dir={}", profile.path().display()));
        command.env("HOME", profile.path()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (to, out) = (child.stdin.take(), child.stdout.take().unwrap());
        let (tell, from) = channel();
        thread::spawn(move || {
            let mut out = BufReader::new(out);
            let mut message = Vec::new();
            while out.read_until(0, &mut message).is_ok_and(|count| count > 0) {
                message.pop();
                let Ok(it) = serde_json::from_slice(&message) else { return };
                if tell.send(it).is_err() {
                    return;
                }
                message.clear();
            }
        });
        let mut it =
            Self { child, to, from, number: 0, session: None, complaints: Vec::new(), _profile: profile };
        let target = it.call("Target.createTarget", json!({ "url": "about:blank" }))["targetId"].clone();
        let attached = it.call("Target.attachToTarget", json!({ "targetId": target, "flatten": true }));
        it.session = Some(attached["sessionId"].as_str().unwrap().to_owned());
        for domain in ["Page", "Runtime", "Log", "Accessibility"] {
            it.call(&format!("{domain}.enable"), json!({}));
        }
        Some(it)
    }

    /// Tells it something, and returns its answer.
    pub(super) fn call(&mut self, method: &str, params: Value) -> Value {
        self.number += 1;
        let mut message = json!({ "id": self.number, "method": method, "params": params });
        if let Some(session) = &self.session {
            message["sessionId"] = session.as_str().into();
        }
        let mut text = message.to_string().into_bytes();
        text.push(0);
        self.to.as_mut().unwrap().write_all(&text).unwrap();
        loop {
            let said = self.from.recv_timeout(PATIENCE).unwrap_or_else(|why| panic!("{method}: {why}"));
            if said["id"] == self.number {
                assert!(said["error"].is_null(), "{method}: {}", said["error"]);
                return said["result"].clone();
            }
            self.hear(&said);
        }
    }

    fn hear(&mut self, said: &Value) {
        let params = &said["params"];
        match said["method"].as_str() {
            Some("Runtime.exceptionThrown") => self.complaints.push(params["exceptionDetails"].to_string()),
            // That the node is away is no error of the page.
            Some("Log.entryAdded")
                if params["entry"]["level"] == "error" && params["entry"]["source"] != "network" =>
            {
                self.complaints.push(params["entry"].to_string());
            }
            _ => {}
        }
    }

    pub(super) fn open(&mut self, link: &str) {
        self.call("Page.navigate", json!({ "url": link }));
    }

    /// The value of an expression in the page.
    pub(super) fn value(&mut self, expression: &str) -> Value {
        let params = json!({ "expression": expression, "awaitPromise": true, "returnByValue": true });
        let said = self.call("Runtime.evaluate", params);
        assert!(said["exceptionDetails"].is_null(), "{expression}: {}", said["exceptionDetails"]);
        said["result"]["value"].clone()
    }

    /// Waits until an expression is true. One that cannot be evaluated yet is not.
    pub(super) fn until(&mut self, expression: &str) {
        let began = Instant::now();
        let guarded = format!("(() => {{ try {{ return !!({expression}) }} catch {{ return false }} }})()");
        while self.value(&guarded) != true {
            let text = || "document.body.innerText";
            if began.elapsed() > PATIENCE {
                panic!("{expression} has not come: {}; {:?}", self.value(text()), self.complaints);
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Presses a key, as a person does.
    pub(super) fn press(&mut self, key: &str, code: u32) {
        let text = if key == "Enter" { "\r" } else { "" };
        for kind in ["keyDown", "keyUp"] {
            let params = json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code,
                "text": if kind == "keyDown" { text } else { "" } });
            self.call("Input.dispatchKeyEvent", params);
        }
    }

    /// A window of this width, in light or dark.
    pub(super) fn look(&mut self, width: u32, height: u32, scheme: &str) {
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.call("Emulation.setDeviceMetricsOverride", size);
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.call("Emulation.setEmulatedMedia", json!({ "features": features }));
    }

    /// Waits until a screen reader has something with this role, and a name that begins so.
    pub(super) fn until_role(&mut self, role: &str, name: &str) {
        let began = Instant::now();
        loop {
            let tree = self.call("Accessibility.getFullAXTree", json!({}));
            let text = |node: &Value, key: &str| node[key]["value"].as_str().unwrap_or_default().to_owned();
            let nodes = tree["nodes"].as_array().unwrap().iter().filter(|it| it["ignored"] != true);
            let roles: Vec<_> = nodes.map(|it| (text(it, "role"), text(it, "name"))).collect();
            if roles.iter().any(|it| it.0 == role && it.1.starts_with(name)) {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "{role} {name}: {roles:?}");
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Writes a picture of the whole page.
    pub(super) fn shot(&mut self, file: &Path) {
        let shot =
            self.call("Page.captureScreenshot", json!({ "format": "png", "captureBeyondViewport": true }));
        let png = base64::engine::general_purpose::STANDARD.decode(shot["data"].as_str().unwrap()).unwrap();
        fs::write(file, png).unwrap();
    }
}

impl Drop for Chromium {
    fn drop(&mut self) {
        // It ends when nobody can tell it anything any more.
        drop(self.to.take());
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(10) {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
