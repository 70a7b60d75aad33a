//! A real Prometheus on a third machine, which scrapes two hosts and has the shipped rules: Debian's `prometheus`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use super::{PROGRAM, Process, Side, World, wait_until};

/// Where it listens, in the clients' network.
const ADDRESS: &str = "127.0.0.1:9090";
/// Alerts fire a second after their condition holds, whatever they wait for elsewhere.
const FOR: &str = "1s";

/// A child that goes with this. `outlive metrics` also ends when its standard input, which the child has, is closed: so it
/// does not outlive a test that was killed.
struct Server(Child);

impl Server {
    fn start(world: &World, mut command: Command, name: &str) -> Self {
        let log = File::create(world.dir().join(format!("{name}.log"))).unwrap();
        command.stdin(Stdio::piped()).stdout(log.try_clone().unwrap()).stderr(log);
        Self(world.spawn_third(&mut command))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Prometheus, and a process for each host that it scrapes.
pub(crate) struct Prometheus<'a> {
    world: &'a World,
    _server: Server,
    exporters: [Option<Server>; 2],
}

/// The rules that are shipped, with short waits.
fn rules() -> String {
    let rules = fs::read_to_string(monitoring().join("outlive.rules.yml")).unwrap();
    let short = |line: &str| match line.split_once("for: ") {
        Some((before, _)) if before.trim().is_empty() => format!("{before}for: {FOR}\n"),
        _ => format!("{line}\n"),
    };
    rules.lines().map(short).collect()
}

/// The folder of what is shipped for Prometheus.
pub(crate) fn monitoring() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../monitoring")
}

fn port(side: Side) -> u16 {
    match side {
        Side::A => 9753,
        Side::B => 9754,
    }
}

/// How a host is called.
pub(crate) fn instance(side: Side) -> &'static str {
    match side {
        Side::A => "host-a",
        Side::B => "host-b",
    }
}

impl<'a> Prometheus<'a> {
    /// Watches processes with these status sockets, by the hosts that they are on. `None`, after saying why, where there is
    /// no Prometheus.
    pub(crate) fn watch(world: &'a World, sockets: &[(Side, &Path)]) -> Option<Self> {
        if !Command::new("prometheus").arg("--version").output().is_ok_and(|out| out.status.success()) {
            println!("skipped: no prometheus (apt-get install prometheus)");
            return None;
        }
        let exporters = Side::BOTH.map(|side| {
            let of_side: Vec<_> =
                sockets.iter().filter(|(at, _)| *at == side).map(|(_, path)| *path).collect();
            (!of_side.is_empty()).then(|| export(world, side, &of_side))
        });
        let dir = world.dir().join("prometheus");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("rules.yml"), rules()).unwrap();
        let targets =
            Side::BOTH.into_iter().zip(&exporters).filter(|(_, it)| it.is_some()).map(|(side, _)| {
                format!(
                    "      - targets: ['127.0.0.1:{}']\n        labels: {{ instance: '{}' }}\n",
                    port(side),
                    instance(side)
                )
            });
        let config = format!(
            "global:\n  scrape_interval: 2s\n  scrape_timeout: 2s\n  evaluation_interval: 500ms\nrule_files: ['rules.yml']\n\
             scrape_configs:\n  - job_name: outlive\n    static_configs:\n{}",
            targets.collect::<String>()
        );
        fs::write(dir.join("prometheus.yml"), config).unwrap();
        let mut command = Command::new("prometheus");
        command.arg(format!("--config.file={}", dir.join("prometheus.yml").display()));
        command.arg(format!("--storage.tsdb.path={}", dir.join("data").display()));
        command.arg(format!("--web.listen-address={ADDRESS}"));
        let server = Server::start(world, command, "prometheus");
        let prometheus = Self { world, _server: server, exporters };
        wait_until("Prometheus answers", || prometheus.get("/api/v1/alerts").is_some());
        Some(prometheus)
    }

    fn get(&self, path: &str) -> Option<Value> {
        let url = format!("http://{ADDRESS}{path}");
        self.world.lan(|| {
            let text = ureq::get(&url).call().ok()?.body_mut().read_to_string().ok()?;
            serde_json::from_str::<Value>(&text).ok()
        })
    }

    /// What a query says: the labels and the value of each series.
    pub(crate) fn query(&self, query: &str) -> Vec<(Value, f64)> {
        let escaped: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let Some(answer) = self.get(&format!("/api/v1/query?query={escaped}")) else { return Vec::new() };
        let result = answer["data"]["result"].as_array().unwrap_or_else(|| panic!("{query}: {answer}"));
        let series = result.iter();
        series.map(|it| (it["metric"].clone(), it["value"][1].as_str().unwrap().parse().unwrap())).collect()
    }

    /// What a query says that has one answer.
    pub(crate) fn number(&self, query: &str) -> Option<f64> {
        match &self.query(query)[..] {
            [(_, value)] => Some(*value),
            _ => None,
        }
    }

    /// The labels of alerts that fire.
    pub(crate) fn firing(&self) -> Vec<Value> {
        let answer = self.get("/api/v1/alerts").unwrap();
        let all = answer["data"]["alerts"].as_array().unwrap();
        all.iter().filter(|it| it["state"] == "firing").map(|it| it["labels"].clone()).collect()
    }

    /// Whether an alert fires, with these labels.
    pub(crate) fn fires(&self, name: &str, labels: &[(&str, &str)]) -> bool {
        let is = |alert: &Value| {
            alert["alertname"] == name && labels.iter().all(|(label, value)| alert[*label] == *value)
        };
        self.firing().iter().any(is)
    }

    /// Waits until an alert fires, with these labels.
    pub(crate) fn wait_fires(&self, name: &str, labels: &[(&str, &str)]) {
        wait_until(&format!("{name} {labels:?}, while {:?}", self.firing()), || self.fires(name, labels));
    }

    /// Waits until it does not fire any more.
    pub(crate) fn wait_quiet(&self, name: &str) {
        wait_until(&format!("an end of {name}"), || !self.fires(name, &[]));
    }

    /// Waits until Prometheus has seen each host some times more, and rules were evaluated meanwhile.
    pub(crate) fn sees_more(&self) {
        let seen = || self.number("min(count_over_time(up[1h]))").unwrap_or(0.0);
        let before = seen();
        wait_until("more scrapes", || seen() >= before + 5.0);
    }

    /// `outlive metrics` of a host ends, or is there again.
    pub(crate) fn export(&mut self, side: Side, sockets: &[&Path]) {
        self.exporters[side as usize] = None;
        if !sockets.is_empty() {
            self.exporters[side as usize] = Some(export(self.world, side, sockets));
        }
    }
}

fn export(world: &World, side: Side, sockets: &[&Path]) -> Server {
    let mut command = Command::new(PROGRAM);
    command.args(["metrics", "--exit-with-stdin", "--listen", &format!("127.0.0.1:{}", port(side))]);
    for socket in sockets {
        command.arg("--socket").arg(socket);
    }
    let name = format!("metrics-{}", side.letter());
    let server = Server::start(world, command, &name);
    let log = world.dir().join(format!("{name}.log"));
    wait_until("metrics", || fs::read_to_string(&log).unwrap().contains("metrics are at http://"));
    server
}

/// Watches both processes of a pair.
pub(crate) fn watch_pair<'a>(world: &'a World, a: &Process, b: &Process) -> Option<Prometheus<'a>> {
    Prometheus::watch(world, &[(Side::A, a.socket()), (Side::B, b.socket())])
}
