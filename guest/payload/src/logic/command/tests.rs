use super::super::resp::{Fed, Parser};
use super::super::work::{Control, Setting};
use super::*;

struct Bench {
    control: Control,
    woken: usize,
    disk: Option<Blocks>,
}

/// A disk of three blocks.
#[derive(Default)]
struct Blocks {
    blocks: [Vec<u8>; 3],
    broken: bool,
    synced: usize,
}

impl Disk for Blocks {
    fn blocks(&self) -> u64 {
        3
    }

    fn read(&mut self, block: u64) -> Option<&[u8]> {
        (!self.broken).then(|| &self.blocks[block as usize][..])
    }

    fn write(&mut self, block: u64, text: &[u8]) -> bool {
        self.blocks[block as usize] = [text, &vec![0; BLOCK - text.len()]].concat();
        !self.broken
    }

    fn sync(&mut self) -> bool {
        self.synced += 1;
        !self.broken
    }
}

impl Machine for Bench {
    fn facts(&self) -> Facts {
        Facts { vcpus: 3, memory_bytes: 1 << 28, ..Facts::default() }
    }

    fn disk(&mut self) -> Option<&mut dyn Disk> {
        self.disk.as_mut().map(|disk| disk as &mut dyn Disk)
    }

    fn control(&self) -> &Control {
        &self.control
    }

    fn workers(&self) -> usize {
        2
    }

    fn worker_pages(&self) -> u64 {
        500
    }

    fn wake_workers(&mut self) {
        self.woken += 1;
    }
}

struct Session {
    store: Store,
    machine: Bench,
    client: Client,
    totals: Totals,
}

impl Session {
    fn new(limit: usize) -> Self {
        Self {
            store: Store::new(limit, (1, 2)).unwrap(),
            machine: Bench { control: Control::new(), woken: 0, disk: None },
            client: Client::new(7),
            totals: Totals::default(),
        }
    }

    /// Runs one inline command.
    fn run(&mut self, line: &str) -> (String, Outcome) {
        let mut parser = Parser::default();
        let line = format!("{line}\n");
        assert_eq!(parser.feed(line.as_bytes()), Ok(Fed::Command(line.len())));
        let mut out = Reply::default();
        let outcome = execute(&mut Context {
            args: parser.args(),
            store: &mut self.store,
            machine: &mut self.machine,
            client: &mut self.client,
            totals: &mut self.totals,
            out: &mut out,
        });
        (String::from_utf8_lossy(out.pending()).replace("\r\n", "|"), outcome)
    }

    fn check(&mut self, transcript: &[(&str, &str)]) {
        for (line, reply) in transcript {
            assert_eq!(self.run(line), ((*reply).to_owned(), Outcome::Done), "{line}");
        }
    }
}

const NOT_A_NUMBER: &str = "-ERR value is not an integer or out of range|";
const OVERFLOW: &str = "-ERR increment or decrement would overflow|";

#[test]
fn strings() {
    Session::new(1 << 20).check(&[
        ("get a", "$-1|"),
        ("SET a 1", "+OK|"),
        ("gEt a", "$1|1|"),
        ("set a 2 nx", "$-1|"),
        ("set b 2 xx", "$-1|"),
        ("set b 2 nx", "+OK|"),
        ("set b 3 xx get", "$1|2|"),
        ("set c 3 nx get", "$-1|"),
        ("set c 4 nx get", "$1|3|"),
        ("set a 1 nx xx", "-ERR syntax error|"),
        ("set a 1 what", "-ERR syntax error|"),
        (
            "set a 1 ex 10",
            "-ERR this server does not expire keys: EX, PX, EXAT, PXAT and KEEPTTL are not supported|",
        ),
        ("mget a b nope c", "*4|$1|1|$1|3|$-1|$1|3|"),
        ("mset x 1 y 2 x 3", "+OK|"),
        ("mset x 1 y", "-ERR wrong number of arguments for 'mset' command|"),
        ("get x", "$1|3|"),
        ("dbsize", ":5|"),
        ("exists x x y nope", ":3|"),
        ("del x nope y x", ":2|"),
        ("append x Hello", ":5|"),
        ("append x \" World\"", ":11|"),
        ("get x", "$11|Hello World|"),
        ("strlen x", ":11|"),
        ("strlen nope", ":0|"),
        ("getset x v", "$11|Hello World|"),
        ("getdel x", "$1|v|"),
        ("setnx x 1", ":1|"),
        ("setnx x 2", ":0|"),
        ("type x", "+string|"),
        ("type nope", "+none|"),
        ("flushall", "+OK|"),
        ("dbsize", ":0|"),
    ]);
}

#[test]
fn counters() {
    Session::new(1 << 20).check(&[
        ("incr n", ":1|"),
        ("incrby n 98", ":99|"),
        ("incr n", ":100|"),
        ("decr n", ":99|"),
        ("decrby n 109", ":-10|"),
        ("get n", "$3|-10|"),
        ("set n 9223372036854775806", "+OK|"),
        ("incr n", ":9223372036854775807|"),
        ("incr n", OVERFLOW),
        ("get n", "$19|9223372036854775807|"),
        ("set n -9223372036854775808", "+OK|"),
        ("decr n", OVERFLOW),
        ("decrby n -9223372036854775808", "-ERR decrement would overflow|"),
        ("incrby n 1.5", NOT_A_NUMBER),
        ("incrby n 9223372036854775808", NOT_A_NUMBER),
        ("set s abc", "+OK|"),
        ("incr s", NOT_A_NUMBER),
        ("set s 010", "+OK|"),
        ("incr s", NOT_A_NUMBER),
        ("incr", "-ERR wrong number of arguments for 'incr' command|"),
    ]);
}

#[test]
fn a_full_store_says_oom_and_reads_on() {
    let oom = "-OOM command not allowed when used memory > 'maxmemory'.|";
    let mut session = Session::new(2000);
    let long = "x".repeat(1500);
    session.check(&[("set a 1", "+OK|"), ("set n 99", "+OK|")]);
    session.check(&[(&format!("set b {long}"), "+OK|"), (&format!("set c {long}"), oom)]);
    session.check(&[
        (&format!("append a {long}"), oom),
        (&format!("mset d 1 e {long}"), oom),
        ("get d", "$-1|"),
    ]);
    session.check(&[(&format!("set a {long} get"), oom), ("get a", "$1|1|"), ("set a 2", "+OK|")]);
    session.check(&[("incr n", ":100|"), ("del b", ":1|"), (&format!("set c {long}"), "+OK|")]);
}

#[test]
fn connection_commands() {
    let mut session = Session::new(1 << 20);
    session.check(&[
        ("ping", "+PONG|"),
        ("ping hi", "$2|hi|"),
        ("ping a b", "-ERR wrong number of arguments for 'ping' command|"),
        ("echo hi", "$2|hi|"),
        ("select 0", "+OK|"),
        ("select 1", "-ERR DB index is out of range|"),
        ("hello 3", "-NOPROTO unsupported protocol version|"),
        ("client id", ":7|"),
        ("client getname", "$-1|"),
        ("client setname \"a b\"", "-ERR Client names cannot contain spaces, newlines or special characters and are at most 64 bytes long.|"),
        ("client setname me", "+OK|"),
        ("client getname", "$2|me|"),
        ("client setinfo lib-name x", "+OK|"),
        ("client no-evict on", "+OK|"),
        ("client what", "-ERR unknown subcommand 'what'. Try CLIENT HELP.|"),
        ("command count", ":35|"),
        ("command docs", "*0|"),
        ("command info get nope", "*2|*6|$3|get|:2|*0|:1|:1|:1|*-1|"),
        ("config get max*s", "*0|"),
        ("config get maxc*", "*2|$10|maxclients|$1|0|"),
        ("config get save appendonly", "*4|$4|save|$0||$10|appendonly|$2|no|"),
        ("nope \"a\\nb\" c", "-ERR unknown command 'nope', with args beginning with: 'a?b' 'c' |"),
    ]);
    assert!(session.run("hello 2 setname you").0.starts_with("*14|$6|server|"));
    assert_eq!(session.client.name(), b"you");
    assert_eq!(session.run("quit"), ("+OK|".to_owned(), Outcome::Close));
    assert_eq!(session.run("client list").1, Outcome::ListClients);
    assert_eq!(session.run("shutdown nosave").1, Outcome::Shutdown);
    assert_eq!(session.run("debug sleep 1.25").1, Outcome::Sleep(1_250_000));
    assert_eq!(session.run("debug sleep .001").1, Outcome::Sleep(1_000));
    assert!(session.run("debug sleep x").0.starts_with("-ERR"));
    assert!(session.run("info keyspace").0.ends_with("# Keyspace||"));
    for section in ["Server", "Clients", "Memory", "Stats", "Machine", "Keyspace"] {
        assert!(session.run("info").0.contains(&format!("# {section}|")));
    }
}

#[test]
fn work() {
    let mut session = Session::new(1 << 20);
    session.check(&[
        ("work set 1001 50 100", "-ERR this VM has room for 1 to 1000 work pages|"),
        ("work set 0 50 100", "-ERR this VM has room for 1 to 1000 work pages|"),
        ("work set 10 101 100", "-ERR hot-percent is 0 to 100|"),
        ("work set 10 -1 100", NOT_A_NUMBER),
        ("work set 10 50 100", "+OK|"),
    ]);
    assert_eq!(session.machine.woken, 1);
    let (_, setting) = session.machine.control.setting().unwrap();
    assert_eq!(setting, Setting { pages: 10, hot_percent: 50, rate: 100 });
    let stat = session.run("work stat").0;
    assert!(stat.starts_with("*24|$5|vcpus|:3|$7|workers|:2|$5|pages|:10|$9|max_pages|:1000|"), "{stat}");
    assert!(stat.ends_with("$15|writes_per_vcpu|*3|:0|:0|:0|"), "{stat}");
    assert_eq!(session.run("work verify").1, Outcome::AwaitVerification(1));
    session.check(&[("work off", "+OK|"), ("work what", "-ERR try WORK SET <pages> <hot-percent> <writes-per-second>, WORK OFF, WORK STAT or WORK VERIFY|")]);
}

#[test]
fn disk() {
    let mut session = Session::new(1 << 20);
    session.check(&[("DISK SIZE", "-ERR this VM has no disk|")]);
    session.machine.disk = Some(Blocks::default());
    let range = "-ERR the disk has 3 blocks, 0 is the first|";
    let usage = "-ERR try DISK WRITE <block> <text>, DISK READ <block>, DISK SYNC or DISK SIZE|";
    session.check(&[
        ("DISK SIZE", ":3|"),
        ("disk read 2", "$-1|"),
        ("disk write 2 some-longer-text", "+OK|"),
        ("DISK WRITE 2 text", "+OK|"),
        ("DISK READ 2", "$4|text|"),
        ("DISK READ 0", "$-1|"),
        ("DISK SYNC", "+OK|"),
        ("DISK READ 3", range),
        ("DISK READ -1", range),
        ("DISK WRITE x y", range),
        ("DISK WRITE 1", usage),
        ("DISK SYNC 1", usage),
        ("DISK FORMAT", usage),
    ]);
    let long = format!("DISK WRITE 1 {}", "x".repeat(BLOCK + 1));
    session.check(&[(&long, "-ERR a block has 4096 bytes|"), ("DISK READ 1", "$-1|")]);
    let disk = session.machine.disk.as_mut().unwrap();
    assert_eq!(disk.synced, 1);
    disk.broken = true;
    let broken = "-ERR the disk reports an error|";
    session.check(&[("DISK READ 2", broken), ("DISK WRITE 2 z", broken), ("DISK SYNC", broken)]);
}
