//! PostgreSQL in the guest under `pgbench`, with a client that knows which of its transactions were
//! acknowledged.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::clocks::Clocks;
use super::stage::{Guest, Stage};
use super::{Context, ProofError, ensure};
use crate::nested::image::GuestKernel;
use crate::nested::kernel::Series;
use crate::nested::network::Net;

/// Duration of load before, between and after power cuts.
const LOAD: Duration = Duration::from_secs(10);
/// Time for checks of the whole database, emulated twice.
const CHECK: Duration = Duration::from_secs(180);
/// Prints nothing if the database has noticed nothing.
const RECOVERIES: &str = "grep -i -E 'interrupted|not properly shut down|redo starts|recovery|PANIC|FATAL' \
                          /var/log/postgresql/postgresql-15-main.log || true";
const AMCHECK: &str =
    "/usr/lib/postgresql/15/bin/pg_amcheck --username postgres --heapallindexed --parent-check postgres";
/// The sums of pgbench's changes are the same in every table.
const SUMS: &str = "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(bbalance) FROM pgbench_branches), \
                    (SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT sum(delta) FROM pgbench_history), \
                    (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT sum(delta) FROM pgbench_history)";

pub(super) fn prove(context: &Context<'_>) -> Result<(), ProofError> {
    let mut stage = Stage::new(context.workspace, context.fetch, &[Series::Bookworm; 2])?;
    let guest = Guest::debian(GuestKernel::BookwormCloud, "postgres");
    let [_first, second] = stage.pair(&guest, "")?;

    let clocks = Clocks::watch(&stage)?;
    let load = Load::start(&stage)?;
    thread::sleep(LOAD);
    stage.cut(1, &second)?;
    thread::sleep(LOAD);
    stage.say("switching host 1 on again, to protect the guest anew");
    stage.cluster.switch_on(&[1])?;
    let third = stage.standby(1, None, &guest)?;
    stage.wait_until_protected(&second)?;
    thread::sleep(LOAD);
    stage.cut(2, &third)?;
    thread::sleep(LOAD);

    let acknowledged = load.end(&stage)?;
    look_for(&stage, acknowledged)?;
    clocks.check(&stage, 2)
}

/// Everything acknowledged is there, and the database is in order.
fn look_for(stage: &Stage, acknowledged: u64) -> Result<(), ProofError> {
    ensure(acknowledged > 50, || format!("only {acknowledged} transactions: too few to prove anything"))?;
    let query = |sql: &str| stage.in_guest(&format!("psql -U postgres -At -c \"{sql}\" postgres"), CHECK);
    // The transaction that was under way at the end may be there, too.
    let found = query(&format!("SELECT count(*) FROM acknowledged WHERE number < {acknowledged}"))?;
    ensure(found.trim() == acknowledged.to_string(), || {
        format!("of {acknowledged} acknowledged transactions {} are there", found.trim())
    })?;
    let sums = query(SUMS)?;
    ensure(sums.trim() == "t|t|t", || format!("the sums of pgbench's tables differ: {sums}"))?;
    let recoveries = stage.in_guest(RECOVERIES, CHECK)?;
    ensure(recoveries.is_empty(), || format!("the database has noticed something:\n{recoveries}"))?;
    let complaints = stage.in_guest(AMCHECK, CHECK)?;
    ensure(complaints.is_empty(), || format!("pg_amcheck says:\n{complaints}"))?;
    stage.say("the sums are right, the log has no recovery, pg_amcheck finds nothing");
    Ok(())
}

/// Two clients, one that makes load and one that counts.
pub(super) struct Load {
    benchmark: Child,
    stop: Arc<AtomicBool>,
    counter: Option<JoinHandle<io::Result<(u64, Duration)>>>,
}

impl Load {
    pub(super) fn start(stage: &Stage) -> Result<Load, ProofError> {
        let client = |source| ProofError::Client { what: "a client of PostgreSQL".into(), source };
        let host = Net::guest(1).to_string();
        let mut benchmark = stage.cluster.guest_client("pgbench");
        benchmark.args(["-h", &host, "-U", "postgres", "-n", "-c", "4", "-T", "100000", "postgres"]);
        let benchmark = benchmark.stdin(Stdio::null()).stdout(Stdio::null()).spawn().map_err(client)?;
        let mut counter = stage.cluster.guest_client("psql");
        counter.args(["-h", &host, "-U", "postgres", "-X", "-v", "ON_ERROR_STOP=1", "postgres"]);
        let (started, ready) = std::sync::mpsc::channel();
        let stop = Arc::new(AtomicBool::new(false));
        let stops = Arc::clone(&stop);
        // Started by a thread that lives just as long: the client is killed when the thread that started it
        // ends.
        let counter = thread::spawn(move || {
            let mut child = counter.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
            let _ = started.send(());
            let counted = count(&mut child, &stops);
            let _ = child.kill();
            let _ = child.wait();
            counted
        });
        // If this fails, the client has failed and says so at the end.
        let _ = ready.recv();
        Ok(Load { benchmark, stop, counter: Some(counter) })
    }

    /// Ends both; each has had one connection all the time. Returns how many transactions were acknowledged.
    pub(super) fn end(mut self, stage: &Stage) -> Result<u64, ProofError> {
        let client = |source| ProofError::Client { what: "a client of PostgreSQL".into(), source };
        let ended = self.benchmark.try_wait().map_err(client)?;
        ensure(ended.is_none(), || "pgbench has lost a connection".into())?;
        self.stop.store(true, Ordering::Relaxed);
        let counter = self.counter.take().expect("it is ended once");
        let (acknowledged, longest) = counter.join().expect("the client does not panic").map_err(client)?;
        stage.say(&format!(
            "{acknowledged} transactions acknowledged over one connection, longest wait {:.1} s; pgbench's go on",
            longest.as_secs_f64()
        ));
        Ok(acknowledged)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.benchmark.kill();
        let _ = self.benchmark.wait();
    }
}

/// One transaction after another: each begins when the previous one is acknowledged.
fn count(client: &mut Child, stop: &AtomicBool) -> io::Result<(u64, Duration)> {
    let (Some(mut input), Some(output)) = (client.stdin.take(), client.stdout.take()) else {
        return Err(io::ErrorKind::BrokenPipe.into());
    };
    let mut answers = BufReader::new(output).lines();
    let (mut acknowledged, mut longest) = (0_u64, Duration::ZERO);
    while !stop.load(Ordering::Relaxed) {
        let sent = Instant::now();
        writeln!(
            input,
            "INSERT INTO acknowledged VALUES ({acknowledged}, repeat(md5('{acknowledged}'), 8));"
        )?;
        match answers.next() {
            Some(answer) if answer.as_ref().is_ok_and(|it| it == "INSERT 0 1") => (),
            other => {
                return Err(io::Error::other(format!(
                    "after {acknowledged} transactions psql says {other:?}"
                )));
            }
        }
        longest = longest.max(sent.elapsed());
        acknowledged += 1;
    }
    Ok((acknowledged, longest))
}
