//! A key-value server in this process that can be told to cheat. It proves that the judge notices.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

/// What the server does wrong. Numbers count the requests of that kind over all connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Nothing.
    None,
    /// Acknowledges the n-th INCR without doing it.
    LoseIncrement(u64),
    /// Does the n-th INCR twice and answers as if it had been done once.
    RepeatIncrement(u64),
    /// Acknowledges the n-th SET without doing it.
    LoseSet(u64),
    /// Closes the connection at every request from the n-th on.
    HangUpAfter(u64),
    /// Never answers again from the n-th request on.
    SilentAfter(u64),
}

#[derive(Debug, Default)]
struct Store {
    values: HashMap<String, Vec<u8>>,
    requests: u64,
    increments: u64,
    sets: u64,
}

/// The server; its threads end with their connections.
#[derive(Debug)]
pub(super) struct FakeServer {
    addr: SocketAddr,
}

impl FakeServer {
    pub(super) fn start(fault: Fault) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let store = Arc::new(Mutex::new(Store::default()));
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let store = store.clone();
                thread::spawn(move || serve(stream, &store, fault));
            }
        });
        Self { addr }
    }

    pub(super) fn addr(&self) -> SocketAddr {
        self.addr
    }
}

fn serve(stream: TcpStream, store: &Mutex<Store>, fault: Fault) {
    stream.set_nodelay(true).unwrap();
    let mut reader = BufReader::new(stream);
    while let Some(words) = request(&mut reader) {
        let Some(reply) = store.lock().unwrap().answer(&words, fault) else { return };
        if reply.is_empty() {
            thread::park();
        }
        if reader.get_mut().write_all(&reply).is_err() {
            return;
        }
    }
}

fn request(reader: &mut impl BufRead) -> Option<Vec<String>> {
    let mut number = |kind: char| {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        line.trim_end().strip_prefix(kind)?.parse::<usize>().ok()
    };
    let words = number('*')?;
    (0..words)
        .map(|_| {
            let mut line = String::new();
            reader.read_line(&mut line).ok()?;
            let mut word = vec![0; line.trim_end().strip_prefix('$')?.parse::<usize>().ok()? + 2];
            reader.read_exact(&mut word).ok()?;
            word.truncate(word.len() - 2);
            String::from_utf8(word).ok()
        })
        .collect()
}

impl Store {
    /// `None`: hang up. Empty: say nothing.
    fn answer(&mut self, words: &[String], fault: Fault) -> Option<Vec<u8>> {
        self.requests += 1;
        match fault {
            Fault::HangUpAfter(n) if self.requests >= n => return None,
            Fault::SilentAfter(n) if self.requests >= n => return Some(Vec::new()),
            _ => {}
        }
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        Some(match words[..] {
            ["INCR", key] => self.increment(key, fault),
            ["SET", key, value] => self.set(key, value, fault),
            ["GET", key] => self.bulk(key),
            ["MGET", ref keys @ ..] => {
                let mut reply = format!("*{}\r\n", keys.len()).into_bytes();
                keys.iter().for_each(|key| reply.extend(self.bulk(key)));
                reply
            }
            _ => b"-ERR unknown command\r\n".to_vec(),
        })
    }

    fn increment(&mut self, key: &str, fault: Fault) -> Vec<u8> {
        self.increments += 1;
        let old = self.values.get(key).map_or(0, |v| String::from_utf8_lossy(v).parse::<u64>().unwrap());
        let new = match fault {
            Fault::LoseIncrement(n) if self.increments == n => old,
            Fault::RepeatIncrement(n) if self.increments == n => old + 2,
            _ => old + 1,
        };
        self.values.insert(key.to_owned(), new.to_string().into_bytes());
        format!(":{}\r\n", old + 1).into_bytes()
    }

    fn set(&mut self, key: &str, value: &str, fault: Fault) -> Vec<u8> {
        self.sets += 1;
        if !matches!(fault, Fault::LoseSet(n) if self.sets == n) {
            self.values.insert(key.to_owned(), value.as_bytes().to_vec());
        }
        b"+OK\r\n".to_vec()
    }

    fn bulk(&self, key: &str) -> Vec<u8> {
        let Some(value) = self.values.get(key) else { return b"$-1\r\n".to_vec() };
        [format!("${}\r\n", value.len()).as_bytes(), value, b"\r\n"].concat()
    }
}
