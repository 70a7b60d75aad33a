//! Redis in the guest, under load and watched by clients that remember their acknowledged writes.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::clocks::Clocks;
use super::stage::{Guest, Stage};
use super::{Context, ProofError, ensure};
use crate::nested::image::GuestKernel;
use crate::nested::kernel::Series;
use crate::nested::network::Net;

const CLIENTS: usize = 3;
/// How long clients may wait for an answer: longer than a takeover.
const PATIENCE: Duration = Duration::from_secs(90);
/// Load before the power cut, and after the takeover: at least this long, and until each client has had this
/// many answers.
const LOAD: Duration = Duration::from_secs(8);
const ENOUGH: u64 = 30;
/// Time for those answers.
const ANSWERS: Duration = Duration::from_secs(240);

pub(super) fn prove(context: &Context<'_>) -> Result<(), ProofError> {
    let mut stage = Stage::new(context.workspace, context.fetch, &[Series::Bookworm; 2])?;
    let guest = Guest::debian(GuestKernel::TrixieCloud, "redis");
    let [_primary, standby] = stage.pair(&guest, "")?;

    let clocks = Clocks::watch(&stage)?;
    let mut clients = Clients::start(&stage)?;
    clients.load()?;
    stage.cut(1, &standby)?;
    clients.load()?;
    clients.check(&stage)?;
    drop(clients);
    clocks.check(&stage, 1)?;
    stage.press_power_button(&standby)
}

/// `redis-benchmark`, and clients that check.
struct Clients {
    benchmark: Child,
    stop: Arc<AtomicBool>,
    checkers: Vec<JoinHandle<io::Result<Checked>>>,
    /// The acknowledged writes of each.
    acknowledged: Vec<Arc<AtomicU64>>,
}

/// A client's observations.
struct Checked {
    acknowledged: u64,
    longest_gap: Duration,
    lost: Vec<u64>,
}

impl Clients {
    fn start(stage: &Stage) -> Result<Clients, ProofError> {
        let client = |source| ProofError::Client { what: "a client of Redis".into(), source };
        let address = SocketAddr::new(Net::guest(1).into(), 6379);
        let stop = Arc::new(AtomicBool::new(false));
        let (mut checkers, mut acknowledged) = (Vec::new(), Vec::new());
        for number in 0..CLIENTS {
            let stream = stage.cluster.connect(address, PATIENCE).map_err(client)?;
            stream.set_read_timeout(Some(PATIENCE)).map_err(client)?;
            let (stop, count) = (Arc::clone(&stop), Arc::new(AtomicU64::new(0)));
            acknowledged.push(Arc::clone(&count));
            checkers.push(thread::spawn(move || check(stream, number, &stop, &count)));
        }
        let mut benchmark = stage.cluster.guest_client("redis-benchmark");
        let host = Net::guest(1).to_string();
        benchmark.args([
            "-h",
            &host,
            "-c",
            "8",
            "-n",
            "100000000",
            "-r",
            "1000",
            "-d",
            "100",
            "-t",
            "set",
            "-q",
        ]);
        let benchmark = benchmark.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        Ok(Clients { benchmark: benchmark.map_err(client)?, stop, checkers, acknowledged })
    }

    /// Lets them write for a while.
    fn load(&self) -> Result<(), ProofError> {
        let counts = || self.acknowledged.iter().map(|count| count.load(Ordering::Relaxed));
        let (before, start): (Vec<u64>, _) = (counts().collect(), Instant::now());
        let enough = || counts().zip(&before).all(|(now, before)| now >= before + ENOUGH);
        while start.elapsed() < LOAD || !enough() {
            // One that has failed says so at the end.
            if self.checkers.iter().any(JoinHandle::is_finished) {
                return Ok(());
            }
            ensure(start.elapsed() < ANSWERS, || "the clients of Redis get too few answers".into())?;
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Ends the clients; each checks that all its acknowledged writes are there.
    fn check(&mut self, stage: &Stage) -> Result<(), ProofError> {
        let client = |source| ProofError::Client { what: "a client of Redis".into(), source };
        let ended = self.benchmark.try_wait().map_err(client)?;
        self.stop.store(true, Ordering::Relaxed);
        for (number, checker) in self.checkers.drain(..).enumerate() {
            let seen = checker.join().expect("the client does not panic").map_err(client)?;
            let Checked { acknowledged, longest_gap, lost } = seen;
            stage.say(&format!(
                "client {number}: {acknowledged} writes acknowledged over one connection, longest wait {:.1} s",
                longest_gap.as_secs_f64()
            ));
            ensure(lost.is_empty(), || format!("client {number}: acknowledged writes are lost: {lost:?}"))?;
            ensure(acknowledged >= ENOUGH, || format!("client {number}: too few writes to prove anything"))?;
        }
        ensure(ended.is_none(), || "redis-benchmark has lost a connection".into())
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.benchmark.kill();
        let _ = self.benchmark.wait();
    }
}

/// Writes values one after another until it is told to stop, then reads them all, over the same connection.
fn check(
    stream: TcpStream,
    number: usize,
    stop: &AtomicBool,
    acknowledged: &AtomicU64,
) -> io::Result<Checked> {
    let mut answers = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    let mut seen = Checked { acknowledged: 0, longest_gap: Duration::ZERO, lost: Vec::new() };
    while !stop.load(Ordering::Relaxed) {
        let next = seen.acknowledged;
        let sent = Instant::now();
        let answer = ask(&mut stream, &mut answers, &["SET", &key(number, next), &value(next)])?;
        if answer != "+OK" {
            return Err(io::Error::other(format!("Redis says {answer}")));
        }
        seen.longest_gap = seen.longest_gap.max(sent.elapsed());
        seen.acknowledged += 1;
        acknowledged.store(seen.acknowledged, Ordering::Relaxed);
    }
    for written in 0..seen.acknowledged {
        if ask(&mut stream, &mut answers, &["GET", &key(number, written)])? != value(written) {
            seen.lost.push(written);
        }
    }
    Ok(seen)
}

fn key(client: usize, number: u64) -> String {
    format!("client-{client}-{number}")
}

fn value(number: u64) -> String {
    format!("value-{}", number.wrapping_mul(0x9E37_79B9_7F4A_7C15))
}

/// A request and its answer: a status line, or the requested string.
fn ask(stream: &mut TcpStream, answers: &mut impl BufRead, words: &[&str]) -> io::Result<String> {
    let mut request = format!("*{}\r\n", words.len());
    for word in words {
        request.push_str(&format!("${}\r\n{word}\r\n", word.len()));
    }
    stream.write_all(request.as_bytes())?;
    let mut line = || {
        let mut line = String::new();
        if answers.read_line(&mut line)? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        Ok(line.trim_end().to_string())
    };
    let first = line()?;
    if first.starts_with('$') && first != "$-1" { line() } else { Ok(first) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_lost_write_is_seen() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&stop);
        // A server that accepts five writes and has forgotten the third.
        let server = thread::spawn(move || {
            let (mut peer, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(peer.try_clone().unwrap()).lines();
            let mut next = || lines.next().unwrap().unwrap();
            for request in 0..10_u64 {
                let words = next().trim_start_matches('*').parse::<usize>().unwrap();
                (0..2 * words).for_each(|_| drop(next()));
                if request == 4 {
                    ends.store(true, Ordering::Relaxed);
                }
                let stored = format!("${}\r\n{}\r\n", value(request % 5).len(), value(request % 5));
                let answer = match request {
                    0..5 => "+OK\r\n",
                    7 => "$-1\r\n",
                    _ => &stored,
                };
                peer.write_all(answer.as_bytes()).unwrap();
            }
        });
        let seen = check(stream, 0, &stop, &AtomicU64::new(0)).unwrap();
        server.join().unwrap();
        assert_eq!((seen.acknowledged, seen.lost), (5, vec![2]));
    }
}
