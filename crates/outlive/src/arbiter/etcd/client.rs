//! Requests to the members of an etcd cluster: each has a deadline, and every member is tried in turn.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use ureq::Agent;
use ureq::tls::TlsConfig;
use ureq::unversioned::transport::DefaultConnector;

use super::api::{Authenticate, Authenticated, Refused, Txn, TxnAnswer};
use super::fault::{EtcdFault, SecretError, is_unclear};
use super::renewal::{Password, Renewed};
use super::resolver::Names;
use super::spec::Spec;

/// How long a connection to a member may take.
const CONNECT: Duration = Duration::from_secs(1);
/// How long a member may take for everything. A cluster that chooses a new leader answers later; then the claim
/// is repeated.
const PATIENCE: Duration = Duration::from_secs(2);
/// The longest answer, in bytes: some ten thousand claims.
const LONGEST_ANSWER: u64 = 8 << 20;
/// A member that was not asked for this long is connected to anew. The arbiter is probed more often.
const IDLE: Duration = Duration::from_secs(30);

/// The members, and what was learned of them. All copies share it, and all arbiters of one place in this process are
/// copies: so a probe finds the member that answers, and keeps its connection, before a claim needs it.
#[derive(Clone)]
pub(super) struct Client {
    agents: Arc<Renewed>,
    members: Arc<[String]>,
    /// The member that answered last.
    first: Arc<AtomicUsize>,
    login: Option<Arc<Login>>,
    seen: Arc<Seen>,
}

struct Login {
    user: String,
    password: Password,
    token: Mutex<Option<String>>,
}

/// How far the cluster was.
#[derive(Default)]
struct Seen {
    revision: AtomicU64,
    /// How far it was before it once was behind that: it is not trusted again. 0 if it never was.
    before_it_forgot: AtomicU64,
}

/// Why a member gave no answer of use.
enum Trouble {
    /// Another one may do better.
    Next(String),
    /// The token is out of date.
    Token,
    Fault(EtcdFault),
}

impl Client {
    /// The client of this process for a cluster.
    ///
    /// # Errors
    /// A file that the options name cannot be used.
    pub(super) fn of(spec: &Spec) -> Result<Self, SecretError> {
        static KNOWN: Mutex<Vec<(Spec, Client)>> = Mutex::new(Vec::new());
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, client)) = known.iter().find(|(of, _)| of == spec) {
            return Ok(client.clone());
        }
        let client = Self::new(spec)?;
        known.push((spec.clone(), client.clone()));
        Ok(client)
    }

    /// A client that has asked nobody yet.
    fn new(spec: &Spec) -> Result<Self, SecretError> {
        let login = match (&spec.user, &spec.password_file) {
            (Some(user), Some(file)) => {
                // Found out now, not when it is needed.
                let password = Password::read(file)?;
                Some(Arc::new(Login { user: user.clone(), password, token: Mutex::new(None) }))
            }
            _ => None,
        };
        Ok(Self {
            agents: Arc::new(Renewed::load(spec, agent)?),
            members: spec.members.clone().into(),
            first: Arc::default(),
            login,
            seen: Arc::default(),
        })
    }

    /// Carries a transaction out. An error leaves open whether it was carried out.
    pub(super) fn txn(&self, txn: &Txn) -> Result<TxnAnswer, EtcdFault> {
        // What was seen before the question was sent; an answer that is older than that was forgotten.
        let before = self.seen.revision.load(Ordering::SeqCst);
        let answer: TxnAnswer = self.ask("/v3/kv/txn", txn)?;
        let now = answer.revision().ok_or_else(|| EtcdFault::NotEtcd("no revision".into()))?;
        if now < before {
            self.seen.before_it_forgot.fetch_max(before, Ordering::SeqCst);
        }
        match self.seen.before_it_forgot.load(Ordering::SeqCst) {
            0 => {}
            seen => return Err(EtcdFault::WentBack { seen, now }),
        }
        self.seen.revision.fetch_max(now, Ordering::SeqCst);
        Ok(answer)
    }

    fn ask<A: DeserializeOwned>(&self, path: &str, question: &impl Serialize) -> Result<A, EtcdFault> {
        let first = self.first.load(Ordering::Relaxed);
        let mut why: Vec<String> = Vec::new();
        for turn in 0..self.members.len() {
            let place = (first + turn) % self.members.len();
            let member = &self.members[place];
            match self.ask_member(member, path, question) {
                Ok(answer) => {
                    self.first.store(place, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(Trouble::Next(problem)) => why.push(format!("{member}: {problem}")),
                Err(Trouble::Token) => why.push(format!("{member}: its token is not accepted")),
                Err(Trouble::Fault(fault)) => return Err(fault),
            }
        }
        Err(EtcdFault::Unanswered(why.join("; ")))
    }

    fn ask_member<A: DeserializeOwned>(
        &self,
        member: &str,
        path: &str,
        question: &impl Serialize,
    ) -> Result<A, Trouble> {
        let Some(login) = &self.login else { return self.post(member, path, question, None) };
        let known = login.token.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(token) = known {
            match self.post(member, path, question, Some(&token)) {
                // Tokens end after some minutes.
                Err(Trouble::Token) => {}
                answered => return answered,
            }
        }
        let password = login.password.newest();
        let question_for_token = Authenticate { name: &login.user, password: &password };
        let Authenticated { token } =
            self.post(member, "/v3/auth/authenticate", &question_for_token, None)?;
        *login.token.lock().unwrap_or_else(PoisonError::into_inner) = Some(token.clone());
        self.post(member, path, question, Some(&token))
    }

    fn post<A: DeserializeOwned>(
        &self,
        member: &str,
        path: &str,
        question: &impl Serialize,
        token: Option<&str>,
    ) -> Result<A, Trouble> {
        let mut request = self.agents.newest().post(format!("{member}{path}"));
        if let Some(token) = token {
            request = request.header("Authorization", token);
        }
        let unclear = |error: ureq::Error| Trouble::Next(error.to_string());
        let mut response = request.send_json(question).map_err(unclear)?;
        let status = response.status();
        let body = response.body_mut().with_config().limit(LONGEST_ANSWER).read_to_vec().map_err(unclear)?;
        if status.is_success() {
            return serde_json::from_slice(&body)
                .map_err(|error| Trouble::Fault(EtcdFault::NotEtcd(error.to_string())));
        }
        let Ok(Refused { message, code }) = serde_json::from_slice(&body) else {
            return Err(Trouble::Next(format!("HTTP status {status}")));
        };
        let token_is_old = token.is_some() && (code == 16 || message.contains("auth store is old"));
        Err(if token_is_old {
            Trouble::Token
        } else if is_unclear(code) {
            Trouble::Next(message)
        } else {
            Trouble::Fault(EtcdFault::Refused { message, code })
        })
    }
}

/// Has no connection yet.
fn agent(tls: TlsConfig) -> Agent {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        // Whoever sits between must be named, not inherited.
        .proxy(None)
        .timeout_connect(Some(CONNECT))
        .timeout_global(Some(PATIENCE))
        .max_idle_age(IDLE)
        .tls_config(tls);
    Agent::with_parts(config.build(), DefaultConnector::default(), Names::default())
}
