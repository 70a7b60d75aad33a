//! Who may do what. At the socket of this host everybody may do everything; over the network a certificate decides.

use axum::extract::{FromRequest, Request};
use axum::http::{Method, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::routes::Body;
use crate::error::NodeError;
use crate::feed::Follower;
use crate::remote::{Access, Visitor};

/// Where a request comes from. One without it is refused.
#[derive(Clone, Debug)]
pub(crate) enum Caller {
    /// From the socket of this host: its file says who may connect.
    Here,
    /// From the network.
    There(Visitor),
}

impl Caller {
    /// Where there is room for it to follow the events.
    pub(super) fn follows(&self) -> Follower {
        match self {
            Self::Here => Follower::Here,
            Self::There(visitor) if visitor.access == Access::Everything => Follower::Operator,
            Self::There(_) => Follower::Host,
        }
    }
}

/// What a request needs. What is not known here needs everything, also a route that is new.
fn needs(method: &Method, uri: &Uri) -> Access {
    let of_vm = uri.path().strip_prefix("/v1/vms/").and_then(|rest| rest.split_once('/'));
    match *method {
        Method::GET | Method::HEAD => Access::Read,
        Method::POST if of_vm.is_some_and(|(_, what)| what == "hand-over") => Access::HandOver,
        _ => Access::Everything,
    }
}

/// Lets a request on its way, or answers it.
pub(super) async fn check(request: Request, next: Next) -> Response {
    let refused = match request.extensions().get::<Caller>() {
        Some(Caller::Here) => None,
        Some(Caller::There(visitor)) => judge(visitor, &request).err(),
        None => Some(forbidden(&request, "nobody", Access::Nothing)),
    };
    let Some(refused) = refused else { return next.run(request).await };
    // Whoever still sends a body when the connection is closed may not hear the answer.
    let Ok(_) = Body::from_request(request, &()).await;
    refused.into_response()
}

fn judge(visitor: &Visitor, request: &Request) -> Result<(), NodeError> {
    let (method, uri) = (request.method(), request.uri());
    let changes = needs(method, uri) > Access::Read;
    if needs(method, uri) > visitor.access {
        return Err(forbidden(request, &visitor.name, visitor.access));
    }
    if changes {
        tracing::info!("{}: {method} {}", visitor.name, uri.path());
    }
    Ok(())
}

pub(super) fn forbidden(request: &Request, who: &str, allowed: Access) -> NodeError {
    let what = format!("{} {}", request.method(), request.uri().path());
    NodeError::Forbidden { who: who.into(), what, allowed }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_new_needs_everything() {
        let needs = |method, path: &'static str| needs(&method, &Uri::from_static(path));
        for read in ["/v1/vms", "/v1/vms/web/log?after=7", "/v1/new", "/"] {
            assert_eq!(needs(Method::GET, read), Access::Read, "{read}");
        }
        assert_eq!(needs(Method::POST, "/v1/vms/web/hand-over"), Access::HandOver);
        for all in
            ["/v1/vms/web/start", "/v1/vms/hand-over", "/v1/vms/a/b/hand-over", "/v1/hand-over", "/new"]
        {
            assert_eq!(needs(Method::POST, all), Access::Everything, "{all}");
        }
        for method in [Method::PUT, Method::DELETE, Method::PATCH, Method::OPTIONS] {
            assert_eq!(needs(method, "/v1/vms/web/hand-over"), Access::Everything);
        }
    }
}
