//! Two pages over HTTP/1.1, for whoever scrapes: `/metrics` and `/healthz`.
//!
//! Everything that a client can make this process spend is bounded: connections, bytes of a request, time. One request per
//! connection, and nothing in its body is read.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::text::Format;

/// The most connections. The oldest goes for the next one: Prometheus needs milliseconds, and a client that says nothing has
/// been here for longer.
const MOST: usize = 16;
/// The most threads, with those whose connection was ended and that have not noticed yet.
const MOST_THREADS: usize = 2 * MOST;
/// The longest head of a request, in bytes, and the most lines of it.
const LONGEST_HEAD: usize = 8 << 10;
const MOST_LINES: usize = 64;
/// How long a request may take to arrive.
const HEARS: Duration = Duration::from_secs(5);
/// How long an answer may take to leave.
const SAYS: Duration = Duration::from_secs(10);
/// How long what a client says after its request is waited for and thrown away: closing earlier would cost it the answer.
const LINGERS: Duration = Duration::from_millis(500);
/// Time until the next try when a connection cannot be accepted, in milliseconds.
const TROUBLE: u8 = 100;

/// What is served.
pub(super) trait Page: Send + Sync + 'static {
    /// The metrics, in a format.
    fn metrics(&self, format: Format) -> String;
}

/// Serves until `quit` is readable.
pub(super) fn serve(listener: &TcpListener, page: &Arc<impl Page>, quit: &EventFd) {
    let visitors = Arc::new(Visitors::default());
    let wait = |comes: bool, timeout: PollTimeout| {
        let mut fds =
            [PollFd::new(quit.as_fd(), PollFlags::POLLIN), PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        let fds = &mut fds[..if comes { 2 } else { 1 }];
        match poll(fds, timeout) {
            Ok(_) => !fds[0].any().unwrap_or(true),
            Err(error) => error == Errno::EINTR,
        }
    };
    while wait(true, PollTimeout::NONE) {
        match listener.accept() {
            Ok((socket, _)) => enter(socket, &visitors, page),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            // Too many descriptors, for example: it would be tried again at once.
            Err(_) if !wait(false, PollTimeout::from(TROUBLE)) => return,
            Err(_) => {}
        }
    }
}

fn enter(socket: TcpStream, visitors: &Arc<Visitors>, page: &Arc<impl Page>) {
    let (Ok(()), Ok(copy)) = (socket.set_nonblocking(false), socket.try_clone()) else { return };
    let Some(visitor) = Visitors::enter(visitors, copy) else { return };
    let page = page.clone();
    // Without a thread the connection is closed.
    let _ = outlive_machine::spawn("scrape", move || {
        attend(&socket, &*page);
        drop(visitor);
    });
}

/// The connections, the oldest first, and the number of threads.
#[derive(Default)]
struct Visitors(Mutex<All>);

#[derive(Default)]
struct All {
    visitors: VecDeque<(u64, TcpStream)>,
    last: u64,
    threads: usize,
}

/// A connection that counts, until this is dropped.
struct Visitor {
    visitors: Arc<Visitors>,
    number: u64,
}

impl Visitors {
    fn enter(this: &Arc<Self>, socket: TcpStream) -> Option<Visitor> {
        let mut all = this.all();
        if all.threads >= MOST_THREADS {
            return None;
        }
        if all.visitors.len() >= MOST
            && let Some((_, oldest)) = all.visitors.pop_front()
        {
            // An error means that it is gone already.
            let _ = oldest.shutdown(Shutdown::Both);
        }
        all.last += 1;
        all.threads += 1;
        let number = all.last;
        all.visitors.push_back((number, socket));
        Some(Visitor { visitors: this.clone(), number })
    }

    fn all(&self) -> MutexGuard<'_, All> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Visitor {
    fn drop(&mut self) {
        let mut all = self.visitors.all();
        all.threads -= 1;
        all.visitors.retain(|(number, _)| *number != self.number);
    }
}

/// What a client wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Metrics(Format),
    Health,
}

/// Why it gets nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refused {
    Malformed,
    NotThere,
    Method,
    Late,
    Long,
}

impl Refused {
    fn status(self) -> &'static str {
        match self {
            Self::Malformed => "400 Bad Request",
            Self::NotThere => "404 Not Found",
            Self::Method => "405 Method Not Allowed",
            Self::Late => "408 Request Timeout",
            Self::Long => "431 Request Header Fields Too Large",
        }
    }
}

fn attend(socket: &TcpStream, page: &impl Page) {
    let answer = match hear(socket, Instant::now() + HEARS) {
        Ok(Ok(Wanted::Metrics(format))) => said("200 OK", format.content_type(), &page.metrics(format)),
        Ok(Ok(Wanted::Health)) => said("200 OK", "text/plain; charset=utf-8", "ok\n"),
        Ok(Err(why)) => {
            let text = format!("{}: there are GET /metrics and GET /healthz\n", why.status());
            said(why.status(), "text/plain; charset=utf-8", &text)
        }
        // It is gone.
        Err(_) => return,
    };
    if say(socket, answer.as_bytes(), Instant::now() + SAYS).is_ok() {
        linger(socket, Instant::now() + LINGERS);
    }
}

fn said(status: &str, kind: &str, text: &str) -> String {
    let allow = if status.starts_with("405") { "Allow: GET\r\n" } else { "" };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{allow}Connection: close\r\n\r\n{text}",
        text.len()
    )
}

/// Reads the head of a request.
///
/// # Errors
/// The connection's.
fn hear(mut socket: &TcpStream, deadline: Instant) -> io::Result<Result<Wanted, Refused>> {
    let (mut head, mut length) = ([0; LONGEST_HEAD], 0);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Err(Refused::Late));
        }
        socket.set_read_timeout(Some(left))?;
        match socket.read(&mut head[length..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(more) => length += more,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Err(Refused::Late)),
            Err(error) => return Err(error),
        }
        if let Some(wanted) = wanted(&head[..length]) {
            return Ok(wanted);
        }
        if length == head.len() {
            return Ok(Err(Refused::Long));
        }
    }
}

/// What the head of a request says; `None` if it is not whole.
fn wanted(head: &[u8]) -> Option<Result<Wanted, Refused>> {
    let mut lines = [httparse::EMPTY_HEADER; MOST_LINES];
    let mut request = httparse::Request::new(&mut lines);
    match request.parse(head) {
        Ok(httparse::Status::Partial) => return None,
        Ok(httparse::Status::Complete(_)) => {}
        Err(httparse::Error::TooManyHeaders) => return Some(Err(Refused::Long)),
        Err(_) => return Some(Err(Refused::Malformed)),
    }
    let path = request.path.unwrap_or_default();
    let path = path.split_once('?').map_or(path, |(path, _)| path);
    let page = match path {
        "/metrics" => Wanted::Metrics(format(request.headers)),
        "/healthz" => Wanted::Health,
        _ => return Some(Err(Refused::NotThere)),
    };
    Some(if request.method == Some("GET") { Ok(page) } else { Err(Refused::Method) })
}

/// The format that a client reads. Prometheus names OpenMetrics first if it can read it.
fn format(lines: &[httparse::Header<'_>]) -> Format {
    let accepts = lines.iter().filter(|line| line.name.eq_ignore_ascii_case("accept"));
    let open = |value: &[u8]| String::from_utf8_lossy(value).contains("application/openmetrics-text");
    if accepts.map(|line| line.value).any(open) { Format::OpenMetrics } else { Format::Prometheus }
}

fn say(mut socket: &TcpStream, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        socket.set_write_timeout(Some(left))?;
        match socket.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(length) => bytes = &bytes[length..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads to the end what a client says too much, for a short time.
fn linger(mut socket: &TcpStream, deadline: Instant) {
    let _ = socket.shutdown(Shutdown::Write);
    let mut rest = [0; 1024];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let more = !left.is_zero() && socket.set_read_timeout(Some(left)).is_ok();
        if !more || !socket.read(&mut rest).is_ok_and(|length| length > 0) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::serving::ServingThread;

    struct Fixed;

    impl Page for Fixed {
        fn metrics(&self, format: Format) -> String {
            format!("{format:?}\n")
        }
    }

    fn serve_fixed() -> (ServingThread, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let page = Arc::new(Fixed);
        (ServingThread::start("http", move |quit| serve(&listener, &page, quit)).unwrap(), address)
    }

    fn ask(address: SocketAddr, request: &[u8]) -> String {
        let mut socket = TcpStream::connect(address).unwrap();
        // The server may have answered and closed before everything was said.
        let _ = socket.write_all(request);
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn two_pages_are_served_and_everything_else_is_refused() {
        let (_server, address) = serve_fixed();
        let get = |path: &str| ask(address, format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes());
        let metrics = get("/metrics");
        assert!(
            metrics.starts_with("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4"),
            "{metrics}"
        );
        assert!(metrics.ends_with("\r\n\r\nPrometheus\n") && metrics.contains("\r\nContent-Length: 11\r\n"));
        assert!(get("/metrics?x=1").ends_with("\r\n\r\nPrometheus\n"));
        assert!(get("/healthz").ends_with("\r\n\r\nok\n"));
        assert!(get("/").starts_with("HTTP/1.1 404 "));
        assert!(get("/metrics/").starts_with("HTTP/1.1 404 "));
        let posted = ask(address, b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc");
        assert!(posted.starts_with("HTTP/1.1 405 ") && posted.contains("\r\nAllow: GET\r\n"), "{posted}");
        assert!(ask(address, b"\x16\x03\x01 TLS?\r\n\r\n").starts_with("HTTP/1.1 400 "));
        let accepts =
            "GET /metrics HTTP/1.1\r\naccept: application/openmetrics-text;version=1.0.0,*/*;q=0.1\r\n\r\n";
        let open = ask(address, accepts.as_bytes());
        assert!(
            open.contains("Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n")
        );
        assert!(open.ends_with("\r\n\r\nOpenMetrics\n"));
    }

    #[test]
    fn heads_have_a_limit() {
        let (_server, address) = serve_fixed();
        let long = format!("GET /metrics HTTP/1.1\r\nX: {}", "x".repeat(LONGEST_HEAD));
        assert!(ask(address, long.as_bytes()).starts_with("HTTP/1.1 431 "));
        let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(MOST_LINES + 1));
        assert!(ask(address, many.as_bytes()).starts_with("HTTP/1.1 431 "));
    }

    /// Clients that connect and say nothing keep nobody out.
    #[test]
    fn silent_clients_go_for_those_who_ask() {
        let (_server, address) = serve_fixed();
        let silent: Vec<_> = (0..MOST * 3).map(|_| TcpStream::connect(address).unwrap()).collect();
        let answered = (0..100).any(|_| {
            let mut socket = TcpStream::connect(address).unwrap();
            let mut answer = String::new();
            let asked = socket.write_all(b"GET /healthz HTTP/1.0\r\n\r\n");
            // It may have gone for nobody: there are more threads than connections for a moment only.
            let said = asked.and_then(|()| socket.read_to_string(&mut answer)).is_ok();
            said && answer.ends_with("ok\n")
        });
        assert!(answered);
        drop(silent);
    }

    #[test]
    fn a_request_that_comes_in_pieces_is_heard() {
        assert_eq!(wanted(b"GET /metr"), None);
        assert_eq!(wanted(b"GET /metrics HTTP/1.1\r\nA: b\r\n"), None);
        assert_eq!(wanted(b"GET /metrics HTTP/1.1\r\n\r\n"), Some(Ok(Wanted::Metrics(Format::Prometheus))));
        assert_eq!(wanted(b"HEAD /healthz HTTP/1.1\r\n\r\n"), Some(Err(Refused::Method)));
        assert_eq!(wanted(b"nonsense\r\n\r\n"), Some(Err(Refused::Malformed)));
    }
}
