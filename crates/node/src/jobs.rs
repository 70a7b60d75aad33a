//! Long work: each job has a thread, a state that can be asked for, and a result.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::api::ErrorBody;
use crate::error::NodeError;
use crate::feed::Feed;
use crate::view::now;

/// How many jobs are under way at a time.
pub(crate) const MOST: usize = 32;
/// How many jobs that have ended are remembered.
const KEPT: usize = 200;

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    Start,
    Stop,
    HandOver,
    Drain,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum JobState {
    Running,
    Succeeded,
    Failed,
    Cancelled,
}

/// Steps of a job.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// Steps that are done.
    pub(crate) done: u32,
    /// All steps.
    pub(crate) total: u32,
    /// What is being done.
    pub(crate) now: String,
}

/// A job, as the API tells it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) id: String,
    pub(crate) kind: Kind,
    /// The VM; `null` for the whole host.
    pub(crate) vm: Option<String>,
    pub(crate) state: JobState,
    pub(crate) progress: Progress,
    pub(crate) can_cancel: bool,
    pub(crate) began: String,
    pub(crate) ended: Option<String>,
    /// What was done and measured.
    pub(crate) result: Option<Value>,
    pub(crate) error: Option<ErrorBody>,
}

#[derive(Debug)]
struct Entry {
    job: Mutex<Job>,
    cancelled: AtomicBool,
}

/// All jobs of this node.
#[derive(Debug)]
pub(crate) struct Jobs {
    all: Mutex<(u64, VecDeque<Arc<Entry>>)>,
    feed: Arc<Feed>,
}

/// A job, seen by who does it.
#[derive(Clone, Debug)]
pub(crate) struct Work(Arc<Entry>);

impl Work {
    /// Says how far it is.
    pub(crate) fn at(&self, done: usize, total: usize, now: &str) {
        lock(&self.0.job).progress = Progress { done: done as u32, total: total as u32, now: now.to_owned() };
    }

    /// Whether it shall end.
    ///
    /// # Errors
    /// It shall.
    pub(crate) fn goes_on(&self) -> Result<(), NodeError> {
        if self.0.cancelled.load(Ordering::Relaxed) { Err(NodeError::Cancelled) } else { Ok(()) }
    }
}

impl Jobs {
    pub(crate) fn new(feed: Arc<Feed>) -> Self {
        Self { all: Mutex::default(), feed }
    }

    /// Begins a job on a thread of its own. Nothing may work on the same VM, and on a host that is drained only that.
    ///
    /// # Errors
    /// See [`NodeError`].
    pub(crate) fn begin(
        &self,
        (kind, vm): (Kind, Option<&str>),
        can_cancel: bool,
        work: impl FnOnce(&Work) -> Result<Value, NodeError> + Send + 'static,
    ) -> Result<Job, NodeError> {
        let mut all = lock(&self.all);
        let running =
            || all.1.iter().map(|it| lock(&it.job).clone()).filter(|it| it.state == JobState::Running);
        // A drained host is given orders about single VMs by the drain itself, which are no jobs.
        let meets = |job: &Job| vm.is_none() || job.vm.is_none() || job.vm.as_deref() == vm;
        if let Some(Job { id: job, vm, .. }) = running().find(meets) {
            let what = vm.map_or_else(|| "this host".to_owned(), |vm| format!("VM {vm}"));
            return Err(NodeError::Busy { what, job });
        }
        if running().count() >= MOST {
            return Err(NodeError::TooManyJobs(MOST));
        }
        all.0 += 1;
        let job = Job {
            id: format!("{}-{}", self.feed.life(), all.0),
            kind,
            vm: vm.map(str::to_owned),
            state: JobState::Running,
            progress: Progress::default(),
            can_cancel,
            began: now(),
            ended: None,
            result: None,
            error: None,
        };
        let entry = Arc::new(Entry { job: Mutex::new(job.clone()), cancelled: AtomicBool::new(false) });
        let (of_thread, feed) = (entry.clone(), self.feed.clone());
        thread::Builder::new()
            .name("job".into())
            .spawn(move || {
                let result = work(&Work(of_thread.clone()));
                conclude(&of_thread, result, &feed);
            })
            .map_err(|error| NodeError::System("cannot begin a job".into(), error))?;
        all.1.push_back(entry);
        if all.1.len() > KEPT + MOST
            && let Some(old) = all.1.iter().position(|it| lock(&it.job).state != JobState::Running)
        {
            all.1.remove(old);
        }
        Ok(job)
    }

    /// All jobs that are remembered, oldest first.
    pub(crate) fn list(&self) -> Vec<Job> {
        lock(&self.all).1.iter().map(|it| lock(&it.job).clone()).collect()
    }

    /// One job.
    ///
    /// # Errors
    /// There is none of this id.
    pub(crate) fn get(&self, id: &str) -> Result<Job, NodeError> {
        Ok(lock(&self.find(id)?.job).clone())
    }

    /// Asks a job to end before its next step.
    ///
    /// # Errors
    /// It cannot be cancelled, or there is none of this id.
    pub(crate) fn cancel(&self, id: &str) -> Result<Job, NodeError> {
        let entry = self.find(id)?;
        let job = lock(&entry.job).clone();
        if !job.can_cancel || job.state != JobState::Running {
            return Err(NodeError::CannotCancel(id.to_owned()));
        }
        entry.cancelled.store(true, Ordering::Relaxed);
        Ok(job)
    }

    fn find(&self, id: &str) -> Result<Arc<Entry>, NodeError> {
        let all = lock(&self.all);
        let found = all.1.iter().find(|it| lock(&it.job).id == id);
        found.cloned().ok_or_else(|| NodeError::NoSuchJob(id.to_owned()))
    }
}

fn conclude(entry: &Entry, result: Result<Value, NodeError>, feed: &Feed) {
    let mut job = lock(&entry.job);
    job.ended = Some(now());
    let said = match result {
        Ok(result) => {
            job.progress.done = job.progress.total;
            (job.state, job.result) = (JobState::Succeeded, Some(result));
            "has succeeded".to_owned()
        }
        Err(why) => {
            job.state =
                if matches!(why, NodeError::Cancelled) { JobState::Cancelled } else { JobState::Failed };
            job.error = Some(ErrorBody::of(&why));
            format!("has not succeeded: {why}")
        }
    };
    let (id, vm, kind, state) = (job.id.clone(), job.vm.clone(), job.kind, job.state);
    drop(job);
    feed.tell(
        "job",
        vm.as_deref(),
        format!("job {id} {said}"),
        json!({ "id": id, "kind": kind, "state": state }),
    );
}

fn lock<T>(it: &Mutex<T>) -> MutexGuard<'_, T> {
    it.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    fn wait(jobs: &Jobs, id: &str) -> Job {
        loop {
            let job = jobs.get(id).unwrap();
            if job.state != JobState::Running {
                return job;
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn one_job_for_each_vm_and_none_beside_that_of_the_host() {
        let jobs = Jobs::new(Arc::new(Feed::new()));
        let (go, goes) = channel::<()>();
        let work = move |work: &Work| {
            work.at(1, 3, "waiting");
            let _ = goes.recv();
            Ok(json!({ "took_ms": 1 }))
        };
        let first = jobs.begin((Kind::Start, Some("a")), false, work).unwrap();
        let refused = |of| jobs.begin((Kind::Stop, of), false, |_| Ok(Value::Null)).unwrap_err();
        assert!(matches!(refused(Some("a")), NodeError::Busy { job, .. } if job == first.id));
        assert!(matches!(refused(None), NodeError::Busy { .. }));
        let other =
            jobs.begin((Kind::Stop, Some("b")), false, |_| Err(NodeError::Said("no".into()))).unwrap();
        let other = wait(&jobs, &other.id);
        assert_eq!((other.state, other.error.unwrap().code.as_str()), (JobState::Failed, "failed"));
        assert!(matches!(jobs.cancel(&first.id), Err(NodeError::CannotCancel(_))));
        go.send(()).unwrap();
        let first = wait(&jobs, &first.id);
        assert_eq!((first.state, first.progress.done), (JobState::Succeeded, 3));
        assert!(matches!(jobs.get("x"), Err(NodeError::NoSuchJob(_))));
    }

    #[test]
    fn a_job_is_cancelled_between_steps_and_old_ones_are_forgotten() {
        let jobs = Jobs::new(Arc::new(Feed::new()));
        let work = |work: &Work| loop {
            work.goes_on()?;
            thread::sleep(Duration::from_millis(1));
        };
        let job = jobs.begin((Kind::Drain, None), true, work).unwrap();
        assert!(matches!(jobs.begin((Kind::Start, Some("a")), true, work), Err(NodeError::Busy { .. })));
        jobs.cancel(&job.id).unwrap();
        assert_eq!(wait(&jobs, &job.id).state, JobState::Cancelled);
        for _ in 0..KEPT + MOST {
            let job = jobs.begin((Kind::Start, Some("a")), true, |_| Ok(Value::Null)).unwrap();
            wait(&jobs, &job.id);
        }
        assert_eq!(jobs.list().len(), KEPT + MOST);
        jobs.get(&job.id).unwrap_err();
        let many: Vec<_> = (0..MOST)
            .map(|it| jobs.begin((Kind::Start, Some(&it.to_string())), true, work).unwrap())
            .collect();
        assert!(matches!(jobs.begin((Kind::Start, Some("z")), true, work), Err(NodeError::TooManyJobs(_))));
        many.iter().for_each(|job| drop(jobs.cancel(&job.id).unwrap()));
    }
}
