//! Whether a VM may go on with a disk image, by what stands beside the image and what the arbiter knows.
//!
//! An image remembers the generation in which it was written last and the processes that had it. That is all it knows
//! of itself: it may be a standby's copy, it may have been copied or restored, and the VM may have gone on elsewhere.
//! Here is what follows from that. Reading sidecars, asking the arbiter and telling people are the program's part.

use crate::planted::{Planted, planted};

/// What an image is in its generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageRole {
    /// The VM runs, or ran, on it.
    Primary,
    /// A standby's copy.
    Replica,
}

/// How a standby's copy ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageEnd {
    /// The VM ended in order, and this is its final state.
    Followed,
    /// The standby gave it up in order, and the VM went on without it.
    Released,
}

/// What an image knows of its VM's arbiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageArbiter<'a> {
    /// The VM has never had one, so no other host can have the VM.
    None,
    /// The arbiter with this identity.
    Id(&'a str),
    /// Unknown: the release that wrote it down did not say.
    Unsaid,
}

/// How a file differs from the one that was written down.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Differs {
    /// It is another file.
    #[error("it was copied, restored or made anew since")]
    File,
    /// It has lost its end. (It may have grown: that is how disks are enlarged.)
    #[error("it has {is} bytes and had {was}")]
    Shorter {
        /// Its length in bytes when it was written down.
        was: u64,
        /// Its length in bytes now.
        is: u64,
    },
}

/// A generation that a process has won, as the arbiter tells it. `P` tells processes apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Won<P> {
    /// The generation.
    pub generation: u64,
    /// Which process won it and, for people, who that is; `None` if the claim is damaged.
    pub winner: Option<(P, String)>,
}

/// What stands beside an image, and what is seen of the image itself.
#[derive(Clone, Copy, Debug)]
pub struct ImageFacts<'a, P> {
    /// The generation in which it was written last; 0 if none was ever won.
    pub generation: u64,
    /// What it was in that generation.
    pub role: ImageRole,
    /// How it ended, if it is a copy that has ended.
    pub end: Option<ImageEnd>,
    /// Its VM's arbiter.
    pub arbiter: ImageArbiter<'a>,
    /// The processes that had it: what they have won belongs to it.
    pub processes: &'a [P],
    /// How the file differs from the one that all this was written for; `None` as well if nobody can tell.
    pub differs: Option<&'a Differs>,
    /// The arbiter that is given is a person: a process that asks remembers nothing.
    pub by_hand: bool,
}

/// What speaks against starting a VM from an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Danger {
    /// The VM ran in a newer generation, elsewhere.
    Stale {
        /// That of the image.
        generation: u64,
        /// The newest one.
        newest: u64,
        /// Who won it, for people.
        owner: Option<String>,
    },
    /// The standby gave the image up, and the VM continued without it.
    Released {
        /// In which generation.
        generation: u64,
    },
    /// It is a copy as of the last commit.
    Replica {
        /// In which generation.
        generation: u64,
    },
    /// The image knows another arbiter than the one that was given.
    OtherArbiter {
        /// The identity of the image's.
        known: String,
        /// The identity of the other one.
        given: String,
    },
    /// The arbiter knows less of the VM than the image does.
    LostClaims {
        /// The generation of the image.
        generation: u64,
        /// The newest that the arbiter knows.
        highest: Option<u64>,
        /// The arbiter is a person, and remembers nothing.
        by_hand: bool,
    },
    /// The image knows an arbiter (perhaps not which), and none was given.
    NoArbiter {
        /// Its identity.
        known: Option<String>,
    },
    /// The image is not the file that its sidecar was written for.
    Moved(Differs),
    /// The image was another one of the VM's disks.
    OtherPlace {
        /// Its number as it was.
        was: u16,
        /// The number that is given to it.
        given: u16,
    },
    /// The VM had more disks.
    Missing {
        /// How many it had.
        had: u16,
        /// How many are given.
        given: usize,
    },
    /// The disk is shared, and the VM may run on it at another host.
    Elsewhere {
        /// The newest generation of the VM.
        generation: u64,
        /// Who won it, for people, if that is not the host that is written down.
        owner: Option<String>,
    },
}

impl Danger {
    /// Whether accepting it ends the VM and begins another one. A standby's copy continues its VM's line, like a
    /// takeover. So does an image that was moved, and disks in another order: an operator says that they are the VM's
    /// newest state. A shared disk has no older state. Everything else gives up a part of the line, or nobody can say
    /// whether it does.
    pub fn forks(&self) -> bool {
        !matches!(
            self,
            Self::Replica { .. }
                | Self::Moved(_)
                | Self::OtherPlace { .. }
                | Self::Missing { .. }
                | Self::Elsewhere { .. }
        )
    }
}

/// The standing of an image: whether its VM may go on with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageStanding {
    /// The generation of the image: the one written down, or the newest that its processes have won since.
    pub generation: u64,
    /// What the image is in that generation.
    pub role: ImageRole,
    /// The newest generation that the given arbiter knows of the image's VM, if it is the VM's.
    pub highest: Option<u64>,
    /// Everything that speaks against it.
    pub dangers: Vec<Danger>,
    /// Whether the processes that are written down had this very file. Otherwise their wins are another file's, also
    /// those that they have not won yet: whoever starts the VM from this one must not name them any more.
    pub had_by_processes: bool,
}

impl ImageStanding {
    /// The generation in which the VM goes on with this image.
    pub fn next(&self) -> u64 {
        self.generation + 1
    }

    /// The generation with which others could go on, to be won before another VM begins with this image; `None` if
    /// the arbiter cannot say.
    pub fn ending(&self) -> Option<u64> {
        self.highest.map(|highest| highest + 1)
    }
}

impl<P: PartialEq> ImageFacts<'_, P> {
    /// Judges the image. `given` is the identity of the arbiter that was given, and `history` what it knows of the
    /// image's VM, oldest first: it is asked only if it is the VM's.
    ///
    /// # Errors
    /// Those of `history`.
    pub fn judge<E>(
        &self,
        given: Option<&str>,
        history: impl FnOnce() -> Result<Vec<Won<P>>, E>,
    ) -> Result<ImageStanding, E> {
        self.judge_with(given, history, Planted::default())
    }

    pub(crate) fn judge_with<E>(
        &self,
        given: Option<&str>,
        history: impl FnOnce() -> Result<Vec<Won<P>>, E>,
        bug: Planted,
    ) -> Result<ImageStanding, E> {
        let moved = self.differs.filter(|_| !planted!(bug, CopyCountsAsOriginal));
        let had_by_processes = moved != Some(&Differs::File) || planted!(bug, CopyKeepsProcesses);
        let mut standing = ImageStanding {
            generation: self.generation,
            role: self.role,
            highest: None,
            dangers: moved.cloned().map(Danger::Moved).into_iter().collect(),
            had_by_processes,
        };
        let danger = match (self.arbiter, given) {
            (ImageArbiter::None, None) => None,
            (ImageArbiter::Id(id), None) => Some(Danger::NoArbiter { known: Some(id.to_owned()) }),
            (ImageArbiter::Unsaid, None) => Some(Danger::NoArbiter { known: None }),
            (ImageArbiter::Id(known), Some(given)) if known != given => {
                Some(Danger::OtherArbiter { known: known.to_owned(), given: given.to_owned() })
            }
            (_, Some(_)) => self.compare(&history()?, &mut standing, bug),
        };
        standing.dangers.extend(danger);
        if standing.role == ImageRole::Replica && self.end.is_none() {
            standing.dangers.push(Danger::Replica { generation: standing.generation });
        }
        Ok(standing)
    }

    /// Compares the image with what its VM's arbiter knows.
    fn compare(&self, history: &[Won<P>], standing: &mut ImageStanding, bug: Planted) -> Option<Danger> {
        let (newest, highest) = (history.last(), history.last().map(|won| won.generation));
        // A process that wins a generation keeps its images. It may have died before their sidecars said so.
        let own =
            |won: &&Won<P>| won.winner.as_ref().is_some_and(|(process, _)| self.processes.contains(process));
        let own = history.iter().rev().find(own).filter(|_| standing.had_by_processes);
        let own = own.map(|won| won.generation).filter(|won| *won > self.generation);
        if let Some(won) = own {
            (standing.generation, standing.role) = (won, ImageRole::Primary);
        }
        standing.highest = highest;
        let generation = standing.generation;
        match highest {
            Some(highest) if highest > generation => {
                if planted!(bug, StaleImageStarts) {
                    standing.generation = highest;
                    return None;
                }
                let owner = newest.and_then(|won| won.winner.as_ref()).map(|(_, owner)| owner.clone());
                Some(Danger::Stale { generation, newest: highest, owner })
            }
            Some(highest)
                if highest == generation && self.end == Some(ImageEnd::Released) && own.is_none() =>
            {
                Some(Danger::Released { generation })
            }
            Some(highest) if highest == generation => None,
            None if self.arbiter == ImageArbiter::None => None,
            _ => Some(Danger::LostClaims { generation, highest, by_hand: self.by_hand }),
        }
    }
}

/// What is written down of a disk that both hosts write to, and what is seen of it. There is one storage, so it is never
/// out of date: the question is whether the VM runs on it now, at another host.
#[derive(Clone, Copy, Debug)]
pub struct SharedFacts<'a, P> {
    /// The generation in which the VM ran on it last; 0 if none was ever won.
    pub generation: u64,
    /// The VM's arbiter.
    pub arbiter: ImageArbiter<'a>,
    /// The processes of one host that had it last: what they have won is that host's.
    pub processes: &'a [P],
    /// Whether the VM has ended in order since.
    pub over: bool,
    /// Whether that host is this one, so that nobody has the VM unless the arbiter knows of him: on this host, none of
    /// those processes lives.
    pub here: bool,
    /// The arbiter that is given is a person: a process that asks remembers nothing.
    pub by_hand: bool,
}

impl<P: PartialEq> SharedFacts<'_, P> {
    /// Judges the disk, as [`ImageFacts::judge`] does an image. The generation of the standing is the newest one.
    ///
    /// # Errors
    /// Those of `history`.
    pub fn judge<E>(
        &self,
        given: Option<&str>,
        history: impl FnOnce() -> Result<Vec<Won<P>>, E>,
    ) -> Result<ImageStanding, E> {
        let Self { generation, arbiter, processes, by_hand, .. } = *self;
        let (role, end, differs) = (ImageRole::Primary, None, None);
        let facts = ImageFacts { generation, role, end, arbiter, processes, differs, by_hand };
        let mut standing = facts.judge(given, history)?;
        for danger in &mut standing.dangers {
            if let Danger::Stale { newest, owner, .. } = danger {
                standing.generation = *newest;
                *danger = Danger::Elsewhere { generation: *newest, owner: owner.take() };
            }
        }
        // Whoever wins the next generation keeps every other host from it, but not from the writes that one makes until it
        // hears of that.
        if standing.dangers.is_empty() && !self.here && !self.over {
            standing.dangers.push(Danger::Elsewhere { generation: standing.generation, owner: None });
        }
        Ok(standing)
    }
}

/// The newest generation and who won it, if that is another process than `own`: whoever runs the VM asks now and then.
pub fn rival<P: PartialEq>(history: &[Won<P>], own: &P) -> Option<(u64, String)> {
    let Won { generation, winner } = history.last()?;
    let (_, owner) = winner.as_ref().filter(|(process, _)| process != own)?;
    Some((*generation, owner.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn won(generation: u64, process: u32) -> Won<u32> {
        Won { generation, winner: Some((process, format!("process {process}"))) }
    }

    const FACTS: ImageFacts<'static, u32> = ImageFacts {
        generation: 4,
        role: ImageRole::Primary,
        end: None,
        arbiter: ImageArbiter::Id("a"),
        processes: &[1, 2],
        differs: None,
        by_hand: false,
    };

    fn judge(facts: ImageFacts<'_, u32>, history: &[Won<u32>]) -> ImageStanding {
        facts.judge(Some("a"), || Ok::<_, ()>(history.to_vec())).unwrap()
    }

    #[test]
    fn what_its_processes_have_won_belongs_to_an_image() {
        let standing = judge(FACTS, &[won(4, 1), won(5, 2)]);
        assert_eq!((standing.generation, standing.next(), standing.ending()), (5, 6, Some(6)));
        assert!(standing.dangers.is_empty() && standing.had_by_processes);
    }

    /// They won it with the original.
    #[test]
    fn what_its_processes_have_won_does_not_belong_to_a_copy() {
        let (history, differs) = ([won(4, 1), won(5, 2)], Differs::File);
        let standing = judge(ImageFacts { differs: Some(&differs), ..FACTS }, &history);
        let stale = Danger::Stale { generation: 4, newest: 5, owner: Some("process 2".into()) };
        assert_eq!(standing.dangers, [Danger::Moved(Differs::File), stale]);
        assert!(!standing.had_by_processes);
        // A file that is only shorter is the same one.
        let differs = Differs::Shorter { was: 2, is: 1 };
        let standing = judge(ImageFacts { differs: Some(&differs), ..FACTS }, &history);
        assert_eq!((standing.generation, standing.dangers), (5, vec![Danger::Moved(differs)]));
    }

    const SHARED: SharedFacts<'static, u32> = SharedFacts {
        generation: 4,
        arbiter: ImageArbiter::Id("a"),
        processes: &[1, 2],
        over: false,
        here: false,
        by_hand: false,
    };

    fn judge_shared(facts: SharedFacts<'_, u32>, history: &[Won<u32>]) -> ImageStanding {
        facts.judge(Some("a"), || Ok::<_, ()>(history.to_vec())).unwrap()
    }

    #[test]
    fn a_shared_disk_is_started_from_where_nobody_else_can_have_its_vm() {
        let own = [won(4, 1), won(5, 2)];
        let (here, over) = (SharedFacts { here: true, ..SHARED }, SharedFacts { over: true, ..SHARED });
        for facts in [here, over] {
            let standing = judge_shared(facts, &own);
            assert!(standing.dangers.is_empty(), "{standing:?}");
            assert_eq!((standing.next(), standing.ending()), (6, Some(6)));
        }
        let elsewhere = |generation, owner: Option<&str>| {
            vec![Danger::Elsewhere { generation, owner: owner.map(str::to_owned) }]
        };
        // Another host had it, and may have it still.
        assert_eq!(judge_shared(SHARED, &own).dangers, elsewhere(5, None));
        // It was taken over since, also from a host on which it had ended in order before.
        for facts in [SHARED, here, over] {
            let standing = judge_shared(facts, &[won(4, 1), won(5, 7)]);
            assert_eq!(standing.dangers, elsewhere(5, Some("process 7")));
            assert_eq!(standing.next(), 6, "the storage is one");
            assert!(!standing.dangers.iter().any(Danger::forks));
        }
        // Without an arbiter nobody takes over, but another host may run it.
        let alone = SharedFacts { arbiter: ImageArbiter::None, generation: 0, ..SHARED };
        let judge = |facts: SharedFacts<'_, u32>| facts.judge(None, || Err(())).unwrap().dangers;
        assert_eq!(judge(alone), elsewhere(0, None));
        assert!(judge(SharedFacts { here: true, ..alone }).is_empty());
        // What nobody can say is as dangerous as for an image.
        assert!(matches!(
            here.judge::<()>(Some("b"), || Err(())).unwrap().dangers[..],
            [Danger::OtherArbiter { .. }]
        ));
        assert!(matches!(judge_shared(here, &[]).dangers[..], [Danger::LostClaims { .. }]));
    }

    #[test]
    fn only_another_process_is_a_rival() {
        assert_eq!(rival::<u32>(&[], &1), None);
        assert_eq!(rival(&[won(1, 2), won(2, 1)], &1), None);
        assert_eq!(rival(&[won(1, 1), won(2, 2)], &1), Some((2, "process 2".into())));
        assert_eq!(rival(&[won(1, 2), Won { generation: 2, winner: None }], &1), None, "nobody knows");
    }
}
