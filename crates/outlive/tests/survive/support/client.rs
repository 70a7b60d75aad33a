//! A client of the Redis protocol, separate from the program's own so that both do not share a mistake.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use super::{PATIENCE, World};

/// A reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Status(String),
    Error(String),
    Integer(i64),
    Bulk(Option<Vec<u8>>),
    Array(Vec<Value>),
}

/// One connection. Errors are texts: a test shows them and fails.
pub(crate) struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    /// Connects from the clients' network.
    pub(crate) fn connect(world: &World) -> Client {
        world.lan(|| Client::open(world.server())).unwrap()
    }

    /// Connects from the network of the calling thread.
    pub(crate) fn open(server: SocketAddr) -> Result<Client, String> {
        let stream = TcpStream::connect_timeout(&server, PATIENCE).map_err(|e| format!("connect: {e}"))?;
        let ready = stream.set_nodelay(true).and_then(|()| stream.set_read_timeout(Some(PATIENCE)));
        ready.map_err(|e| e.to_string())?;
        Ok(Client { stream: BufReader::new(stream) })
    }

    /// A second handle, with which another thread can shut the connection down.
    pub(crate) fn handle(&self) -> TcpStream {
        self.stream.get_ref().try_clone().unwrap()
    }

    /// Sends a command and reads its reply.
    pub(crate) fn call(&mut self, words: &[&[u8]]) -> Result<Value, String> {
        self.send(words)?;
        self.reply().map_err(|e| format!("reply to {}: {e}", String::from_utf8_lossy(words[0])))
    }

    /// The same for a command of words without blanks in between.
    pub(crate) fn ask(&mut self, line: &str) -> Result<Value, String> {
        let words: Vec<&[u8]> = line.split(' ').map(str::as_bytes).collect();
        self.call(&words)
    }

    /// A number of `WORK STAT`. Panics if there is none of this name.
    pub(crate) fn work(&mut self, name: &str) -> i64 {
        let Value::Array(fields) = self.ask("WORK STAT").unwrap() else { panic!("no statistics") };
        let at = fields.iter().position(|field| *field == Value::Bulk(Some(name.into())));
        match at.map(|at| &fields[at + 1]) {
            Some(Value::Integer(number)) => *number,
            other => panic!("{name}: {other:?}"),
        }
    }

    /// Sends a command without waiting for the reply.
    pub(crate) fn send(&mut self, words: &[&[u8]]) -> Result<(), String> {
        let mut request = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            request.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            request.extend_from_slice(word);
            request.extend_from_slice(b"\r\n");
        }
        self.stream.get_mut().write_all(&request).map_err(|e| format!("send: {e}"))
    }

    /// Reads one reply.
    pub(crate) fn reply(&mut self) -> Result<Value, String> {
        let mut line = String::new();
        self.stream.read_line(&mut line).map_err(|e| e.to_string())?;
        let line = line.strip_suffix("\r\n").ok_or("the connection was closed")?;
        let number = |text: &str| text.parse::<i64>().map_err(|_| format!("not a reply: {line}"));
        let (kind, rest) = line.split_at_checked(1).ok_or("an empty reply")?;
        Ok(match kind {
            "+" => Value::Status(rest.into()),
            "-" => Value::Error(rest.into()),
            ":" => Value::Integer(number(rest)?),
            "$" if rest == "-1" => Value::Bulk(None),
            "$" => {
                let mut bytes = vec![0; number(rest)? as usize + 2];
                self.stream.read_exact(&mut bytes).map_err(|e| e.to_string())?;
                bytes.truncate(bytes.len() - 2);
                Value::Bulk(Some(bytes))
            }
            "*" => Value::Array((0..number(rest)?).map(|_| self.reply()).collect::<Result<_, _>>()?),
            _ => return Err(format!("not a reply: {line}")),
        })
    }

    /// Waits to see whether the server has closed the connection.
    pub(crate) fn is_closed(&mut self) -> bool {
        matches!(self.stream.fill_buf(), Ok(bytes) if bytes.is_empty())
    }

    /// Closes the connection so that the server keeps nothing of it.
    pub(crate) fn close(mut self) -> Result<(), String> {
        self.stream.get_ref().shutdown(Shutdown::Write).map_err(|e| e.to_string())?;
        if self.is_closed() { Ok(()) } else { Err("the server did not close".into()) }
    }
}
