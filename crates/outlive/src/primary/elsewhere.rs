//! Asks the other hosts, before a VM starts here, whether they have it already.
//!
//! No start depends on their answer: the arbiter and the images say who may run a VM. But an operator who accepts a
//! danger overrules those, and a VM without an image is a new one whose name, and so often whose address, may be in use
//! at the other host.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use outlive_epoch::VmId;

use super::ask::{Answer, ask};
use crate::disk::Start;
use crate::link::Security;
use crate::vm::Runs;

/// How long a new VM waits for the answers of all hosts. A host that is down must not delay its start.
const BRIEFLY: Duration = Duration::from_secs(2);

/// Why a VM does not start here: another host has it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Elsewhere {
    /// It was to start with an accepted danger.
    #[error(
        "{options} would start a second VM: the host at {address} has this VM, or a copy of it ({why}); stop the VM or \
         the standby there first; or protect the VM that runs there: run `outlive standby` here. If that host has \
         nothing to do with this VM, leave --standby {address} out"
    )]
    Accepted { options: String, address: String, why: String },
    /// It is a new one, and there is one of this name.
    #[error(
        "the host at {address} runs a VM of the name {name} (id {id}, generation {generation}), and this would be a \
         second one, with the same address if the options are the same: to protect that VM, run `outlive standby` here; \
         for another VM give another --name and --standby"
    )]
    SameName { address: String, name: String, id: String, generation: u64 },
}

/// Refuses a start that other hosts speak against. See the module.
///
/// # Errors
/// See [`Elsewhere`].
pub(super) fn look(start: &Start, standbys: &[String], security: &Security) -> Result<(), Elsewhere> {
    if !start.accepted().is_empty() {
        return before_accepted(start, |address| ask(address, security), standbys);
    }
    if start.is_new() {
        return before_new(&start.provenance.name, standbys, security);
    }
    Ok(())
}

fn before_accepted(
    start: &Start,
    ask: impl Fn(&str) -> Answer,
    standbys: &[String],
) -> Result<(), Elsewhere> {
    let ids: Vec<String> = start.vms().map(|vm: VmId| vm.to_string()).collect();
    for address in standbys {
        let why = match ask(address) {
            Answer::Idle | Answer::Unreachable(_) => continue,
            Answer::Busy(why) | Answer::Unknown(why) => why,
        };
        // A host that has another VM says nothing about this one.
        let other = |runs: &Runs| runs.name != start.provenance.name && !ids.contains(&runs.id);
        if Runs::parse(&why).as_ref().is_some_and(other) {
            continue;
        }
        let options: Vec<&str> = start.accepted().iter().map(|it| it.danger.option()).collect();
        return Err(Elsewhere::Accepted { options: options.join(" "), address: address.clone(), why });
    }
    Ok(())
}

/// All hosts are asked at the same time. Whoever does not answer in time says nothing.
fn before_new(name: &str, standbys: &[String], security: &Security) -> Result<(), Elsewhere> {
    let deadline = Instant::now() + BRIEFLY;
    let (tell, answers) = channel();
    for address in standbys {
        let (tell, address, security) = (tell.clone(), address.clone(), security.clone());
        let started = outlive_machine::spawn("ask", move || {
            let answer = ask(&address, &security);
            tell.send((address, answer)).ok();
        });
        if let Err(error) = started {
            tracing::debug!(%error, "cannot ask another host");
        }
    }
    drop(tell);
    loop {
        match answers.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((address, Answer::Busy(why))) => {
                if let Some(Runs { name, id, generation }) = Runs::parse(&why).filter(|it| it.name == name) {
                    return Err(Elsewhere::SameName { address, name, id, generation });
                }
            }
            Ok(_) => {}
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// A host that takes the connection and never says anything, and one that is not there.
    #[test]
    fn a_host_that_does_not_answer_neither_refuses_nor_delays_a_new_vm() {
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let silent = [silent.local_addr().unwrap().to_string(), "192.0.2.1:7000".to_owned()];
        let began = Instant::now();
        before_new("vm", &silent, &Security::Open).unwrap();
        assert!(began.elapsed() < BRIEFLY + Duration::from_millis(500), "{:?}", began.elapsed());
    }
}
