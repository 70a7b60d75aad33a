//! Events as they happen (server-sent events), from any place that a client has seen before.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use http_body_util::channel::Channel;
use tokio::sync::OwnedSemaphorePermit;

use crate::error::NodeError;
use crate::feed::{Feed, Follower};

/// How often a client hears something, so that one that has gone is noticed.
const SIGN: Duration = Duration::from_secs(15);

/// Answers with all events after `last`, or with those that come from now on. Where some are lost the first event is
/// `reset`: the client asks for everything anew.
pub(super) fn events(feed: Arc<Feed>, caller: Follower, last: Option<&str>) -> Result<Response, NodeError> {
    // It is given back when the client goes.
    let place = feed.followers(caller).ok_or(NodeError::TooManyFollowers(caller.most()))?;
    let from = last.map(|last| feed.number(last));
    let (sender, body) = Channel::<Bytes>::new(1);
    tokio::spawn(follow(feed, from, sender, place));
    let head = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")];
    Ok((StatusCode::OK, head, Body::new(body)).into_response())
}

/// Ends when the client goes. A client that does not read makes this wait, and finds a `reset` afterwards.
async fn follow(
    feed: Arc<Feed>,
    from: Option<Option<u64>>,
    mut to: http_body_util::channel::Sender<Bytes>,
    _place: OwnedSemaphorePermit,
) {
    let mut newest = feed.follow();
    let (mut number, mut lost) = match from {
        None => (*newest.borrow_and_update(), false),
        Some(Some(number)) => (number, false),
        // Of another node's life.
        Some(None) => (*newest.borrow_and_update(), true),
    };
    // The client knows at once that it is heard, and from where on.
    if to.send_data(format!("id: {}\n: from here on\n\n", feed.id(number)).into()).await.is_err() {
        return;
    }
    loop {
        let after = feed.after(number);
        let mut text = String::new();
        if lost || !after.whole {
            let id = feed.id(after.last.saturating_sub(after.entries.len() as u64));
            text += &format!("id: {id}\nevent: reset\ndata: {{}}\n\n");
            lost = false;
        }
        for entry in &after.entries {
            // Plain data, and in one line: this cannot fail.
            let data = serde_json::to_string(&**entry).expect("an event is plain data");
            text += &format!("id: {}\nevent: {}\ndata: {data}\n\n", entry.id, entry.kind);
        }
        number = after.last;
        if text.is_empty() {
            match tokio::time::timeout(SIGN, newest.changed()).await {
                Ok(Ok(())) => continue,
                Ok(Err(_)) => return,
                Err(_) => text = ":\n\n".into(),
            }
        }
        if to.send_data(text.into()).await.is_err() {
            return;
        }
    }
}
