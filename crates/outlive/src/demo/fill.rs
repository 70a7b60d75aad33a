//! Has the guest write to its memory, so that both hosts have all of it in use: what a kill costs may depend on that.

use std::net::SocketAddr;
use std::time::Duration;

use super::client::{ClientError, Connection};

/// The guest chooses pages at random: after so many writes for each page, one page of 20 has had none.
const WRITES_A_PAGE: u64 = 3;
const PAGE: u64 = 4096;
/// How long a connection and a reply may take.
const CONNECTS: Duration = Duration::from_secs(1);
const REPLIES: Duration = Duration::from_secs(30);

/// A guest that writes to its memory.
pub(super) struct Filling {
    connection: Connection,
    pages: u64,
}

impl Filling {
    /// Begins, once the guest answers.
    ///
    /// # Errors
    /// It does not answer, or does not know the load.
    pub(super) fn start(vm: SocketAddr) -> Result<Self, ClientError> {
        let mut connection = Connection::open(vm, CONNECTS, REPLIES)?;
        let pages = connection.work_number("max_pages")?;
        connection.work(pages)?;
        Ok(Self { connection, pages })
    }

    /// How many percent of the writes are done.
    ///
    /// # Errors
    /// It does not answer any more.
    pub(super) fn percent(&mut self) -> Result<u64, ClientError> {
        let due = (self.pages * WRITES_A_PAGE).max(1);
        Ok((self.connection.work_number("writes")? * 100 / due).min(100))
    }

    /// Ends it. Returns how many bytes the guest has written to, but for one page of 20.
    ///
    /// # Errors
    /// It does not answer any more.
    pub(super) fn finish(mut self) -> Result<u64, ClientError> {
        self.connection.rest()?;
        Ok(self.pages * PAGE)
    }
}
