//! What answers look like: JSON, and errors with a code and a remedy.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use crate::error::NodeError;

/// An error, for programs and for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What it is, for programs: one of a fixed list of words.
    pub code: String,
    /// What is wrong, in one line.
    pub message: String,
    /// What helps; empty if the message says it.
    pub remedy: String,
}

impl ErrorBody {
    pub(crate) fn of(error: &NodeError) -> Self {
        let (_, code, remedy) = error.parts();
        Self { code: code.to_owned(), message: error.to_string(), remedy: remedy.into_owned() }
    }
}

impl std::fmt::Display for ErrorBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, "; {}", self.remedy) }
    }
}

impl IntoResponse for NodeError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.parts().0).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        json(status, &ErrorBody::of(&self))
    }
}

/// An answer in JSON.
pub(super) fn json(status: StatusCode, body: &impl Serialize) -> Response {
    // Plain data: this cannot fail.
    let text = serde_json::to_vec(body).expect("an answer is plain data");
    (status, [(header::CONTENT_TYPE, "application/json")], text).into_response()
}
