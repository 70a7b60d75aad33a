//! Who may do what.

use std::io::{self, Read};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};

use crate::picture::{self, FILES, File};

/// The header that orders have. A page of another origin cannot send it: its browser would ask first, and hear no.
pub(super) const ORDER: &str = "x-outlive-page";
/// The name of the cookie.
const COOKIE: &str = "outlive";
/// Bytes of a secret.
const SECRET: usize = 24;

const NOT_KNOWN: &str = "This page is for whoever has the link that `outlive node page` has printed, in the browser that has opened it. A \
                         link counts once: end the command with Ctrl-C and start it again for another one.";
const NOT_HERE: &str = "There is nothing here: use the link that `outlive node page` has printed.";
const NOT_THIS_NAME: &str =
    "This page has no such host name: use the link as it was printed, with 127.0.0.1, [::1] or localhost.";
const NOT_AN_ORDER: &str = "Orders come from the page itself.";
const NOT_FROM_HERE: &str =
    "The page does not define VMs: use `outlive vm define` and `outlive vm undefine`.";

/// What becomes of a request.
#[derive(Debug)]
pub(super) enum Verdict {
    /// The browser may come in.
    Open {
        /// What it shows from now on.
        cookie: HeaderValue,
        /// Where the page is.
        to: String,
    },
    /// It gets a file of the page.
    File(&'static File),
    /// The node shall answer: path and query.
    Pass(String),
    /// No.
    Refuse(StatusCode, &'static str),
}

/// The secrets of one server.
#[derive(Debug)]
pub(super) struct Gate {
    /// Opens the page, once.
    token: String,
    is_used: AtomicBool,
    /// What the browser shows then.
    cookie: String,
    /// The name of the folder with the page.
    folder: String,
}

impl Gate {
    /// New secrets.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn new() -> io::Result<Self> {
        let mut random = std::fs::File::open("/dev/urandom")?;
        let mut secret = || -> io::Result<String> {
            let mut bytes = [0; SECRET];
            random.read_exact(&mut bytes)?;
            Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
        };
        Ok(Self { token: secret()?, is_used: AtomicBool::new(false), cookie: secret()?, folder: secret()? })
    }

    /// The link that opens the page.
    pub(super) fn link(&self, at: SocketAddr) -> String {
        format!("http://{at}/open?token={}", self.token)
    }

    fn folder(&self) -> String {
        format!("/{}/", self.folder)
    }

    /// What becomes of a request.
    pub(super) fn judge(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> Verdict {
        if !is_of_this_host(headers) {
            return Verdict::Refuse(StatusCode::MISDIRECTED_REQUEST, NOT_THIS_NAME);
        }
        if uri.path() == "/open" {
            return self.open(method, uri);
        }
        let folder = self.folder();
        let within = uri.path().get(..folder.len()).filter(|it| is_same(it, &folder));
        let Some(route) = within.and_then(|it| uri.path().strip_prefix(it)) else {
            return Verdict::Refuse(StatusCode::NOT_FOUND, NOT_HERE);
        };
        if !self.is_known(headers) {
            return Verdict::Refuse(StatusCode::UNAUTHORIZED, NOT_KNOWN);
        }
        if picture::is_order(method) && !(headers.contains_key(ORDER) && picture::is_own_page(headers)) {
            return Verdict::Refuse(StatusCode::FORBIDDEN, NOT_AN_ORDER);
        }
        if let Some(file) = FILES.iter().find(|it| it.name == route && *method == Method::GET) {
            return Verdict::File(file);
        }
        if !route.starts_with("v1/") {
            return Verdict::Refuse(StatusCode::NOT_FOUND, NOT_HERE);
        }
        // A definition can name any file and any command; the page gives orders about VMs that are defined.
        if ![Method::GET, Method::POST].contains(method) {
            return Verdict::Refuse(StatusCode::METHOD_NOT_ALLOWED, NOT_FROM_HERE);
        }
        let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
        Verdict::Pass(format!("/{route}{query}"))
    }

    fn open(&self, method: &Method, uri: &Uri) -> Verdict {
        let token = uri.query().and_then(|query| query.strip_prefix("token="));
        let fits = *method == Method::GET && token.is_some_and(|it| is_same(it, &self.token));
        if !fits || self.is_used.swap(true, Ordering::Relaxed) {
            return Verdict::Refuse(StatusCode::UNAUTHORIZED, NOT_KNOWN);
        }
        let to = self.folder();
        let cookie = format!("{COOKIE}={}; Path={to}; HttpOnly; SameSite=Strict", self.cookie);
        // Hexadecimal: this cannot fail.
        Verdict::Open { cookie: HeaderValue::from_str(&cookie).expect("a cookie is text"), to }
    }

    fn is_known(&self, headers: &HeaderMap) -> bool {
        let lines = headers.get_all(header::COOKIE).iter().filter_map(|it| it.to_str().ok());
        let mut cookies = lines.flat_map(|it| it.split(';')).filter_map(|it| it.trim().split_once('='));
        cookies.any(|(name, value)| name == COOKIE && is_same(value, &self.cookie))
    }
}

/// Whether a browser asks under a name that is this host's for certain. The port may be another one: `ssh -L` has its own.
pub(crate) fn is_of_this_host(headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (Some(host), None) = (hosts.next().and_then(|it| it.to_str().ok()), hosts.next()) else {
        return false;
    };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|it| it.is_ascii_digit()) => name,
        _ => host,
    };
    ["127.0.0.1", "[::1]"].contains(&name) || name.eq_ignore_ascii_case("localhost")
}

/// Whether two texts are the same, in a time that does not say where they differ.
fn is_same(one: &str, other: &str) -> bool {
    let differs = one.bytes().zip(other.bytes()).fold(0, |differs, (a, b)| differs | (a ^ b));
    one.len() == other.len() && differs == 0
}
