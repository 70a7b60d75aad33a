//! Mistakes that the simulator plants to prove that it would find them. They exist in tests only.

/// A mistake, named after what the machine then does.
#[cfg(test)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Bug {
    ReleaseBeforeAck,
    NoHoldAtBaseFinal,
    SkipArbitration,
    LoserGoesOn,
    StaleAckReleases,
    SilenceByLastByte,
    BaseLossClaimsNothingAfterCapture,
    EndWithoutArbitration,
    AckWhilePartial,
    TakeOverWithoutWin,
    TakeOverBeforeApplied,
    ClaimBeforeSettled,
    ExitWhileApplying,
    TakeOverFromUnacknowledged,
    TakeOverAfterEnd,
    BaseAfterCommit,
    ClaimAfterLeave,
    DiffersAndClaims,
    ClaimsWhatIsGivenUp,
    ThrownAwayUnasked,
    GivenUpBeforePromise,
    GoesOnUnanswered,
    ClaimNeverRepeated,
    AckUntried,
    BeatsWithoutProgress,
    StampsWithoutProgress,
    AnyThreadClaims,
    LeaveBeforePromise,
    RightThrownAway,
    ClaimForgotten,
    CaptureForAnyLink,
    ClaimsWithinLease,
    HurriesWithinLease,
    LetsNobodyAhead,
    GivenToNobody,
    RunsOnWhileHandedOver,
    KeepsAnotherMoment,
    KnowsWritesTooLate,
    OffersWhatIsLost,
    HandedBackAtOnce,
    SameFaultHandedBack,
    GivenToTheCutOff,
    GivenToAStandbyThatLeaves,
    GivenAwayWhileEnding,
    ImpatientStandby,
    RepeatsUncommitted,
    RepeatsWhatHasLeft,
    GivesCommittedInput,
    // Mistakes of the drivers.
    ActionsReversed,
    ActsOnAttachedLink,
    FailureSwallowed,
    ReleaseWithoutDrain,
    DrainBeforeCommit,
    CommitAtCapture,
    CommitThroughEpoch,
    TicketOnNewLink,
    LeaseForgotten,
    WakeForgotten,
    ReleaseLate,
    // Mistakes of the valve.
    HeldUntold,
    // Mistakes of the arbiter and of a start from an image.
    TwoWinners,
    AnyArbiter,
    StaleImageStarts,
    EarlierClaimForgotten,
    CopyCountsAsOriginal,
    CopyKeepsProcesses,
    ForkEndsNothing,
    SupersededIgnored,
}

/// The mistake planted in one machine.
#[derive(Debug, Clone, Copy, Default)]
#[cfg_attr(test, derive(PartialEq, Eq, Hash))]
pub(crate) struct Planted(#[cfg(test)] pub(crate) Option<Bug>);

/// A function, so that lints do not take the answer for a constant.
#[cfg(not(test))]
pub(crate) fn none(_: Planted) -> bool {
    false
}

/// Whether a mistake is planted; always `false` outside of tests.
macro_rules! planted {
    ($planted:expr, $bug:ident) => {{
        #[cfg(test)]
        {
            $planted.0 == Some(crate::planted::Bug::$bug)
        }
        #[cfg(not(test))]
        {
            crate::planted::none($planted)
        }
    }};
}
pub(crate) use planted;
