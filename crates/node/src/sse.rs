//! Server-sent events, as a client reads them.

use serde_json::Value;

/// The longest line of a stream, in bytes.
const LONGEST: usize = 1 << 20;

/// An event, or a mere place in the stream, which has no kind.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Event {
    /// Where a client goes on.
    pub(crate) id: String,
    /// What kind of event.
    pub(crate) kind: Option<String>,
    /// What is told of it.
    pub(crate) data: Value,
}

/// A stream that comes in pieces.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    rest: Vec<u8>,
    id: String,
    kind: Option<String>,
    data: Value,
}

impl Reader {
    /// Takes the next piece, and returns the events that are whole with it. `None`: it is no such stream.
    pub(crate) fn read(&mut self, piece: &[u8]) -> Option<Vec<Event>> {
        self.rest.extend_from_slice(piece);
        let mut events = Vec::new();
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            let line = std::str::from_utf8(&line).ok()?.trim_end();
            if let Some(id) = line.strip_prefix("id: ") {
                self.id = id.to_owned();
            } else if let Some(kind) = line.strip_prefix("event: ") {
                self.kind = Some(kind.to_owned());
            } else if let Some(data) = line.strip_prefix("data: ") {
                self.data = serde_json::from_str(data).ok()?;
            } else if line.is_empty() && !self.id.is_empty() {
                events.push(Event { id: self.id.clone(), kind: self.kind.take(), data: self.data.take() });
            }
        }
        (self.rest.len() <= LONGEST).then_some(events)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn events_are_read_from_pieces_of_any_size() {
        let stream = "id: x-1\n: from here on\n\n:\n\nid: x-2\nevent: vm_state\ndata: {\"vm\":\"ä\"}\n\n";
        let place = |id: &str| Event { id: id.into(), kind: None, data: Value::Null };
        let last = Event { id: "x-2".into(), kind: Some("vm_state".into()), data: json!({ "vm": "ä" }) };
        for size in [1, 7, 1000] {
            let mut reader = Reader::default();
            let events: Vec<_> =
                stream.as_bytes().chunks(size).flat_map(|piece| reader.read(piece).unwrap()).collect();
            assert_eq!(events, [place("x-1"), place("x-1"), last.clone()]);
        }
        assert_eq!(Reader::default().read(b"data: {\n"), None);
        assert_eq!(Reader::default().read(&vec![b'x'; LONGEST + 1]), None);
    }
}
