//! The two machines, one decision at a time. The simulator tests what they do together.

mod broken;
mod primary;
mod standby;

use std::time::Duration;

use outlive_pair::Timing;

fn ms(time: u64) -> Duration {
    Duration::from_millis(time)
}

/// Dead after 1 s: the primary's patience is 700 ms, heartbeats go every 125 ms.
fn timing() -> Timing {
    Timing::new(ms(1000))
}
