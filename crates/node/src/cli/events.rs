//! `outlive node events`.

use std::time::Duration;

use super::say::{Outcome, print_line, warn};
use super::{Asked, client};
use crate::sse::Event;
use crate::terminal::shown_in_line;

/// How long a node that has gone is waited for between two tries.
const AGAIN: Duration = Duration::from_secs(1);

/// Follows the events. A node that is started anew is followed, too, and its first event is a `reset`.
pub(super) fn command(mut last: Option<String>, api: &Asked<'_>) -> Outcome {
    let client = client(api)?;
    let (mut was_there, mut gone) = (false, false);
    loop {
        let mut failed = None;
        let from = last.clone();
        let ended = client.events(from.as_deref(), |event| {
            (was_there, gone) = (true, false);
            last = Some(event.id.clone());
            failed = line(&event, api.json).and_then(|line| print_line(&line).err());
            failed.is_none()
        });
        if let Some(why) = failed {
            return Err(why);
        }
        match ended {
            Err(why) if why.lasts() || !was_there => return Err(why.into()),
            _ if !gone => warn("outlive: the node has gone; it is waited for"),
            _ => {}
        }
        gone = true;
        std::thread::sleep(AGAIN);
    }
}

/// What is printed of an event; nothing of a mere place in the stream.
fn line(event: &Event, json: bool) -> Option<String> {
    let kind = event.kind.as_deref()?;
    if json {
        let lost = || serde_json::json!({ "id": event.id, "kind": kind }).to_string();
        return Some(if kind == "reset" { lost() } else { event.data.to_string() });
    }
    if kind == "reset" {
        return Some("some events are lost: `outlive vm list` shows what is now".to_owned());
    }
    let text = |key: &str| event.data[key].as_str().unwrap_or_default();
    let vm = event.data["vm"].as_str().map_or_else(String::new, |vm| format!("{vm}: "));
    Some(shown_in_line(&format!("{}  {vm}{}", text("time"), text("text"))).into_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_event_is_a_line() {
        let data = json!({ "id": "x-1", "time": "now", "kind": "vm_state", "vm": "web", "text": "running", "data": {} });
        let event =
            |kind: Option<&str>, data| Event { id: "x-1".into(), kind: kind.map(str::to_owned), data };
        let web = event(Some("vm_state"), data.clone());
        assert_eq!(line(&web, false).as_deref(), Some("now  web: running"));
        assert_eq!(line(&web, true), Some(data.to_string()));
        let evil = json!({ "time": "now", "vm": "web", "text": "ended: \x1b[2J\nnow  db: running" });
        let evil = line(&event(Some("vm_state"), evil), false);
        assert_eq!(evil.as_deref(), Some("now  web: ended: ?[2J now  db: running"));
        let reset = event(Some("reset"), json!({}));
        assert_eq!(line(&reset, true).as_deref(), Some(r#"{"id":"x-1","kind":"reset"}"#));
        assert_eq!(line(&event(None, json!(null)), false), None);
    }
}
