//! A small client of the Redis protocol (RESP2) over one blocking TCP connection.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use thiserror::Error;

/// Longest line and longest string that a reply may have; the demo never asks for more.
const REPLY_LIMIT: usize = 64 * 1024;
/// Most elements of an array reply.
const ARRAY_LIMIT: usize = 4096;

/// Why a conversation with the server failed.
#[derive(Debug, Error)]
pub(super) enum ClientError {
    /// No connection was made.
    #[error("cannot connect to {addr}: {source}")]
    Connect { addr: SocketAddr, source: io::Error },
    /// The connection was reset, or no reply came in time.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// The server closed the connection when a reply was due.
    #[error("the server closed the connection")]
    Closed,
    /// The server's answer is not RESP.
    #[error("not a reply: {0}")]
    Protocol(String),
    /// A reply of another kind than the command calls for, for example an error.
    #[error("unexpected reply to {command}: {reply:?}")]
    Unexpected { command: &'static str, reply: Reply },
}

/// One reply of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// `+OK`
    Simple(String),
    /// `-ERR ...`
    Error(String),
    /// `:17`
    Integer(i64),
    /// `$5 hello`; `None` for a key that does not exist.
    Bulk(Option<Vec<u8>>),
    /// `*2 ...`
    Array(Vec<Reply>),
}

/// One connection; one request at a time.
#[derive(Debug)]
pub(super) struct Connection {
    reader: BufReader<TcpStream>,
    request: Vec<u8>,
}

impl Connection {
    /// Connects; `patience` bounds the making of the connection, `reply_patience` the wait for each reply.
    pub(super) fn open(
        addr: SocketAddr,
        patience: Duration,
        reply_patience: Duration,
    ) -> Result<Self, ClientError> {
        let stream = TcpStream::connect_timeout(&addr, patience)
            .map_err(|source| ClientError::Connect { addr, source })?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(reply_patience))?;
        stream.set_write_timeout(Some(reply_patience))?;
        Ok(Self { reader: BufReader::new(stream), request: Vec::new() })
    }

    /// A second handle, by which another thread can shut the connection down.
    pub(super) fn handle(&self) -> io::Result<TcpStream> {
        self.reader.get_ref().try_clone()
    }

    /// `INCR key`: the counter's new value.
    pub(super) fn increment(&mut self, key: &str) -> Result<i64, ClientError> {
        match self.call(&[b"INCR", key.as_bytes()])? {
            Reply::Integer(value) => Ok(value),
            reply => Err(ClientError::Unexpected { command: "INCR", reply }),
        }
    }

    /// `SET key value`.
    pub(super) fn set(&mut self, key: &str, value: &str) -> Result<(), ClientError> {
        match self.call(&[b"SET", key.as_bytes(), value.as_bytes()])? {
            Reply::Simple(text) if text == "OK" => Ok(()),
            reply => Err(ClientError::Unexpected { command: "SET", reply }),
        }
    }

    /// `GET key`: the value, `None` if the key does not exist.
    pub(super) fn get(&mut self, key: &str) -> Result<Option<Vec<u8>>, ClientError> {
        match self.call(&[b"GET", key.as_bytes()])? {
            Reply::Bulk(value) => Ok(value),
            reply => Err(ClientError::Unexpected { command: "GET", reply }),
        }
    }

    /// `MGET key...`: one value for each key.
    pub(super) fn get_many(&mut self, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>, ClientError> {
        let words: Vec<&[u8]> =
            std::iter::once(&b"MGET"[..]).chain(keys.iter().map(|k| k.as_bytes())).collect();
        let reply = self.call(&words)?;
        let wrong = |reply| ClientError::Unexpected { command: "MGET", reply };
        let Reply::Array(items) = reply else { return Err(wrong(reply)) };
        if items.len() != keys.len() {
            return Err(wrong(Reply::Array(items)));
        }
        items.into_iter().map(|i| if let Reply::Bulk(v) = i { Ok(v) } else { Err(wrong(i)) }).collect()
    }

    /// `WORK SET pages 0 0`: the guest writes to so many pages, anywhere among them, as fast as it can.
    pub(super) fn work(&mut self, pages: u64) -> Result<(), ClientError> {
        match self.call(&[b"WORK", b"SET", pages.to_string().as_bytes(), b"0", b"0"])? {
            Reply::Simple(text) if text == "OK" => Ok(()),
            reply => Err(ClientError::Unexpected { command: "WORK SET", reply }),
        }
    }

    /// `WORK OFF`: it does so no longer.
    pub(super) fn rest(&mut self) -> Result<(), ClientError> {
        match self.call(&[b"WORK", b"OFF"])? {
            Reply::Simple(text) if text == "OK" => Ok(()),
            reply => Err(ClientError::Unexpected { command: "WORK OFF", reply }),
        }
    }

    /// A number of `WORK STAT`.
    pub(super) fn work_number(&mut self, name: &str) -> Result<u64, ClientError> {
        self.send(&[b"WORK", b"STAT"])?;
        // One of its values is an array.
        let reply = self.reply(2)?;
        let wrong = |reply| ClientError::Unexpected { command: "WORK STAT", reply };
        let Reply::Array(fields) = reply else { return Err(wrong(reply)) };
        let is_name = |field: &Reply| matches!(field, Reply::Bulk(Some(bytes)) if bytes == name.as_bytes());
        let value = fields.iter().position(is_name).and_then(|at| fields.get(at + 1));
        match value {
            Some(&Reply::Integer(value)) if value >= 0 => Ok(value as u64),
            _ => Err(wrong(Reply::Array(fields))),
        }
    }

    /// Sends one command and waits for its reply.
    pub(super) fn call(&mut self, words: &[&[u8]]) -> Result<Reply, ClientError> {
        self.send(words)?;
        self.reply(1)
    }

    fn send(&mut self, words: &[&[u8]]) -> Result<(), ClientError> {
        self.request.clear();
        write!(self.request, "*{}\r\n", words.len())?;
        for word in words {
            write!(self.request, "${}\r\n", word.len())?;
            self.request.extend_from_slice(word);
            self.request.extend_from_slice(b"\r\n");
        }
        Ok(self.reader.get_mut().write_all(&self.request)?)
    }

    /// A reply in which arrays may be nested so deep.
    fn reply(&mut self, arrays: u8) -> Result<Reply, ClientError> {
        let line = self.line()?;
        let wrong = || ClientError::Protocol(line.clone());
        let Some(kind) = line.chars().next().filter(char::is_ascii) else { return Err(wrong()) };
        let rest = &line[1..];
        match kind {
            '+' => Ok(Reply::Simple(rest.to_owned())),
            '-' => Ok(Reply::Error(rest.to_owned())),
            ':' => rest.parse().map(Reply::Integer).map_err(|_| wrong()),
            '$' if rest == "-1" => Ok(Reply::Bulk(None)),
            '$' => match rest.parse::<usize>() {
                Ok(length) if length <= REPLY_LIMIT => self.bulk(length).map(|b| Reply::Bulk(Some(b))),
                _ => Err(wrong()),
            },
            '*' if arrays > 0 => match rest.parse::<usize>() {
                Ok(length) if length <= ARRAY_LIMIT => {
                    (0..length).map(|_| self.reply(arrays - 1)).collect::<Result<_, _>>().map(Reply::Array)
                }
                _ => Err(wrong()),
            },
            _ => Err(wrong()),
        }
    }

    fn line(&mut self) -> Result<String, ClientError> {
        let mut line = Vec::new();
        (&mut self.reader).take(REPLY_LIMIT as u64).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Err(ClientError::Closed);
        }
        let text = String::from_utf8_lossy(&line).into_owned();
        match text.strip_suffix("\r\n") {
            Some(text) => Ok(text.to_owned()),
            None => Err(ClientError::Protocol(text)),
        }
    }

    fn bulk(&mut self, length: usize) -> Result<Vec<u8>, ClientError> {
        let mut bytes = vec![0; length + 2];
        self.reader.read_exact(&mut bytes)?;
        if bytes.split_off(length) != b"\r\n" {
            return Err(ClientError::Protocol("a string without its end".into()));
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    /// A connection to a server that says `bytes` and then closes, whatever it is asked.
    fn hears(bytes: &'static [u8]) -> Connection {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 1024]);
            stream.write_all(bytes).unwrap();
        });
        Connection::open(addr, SOON, SOON).unwrap()
    }

    #[test]
    fn replies_are_understood() {
        assert_eq!(hears(b":42\r\n").increment("k").unwrap(), 42);
        hears(b"+OK\r\n").set("k", "v").unwrap();
        assert_eq!(hears(b"$-1\r\n").get("k").unwrap(), None);
        assert_eq!(hears(b"$2\r\n\r\n\r\n").get("k").unwrap(), Some(b"\r\n".to_vec()));
        let keys = ["a".to_owned(), "b".to_owned()];
        assert_eq!(hears(b"*2\r\n$1\r\nx\r\n$-1\r\n").get_many(&keys).unwrap(), [Some(b"x".to_vec()), None]);
    }

    #[test]
    fn a_number_of_the_load_is_found_among_the_others() {
        const STAT: &[u8] = b"*6\r\n$5\r\npages\r\n:7\r\n$15\r\nwrites_per_vcpu\r\n*2\r\n:1\r\n:2\r\n\
                              $6\r\nwrites\r\n:40\r\n";
        assert_eq!(hears(STAT).work_number("writes").unwrap(), 40);
        for name in ["writes_per_vcpu", "other"] {
            let found = hears(STAT).work_number(name);
            assert!(matches!(found, Err(ClientError::Unexpected { .. })), "{name}");
        }
    }

    #[test]
    fn what_is_no_reply_is_an_error() {
        assert!(matches!(hears(b"").get("k"), Err(ClientError::Closed)));
        assert!(matches!(hears(b"$5\r\nab").get("k"), Err(ClientError::Io(_))));
        for bad in
            [&b"hello\r\n"[..], b"$99999999999\r\n", b"$x\r\n", b":1", b"*1\r\n*1\r\n", b"\xff\r\n", b"\r\n"]
        {
            assert!(matches!(hears(bad).get("k"), Err(ClientError::Protocol(_))), "{bad:?}");
        }
        for other in [&b"-OOM no memory\r\n"[..], b":1\r\n"] {
            assert!(matches!(hears(other).get("k"), Err(ClientError::Unexpected { .. })), "{other:?}");
        }
        assert!(matches!(
            hears(b"*1\r\n$-1\r\n").get_many(&["a".into(), "b".into()]),
            Err(ClientError::Unexpected { .. })
        ));
    }

    #[test]
    fn a_silent_server_is_not_waited_for_for_ever() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut connection =
            Connection::open(listener.local_addr().unwrap(), SOON, Duration::from_millis(50)).unwrap();
        assert!(matches!(connection.get("k"), Err(ClientError::Io(_))));
    }
}
