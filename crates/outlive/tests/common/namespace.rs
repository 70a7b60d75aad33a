//! A network of a test's own.

use outlive::network::{EnterError, Namespace};

/// A namespace, or `None` after saying that the test cannot run.
pub(crate) fn namespace() -> Option<Namespace> {
    match Namespace::new() {
        Ok(namespace) => Some(namespace),
        Err(EnterError::Permission) => {
            println!("skipped: network namespaces need root");
            None
        }
        Err(other) => panic!("{other}"),
    }
}
