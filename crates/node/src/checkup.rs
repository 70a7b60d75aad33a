//! Whether this host is fit for VMs: what `outlive check` says of it, for who asks at the API. The command is a process of
//! its own, which runs a VM for a moment: whatever becomes of it, the node goes on.

use std::process::Command;
use std::sync::{Mutex, TryLockError};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::error::NodeError;
use crate::node::Node;
use crate::short::{Hears, run};

/// How long the command may take. It needs a second, and some more for what does not answer.
const TAKES: Duration = Duration::from_secs(25);
/// For how long an answer is told again: whoever asks in a row costs nothing.
const FRESH: Duration = Duration::from_secs(5);

/// The last answer. It is locked while the command runs.
#[derive(Debug, Default)]
pub(crate) struct Checkup(Mutex<Option<(Instant, Value)>>);

impl Node {
    /// Checks this host, and the arbiters that its definitions name. One check at a time. It may take as long as the
    /// command.
    ///
    /// # Errors
    /// Somebody else has it checked, or the command has failed.
    pub(crate) fn check(&self) -> Result<Value, NodeError> {
        let mut last = match self.checkup.0.try_lock() {
            Ok(last) => last,
            Err(TryLockError::Poisoned(last)) => last.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(NodeError::BeingChecked),
        };
        if let Some((at, said)) = &*last
            && at.elapsed() < FRESH
        {
            return Ok(said.clone());
        }
        let mut command = Command::new(&self.program().path);
        command.args(["check", "--json", "--host", self.host(), "--vms"]).arg(&self.places().definitions);
        let failed = |error| NodeError::System("cannot run outlive check".into(), error);
        let (ended, said) = run(command, Hears::Output, TAKES).map_err(failed)?;
        if ended.is_none() {
            return Err(NodeError::Said(format!(
                "outlive check has not ended within {} s: run it on host {} to see where it stands still",
                TAKES.as_secs(),
                self.host()
            )));
        }
        // Its exit code is in what it says.
        let said: Value = serde_json::from_str(&said).map_err(|error| failed(error.into()))?;
        *last = Some((Instant::now(), said.clone()));
        Ok(said)
    }
}
