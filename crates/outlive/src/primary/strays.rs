//! How strays follow the guest to its standby: by the sentinel when this process dies, and by this process when the VM is
//! handed over. See [`strays`](crate::strays).

use std::io;
use std::sync::Arc;

use outlive_epoch::StrayKey;

use super::coordinator::Coordinator;
use crate::sentinel::{self, Guarded};
use crate::strays::{Following, Strays};

/// Strays that follow as soon as this process dies.
pub(super) struct GuardedStrays {
    strays: Arc<Strays>,
    _guarded: Option<Guarded>,
}

impl Coordinator {
    /// From now on strays follow the guest to the standby at this address, which has named the key.
    pub(super) fn guard_strays(&self, standby: &str, key: StrayKey) -> Option<GuardedStrays> {
        let net = self.with.machine.net()?;
        let standby = standby.parse().map_err(io::Error::other);
        let made = standby.and_then(|standby| Ok(Strays::new(net.tap_again()?, net.mac(), standby, key)));
        let strays =
            made.inspect_err(|error| tracing::warn!(%error, "strays will not follow the guest")).ok()?;
        Some(GuardedStrays { _guarded: sentinel::guard_strays(&strays), strays })
    }

    /// The guest stands still here, and its standby has it: strays follow it from now on.
    pub(super) fn send_strays_after(&self) -> Option<Following> {
        let guarded = self.protection.as_ref()?.strays.as_ref()?;
        let following = guarded.strays.follow();
        following.inspect_err(|error| tracing::warn!(%error, "strays do not follow the guest")).ok()?
    }
}
