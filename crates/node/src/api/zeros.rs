//! Bytes that mean nothing: how fast they come is how fast the way to this host is.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Bytes;
use hyper::body::{Body, Frame, SizeHint};

/// The most that one answer has, in bytes.
pub(super) const MOST: usize = 64 << 20;

static PIECE: [u8; 64 << 10] = [0; 64 << 10];

/// So many of them. None is made before the client has taken the ones before.
#[derive(Debug)]
pub(super) struct Zeros(pub(super) usize);

impl Body for Zeros {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let length = self.0.min(PIECE.len());
        if length == 0 {
            return Poll::Ready(None);
        }
        self.0 -= length;
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&PIECE[..length])))))
    }

    fn is_end_stream(&self) -> bool {
        self.0 == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0 as u64)
    }
}
