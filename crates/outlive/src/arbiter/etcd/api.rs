//! The part of etcd's JSON gateway that is used: transactions. Keys and values are in base64, numbers of 64 bits
//! in quotes; what is zero, false or empty is left out.
//!
//! Source: <https://etcd.io/docs/v3.4/dev-guide/api_grpc_gateway/> and `rpc.proto` of etcd 3.4.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize, Serializer};

/// A key or a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bytes(pub(super) String);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

/// A condition of a transaction. With a `range_end` it must hold for all keys in the range, so a version of zero
/// means that the range is empty.
#[derive(Debug, Serialize)]
pub(super) struct Compare {
    key: Bytes,
    #[serde(skip_serializing_if = "Option::is_none")]
    range_end: Option<Bytes>,
    target: &'static str,
    result: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<Bytes>,
}

impl Compare {
    /// There is such a key.
    pub(super) fn exists(key: String) -> Self {
        Self::version(key, None, "GREATER")
    }

    /// There is no key from `key` up to and without `end`.
    pub(super) fn none_in((key, end): (String, String)) -> Self {
        Self::version(key, Some(Bytes(end)), "EQUAL")
    }

    /// The key has this value.
    pub(super) fn value(key: String, value: String) -> Self {
        let value = Some(Bytes(value));
        Self { key: Bytes(key), range_end: None, target: "VALUE", result: "EQUAL", version: None, value }
    }

    fn version(key: String, range_end: Option<Bytes>, result: &'static str) -> Self {
        Self { key: Bytes(key), range_end, target: "VERSION", result, version: Some("0"), value: None }
    }
}

/// What a transaction does.
#[derive(Debug, Serialize)]
pub(super) enum Op {
    /// Reads keys. Never from a member that may be behind (`serializable` is left out).
    #[serde(rename = "request_range")]
    Range {
        key: Bytes,
        #[serde(skip_serializing_if = "Option::is_none")]
        range_end: Option<Bytes>,
        keys_only: bool,
    },
    #[serde(rename = "request_put")]
    Put { key: Bytes, value: Bytes },
    #[serde(rename = "request_delete_range")]
    Delete { key: Bytes, range_end: Bytes },
}

impl Op {
    pub(super) fn get(key: String) -> Self {
        Self::Range { key: Bytes(key), range_end: None, keys_only: false }
    }

    pub(super) fn range((key, end): (String, String)) -> Self {
        Self::Range { key: Bytes(key), range_end: Some(Bytes(end)), keys_only: false }
    }

    pub(super) fn names((key, end): (String, String)) -> Self {
        Self::Range { key: Bytes(key), range_end: Some(Bytes(end)), keys_only: true }
    }

    pub(super) fn put(key: String, value: String) -> Self {
        Self::Put { key: Bytes(key), value: Bytes(value) }
    }

    pub(super) fn delete((key, end): (String, String)) -> Self {
        Self::Delete { key: Bytes(key), range_end: Bytes(end) }
    }
}

/// One step that happens whole or not at all: `success` if all of `compare` holds, else `failure`.
#[derive(Debug, Default, Serialize)]
pub(super) struct Txn {
    pub(super) compare: Vec<Compare>,
    pub(super) success: Vec<Op>,
    pub(super) failure: Vec<Op>,
}

#[derive(Debug, Deserialize)]
struct Header {
    revision: String,
}

#[derive(Debug, Deserialize)]
struct Pair {
    key: String,
    #[serde(default)]
    value: String,
}

#[derive(Debug, Default, Deserialize)]
struct Range {
    #[serde(default)]
    kvs: Vec<Pair>,
}

#[derive(Debug, Deserialize)]
struct OpAnswer {
    response_range: Option<Range>,
}

/// The answer to a transaction.
#[derive(Debug, Deserialize)]
pub(super) struct TxnAnswer {
    header: Header,
    /// Whether the conditions held.
    #[serde(default)]
    pub(super) succeeded: bool,
    #[serde(default)]
    responses: Vec<OpAnswer>,
}

impl TxnAnswer {
    /// The number of the cluster's last change. It only grows.
    pub(super) fn revision(&self) -> Option<u64> {
        self.header.revision.parse().ok()
    }

    /// Keys and values that the operation at this place has found; `None` if it is no such operation or not
    /// understood.
    pub(super) fn found(&self, place: usize) -> Option<Vec<(String, String)>> {
        let range = self.responses.get(place)?.response_range.as_ref()?;
        range.kvs.iter().map(|pair| Some((text(&pair.key)?, text(&pair.value)?))).collect()
    }
}

/// Only text is written, so anything else is damage: it stays visible as such.
fn text(base64: &str) -> Option<String> {
    Some(String::from_utf8_lossy(&STANDARD.decode(base64).ok()?).into_owned())
}

/// A refusal.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Refused {
    #[serde(default)]
    pub(super) message: String,
    /// Of gRPC.
    #[serde(default)]
    pub(super) code: u32,
}

/// Asks for a token.
#[derive(Debug, Serialize)]
pub(super) struct Authenticate<'a> {
    pub(super) name: &'a str,
    pub(super) password: &'a str,
}

/// A token, to be sent with every request.
#[derive(Debug, Deserialize)]
pub(super) struct Authenticated {
    pub(super) token: String,
}
