//! The arbiter in an etcd cluster: one transaction for each generation that is won.
//!
//! A claim is one transaction: if the arbiter is still the one that was opened, the VM has no claim of this
//! generation or a newer one, and the claim before it is there (or, for generation 1, the VM is unknown), the claim
//! is written; else everything about the VM is read. etcd carries transactions out one after the other, on a
//! majority of its members, so there is one winner, whichever members and hosts fail.
//!
//! An answer that is lost leaves open whether the claim was won. It is repeated, at the next member too; each
//! process has a random token, and a claim that holds it is ours. A repetition that arrives late, after others have
//! won newer generations or have removed this one, finds its conditions unmet.
//!
//! All reads are linearizable: etcd asks a majority before it answers. A cluster that forgets what it has confirmed
//! (restored from a snapshot) can let a generation be won twice; as far as a process can see it, by the cluster's
//! revision going back, it trusts the cluster no more.

mod api;
mod client;
mod fault;
mod keys;
mod renewal;
mod resolver;
mod spec;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use self::api::{Compare, Op, Txn, TxnAnswer};
use self::client::Client;
pub use self::fault::{EtcdFault, EtcdSpecError, SecretError};
use self::keys::Keys;
pub use self::spec::EtcdFormError;
pub(super) use self::spec::FORM;
use self::spec::Spec;
use super::record::{self, Marker};
use super::registry::Needs;
use super::{
    Arbiter, ArbiterError, ArbiterSpecError, Claim, Ending, Initialized, KEPT, Mode, Prober, VmId, Win,
    Winner, process_token, random_hex,
};

/// An arbiter in an etcd cluster.
#[derive(Clone)]
pub(super) struct EtcdArbiter {
    place: String,
    client: Client,
    keys: Keys,
    /// Distinguishes this process from all others, past ones included.
    process: &'static str,
    /// What the marker said when it was opened.
    identity: String,
}

/// Opens the arbiter of an `--arbiter` option.
pub(super) fn open(place: &str) -> Result<Box<dyn Arbiter>, ArbiterSpecError> {
    Ok(Box::new(EtcdArbiter::open(&Spec::parse(place).map_err(EtcdSpecError::from)?)?))
}

/// Whether it is written as one.
pub(super) fn read(place: &str) -> Result<(), ArbiterSpecError> {
    Spec::parse(place).map(drop).map_err(|error| EtcdSpecError::from(error).into())
}

/// The files that it names: who renews one most likely puts another one in its place.
pub(super) fn needs(place: &str) -> Needs {
    let Ok(Spec { ca, certificate, key, password_file, .. }) = Spec::parse(place) else {
        return Needs::default();
    };
    let renewed = [ca, certificate, key, password_file].into_iter().flatten().collect();
    Needs { renewed, ..Needs::default() }
}

/// Where its members are.
pub(super) fn servers(place: &str) -> Vec<String> {
    let members = Spec::parse(place).map(|spec| spec.members).unwrap_or_default();
    let address = |url: String| url.split_once("://").map(|(_, address)| address.to_owned());
    members.into_iter().filter_map(address).collect()
}

/// Makes the cluster of an `--arbiter` option an arbiter.
pub(super) fn init(place: &str) -> Result<(Box<dyn Arbiter>, Initialized), ArbiterSpecError> {
    let (arbiter, done) = EtcdArbiter::init(&Spec::parse(place).map_err(EtcdSpecError::from)?)?;
    Ok((Box::new(arbiter), done))
}

/// Everything about a VM at one moment.
struct View {
    /// Generations and their claims, oldest first.
    claims: Vec<(u64, String)>,
    /// Generations in which it ended.
    ends: Vec<(u64, String)>,
}

impl View {
    fn newest(&self) -> Option<u64> {
        self.claims.last().map(|(generation, _)| *generation)
    }

    fn ending(&self) -> Option<Ending> {
        let newest = self.newest()?;
        let (generation, text) = self.ends.iter().find(|(generation, _)| *generation == newest)?;
        let why = record::parse_ended(text)?.to_owned();
        Some(Ending { generation: *generation, why, at: time(text) })
    }
}

impl EtcdArbiter {
    fn open(spec: &Spec) -> Result<Self, EtcdSpecError> {
        let client = Client::of(spec)?;
        let unusable = |fault| EtcdSpecError::Unusable { place: spec.place.clone(), fault };
        let keys = Keys::below(&spec.prefix);
        let read = Txn { success: vec![Op::get(keys.marker())], ..Txn::default() };
        let answer = client.txn(&read).map_err(unusable)?;
        let marker = found(&answer, 0).map_err(unusable)?.pop();
        let identity = match marker.map(|(_, text)| Marker::parse(&text)) {
            Some(Some(Marker::Current(identity))) => identity,
            None => return Err(EtcdSpecError::NotArbiter { place: spec.place.clone() }),
            Some(_) => return Err(unusable(EtcdFault::DamagedMarker(keys.marker()))),
        };
        let process = process_token().map_err(EtcdSpecError::NoRandom)?;
        let arbiter = Self { place: spec.place.clone(), client, keys, process, identity };
        // A host that may only read here would look like a good standby until the moment when it has to win.
        arbiter.try_writing().map_err(unusable)?;
        Ok(arbiter)
    }

    fn init(spec: &Spec) -> Result<(Self, Initialized), EtcdSpecError> {
        let client = Client::of(spec)?;
        let unusable = |fault| EtcdSpecError::Unusable { place: spec.place.clone(), fault };
        let keys = Keys::below(&spec.prefix);
        let identity = random_hex().map_err(EtcdSpecError::NoRandom)?;
        let answer = client
            .txn(&Txn {
                compare: vec![Compare::none_in(keys.all())],
                success: vec![Op::put(keys.marker(), Marker::text(&identity))],
                failure: vec![Op::get(keys.marker()), Op::names(keys.all())],
            })
            .map_err(unusable)?;
        if answer.succeeded {
            return Ok((Self::open(spec)?, Initialized::Made));
        }
        if found(&answer, 0).map_err(unusable)?.is_empty() {
            let key = found(&answer, 1).map_err(unusable)?.pop().map(|(key, _)| key).unwrap_or_default();
            return Err(EtcdSpecError::NotEmpty { place: spec.place.clone(), key });
        }
        let arbiter = Self::open(spec)?;
        // An earlier attempt of this call, whose answer was lost, may have made it.
        let done = if arbiter.identity == identity { Initialized::Made } else { Initialized::Already };
        Ok((arbiter, done))
    }

    /// The condition of everything: this is still the arbiter that was opened.
    fn same(&self) -> Compare {
        Compare::value(self.keys.marker(), Marker::text(&self.identity))
    }

    /// What is asked for when a condition does not hold: why, and everything about the VM.
    fn look(&self, vm: &VmId) -> Vec<Op> {
        vec![Op::get(self.keys.marker()), Op::range(self.keys.vm(vm))]
    }

    /// Reads the answer to [`EtcdArbiter::look`].
    fn view(&self, vm: &VmId, answer: &TxnAnswer) -> Result<View, EtcdFault> {
        self.check_marker(answer)?;
        let pairs = found(answer, 1)?;
        let numbered = |number: &dyn Fn(&str) -> Option<u64>| {
            pairs.iter().filter_map(|(key, text)| Some((number(key)?, text.clone()))).collect()
        };
        // Keys come in their order.
        let mut view = View {
            claims: numbered(&|key| self.keys.parse_claim(vm, key)),
            ends: numbered(&|key| self.keys.parse_ended(vm, key)),
        };
        view.claims.sort_by_key(|(generation, _)| *generation);
        Ok(view)
    }

    /// Checks the marker in the first place of an answer.
    fn check_marker(&self, answer: &TxnAnswer) -> Result<(), EtcdFault> {
        match found(answer, 0)?.pop().map(|(_, text)| Marker::parse(&text)) {
            Some(Some(Marker::Current(found))) if found == self.identity => Ok(()),
            Some(Some(Marker::Current(found) | Marker::Old(found))) => {
                Err(EtcdFault::OtherArbiter { found, opened: self.identity.clone() })
            }
            Some(None) => Err(EtcdFault::DamagedMarker(self.keys.marker())),
            None => Err(EtcdFault::MarkerGone(self.keys.marker())),
        }
    }

    fn read(&self, vm: &VmId) -> Result<View, EtcdFault> {
        let answer = self.client.txn(&Txn { success: self.look(vm), ..Txn::default() })?;
        self.view(vm, &answer)
    }

    /// Changes something about a VM on conditions. Returns what is there instead if they do not hold.
    fn change(
        &self,
        vm: &VmId,
        conditions: Vec<Compare>,
        change: Vec<Op>,
    ) -> Result<Option<View>, EtcdFault> {
        let mut compare = vec![self.same()];
        compare.extend(conditions);
        let answer = self.client.txn(&Txn { compare, success: change, failure: self.look(vm) })?;
        if answer.succeeded { Ok(None) } else { self.view(vm, &answer).map(Some) }
    }

    fn try_claim(&self, vm: &VmId, generation: u64, owner: &str) -> Result<Claim, EtcdFault> {
        let mut conditions = vec![Compare::none_in(self.keys.claims_from(vm, generation))];
        if generation > 1 {
            conditions.push(Compare::exists(self.keys.claim(vm, generation - 1)));
        } else {
            conditions.push(Compare::none_in(self.keys.vm(vm)));
        }
        let text = record::claim_text_at(vm, generation, owner, self.process, now());
        let change = vec![Op::put(self.keys.claim(vm, generation), text)];
        match self.change(vm, conditions, change)? {
            None => Ok(Claim::Won),
            Some(view) => self.judge(vm, generation, owner, &view),
        }
    }

    /// Who owns a generation that could not be claimed. Nobody can tell who owns a damaged claim, so both sides
    /// wait for an operator.
    fn judge(&self, vm: &VmId, generation: u64, owner: &str, view: &View) -> Result<Claim, EtcdFault> {
        let damaged = |generation| EtcdFault::DamagedClaim(self.keys.claim(vm, generation));
        let text = view.claims.iter().find(|(number, _)| *number == generation);
        if let Some((_, text)) = text {
            let (winner, process) = record::parse_claim(text).ok_or_else(|| damaged(generation))?;
            let ours = process == self.process && winner == record::printable(owner);
            return Ok(if ours { Claim::Won } else { Claim::Lost { owner: winner.to_owned() } });
        }
        match view.claims.last() {
            Some((newest, text)) if *newest > generation => {
                let owner =
                    record::parse_claim(text).map_or_else(String::new, |(owner, _)| format!(", {owner}"));
                Ok(Claim::Lost { owner: format!("generation {newest}, which is newer{owner}") })
            }
            _ => Err(EtcdFault::LostClaims),
        }
    }

    fn try_writing(&self) -> Result<(), EtcdFault> {
        let answer = self.client.txn(&Txn {
            compare: vec![self.same()],
            success: vec![Op::put(self.keys.probe(), "This host can write here.\n".into())],
            failure: vec![Op::get(self.keys.marker())],
        })?;
        if answer.succeeded {
            return Ok(());
        }
        self.check_marker(&answer)
    }

    fn try_prune(&self, vm: &VmId, mode: Mode) -> Result<Vec<u64>, EtcdFault> {
        let view = self.read(vm)?;
        let kept = view.claims.len().saturating_sub(KEPT);
        let old: Vec<u64> = view.claims[..kept].iter().map(|(generation, _)| *generation).collect();
        let (Some(newest), Some((floor, _))) = (view.newest(), view.claims.get(kept)) else { return Ok(old) };
        let has_old_end = view.ends.iter().any(|(generation, _)| *generation < newest);
        if mode == Mode::Name || (old.is_empty() && !has_old_end) {
            return Ok(old);
        }
        // In one step, so that a claim without the one before it never shows. The newest claims stay, so none of
        // the removed generations can be won again.
        let conditions = vec![Compare::exists(self.keys.claim(vm, newest))];
        let change = vec![
            Op::delete(self.keys.claims_before(vm, *floor)),
            Op::delete(self.keys.ended_before(vm, newest)),
        ];
        self.change(vm, conditions, change)?;
        Ok(old)
    }

    fn try_forget(&self, vm: &VmId, age: Duration, mode: Mode) -> Result<bool, EtcdFault> {
        let Some(ending) = self.read(vm)?.ending() else { return Ok(false) };
        let ago = ending.at.and_then(|at| SystemTime::now().duration_since(at).ok());
        if ago.is_none_or(|ago| ago < age) {
            return Ok(false);
        }
        if mode == Mode::Name {
            return Ok(true);
        }
        let conditions = vec![
            Compare::exists(self.keys.ended(vm, ending.generation)),
            Compare::none_in(self.keys.claims_from(vm, ending.generation + 1)),
        ];
        Ok(self.change(vm, conditions, vec![Op::delete(self.keys.vm(vm))])?.is_none())
    }

    fn fails(&self, fault: EtcdFault) -> ArbiterError {
        ArbiterError::Etcd { place: self.place.clone(), fault }
    }
}

impl Arbiter for EtcdArbiter {
    fn claim(&mut self, vm: &VmId, generation: u64, owner: &str) -> Claim {
        self.try_claim(vm, generation, owner)
            .unwrap_or_else(|fault| Claim::Unreachable { why: self.fails(fault).to_string() })
    }

    fn highest(&mut self, vm: &VmId) -> Result<Option<u64>, ArbiterError> {
        self.read(vm).map(|view| view.newest()).map_err(|fault| self.fails(fault))
    }

    fn history(&mut self, vm: &VmId) -> Result<Vec<Win>, ArbiterError> {
        let view = self.read(vm).map_err(|fault| self.fails(fault))?;
        Ok(view.claims.iter().map(|(generation, text)| win(*generation, text)).collect())
    }

    fn ending(&mut self, vm: &VmId) -> Result<Option<Ending>, ArbiterError> {
        self.read(vm).map(|view| view.ending()).map_err(|fault| self.fails(fault))
    }

    fn note_end(&mut self, vm: &VmId, generation: u64, why: &str) -> Result<(), ArbiterError> {
        let text = record::ended_text_at(vm, generation, why, now());
        let view = self.read(vm).map_err(|fault| self.fails(fault))?;
        let claim = view.claims.into_iter().find(|(number, claim)| {
            *number == generation && record::parse_claim(claim).is_some_and(|(_, it)| it == self.process)
        });
        let Some((_, claim)) = claim else { return Err(self.fails(EtcdFault::NotWinner(generation))) };
        let conditions = vec![Compare::value(self.keys.claim(vm, generation), claim)];
        let noted = self.change(vm, conditions, vec![Op::put(self.keys.ended(vm, generation), text)]);
        match noted {
            Ok(None) => Ok(()),
            Ok(Some(_)) => Err(self.fails(EtcdFault::LostClaims)),
            Err(fault) => Err(self.fails(fault)),
        }
    }

    fn vms(&mut self) -> Result<Vec<VmId>, ArbiterError> {
        let ask =
            Txn { success: vec![Op::get(self.keys.marker()), Op::names(self.keys.vms())], ..Txn::default() };
        let names = self.client.txn(&ask).and_then(|answer| {
            self.check_marker(&answer)?;
            found(&answer, 1)
        });
        let names = names.map_err(|fault| self.fails(fault))?;
        let mut vms: Vec<VmId> = names.iter().filter_map(|(key, _)| self.keys.parse_vm(key)).collect();
        vms.sort_unstable();
        vms.dedup();
        Ok(vms)
    }

    fn prune(&mut self, vm: &VmId, mode: Mode) -> Result<Vec<u64>, ArbiterError> {
        self.try_prune(vm, mode).map_err(|fault| self.fails(fault))
    }

    fn forget(&mut self, vm: &VmId, age: Duration, mode: Mode) -> Result<bool, ArbiterError> {
        self.try_forget(vm, age, mode).map_err(|fault| self.fails(fault))
    }

    fn identity(&self) -> &str {
        &self.identity
    }

    fn prober(&self) -> Prober {
        let twin = self.clone();
        Box::new(move || twin.try_writing().map_err(|fault| twin.fails(fault)))
    }
}

fn found(answer: &TxnAnswer, place: usize) -> Result<Vec<(String, String)>, EtcdFault> {
    answer.found(place).ok_or_else(|| EtcdFault::NotEtcd("no keys in its answer".into()))
}

fn win(generation: u64, text: &str) -> Win {
    let winner = record::parse_claim(text)
        .map(|(owner, process)| Winner { owner: owner.to_owned(), process: process.to_owned() });
    Win { generation, winner, at: time(text) }
}

/// etcd keeps no times, so claims and ends have those of the hosts that wrote them: for people only.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn time(text: &str) -> Option<SystemTime> {
    UNIX_EPOCH.checked_add(Duration::from_secs(record::parse_at(text)?))
}
