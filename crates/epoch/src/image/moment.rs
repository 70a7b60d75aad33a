//! A moment in the life of a VM.

/// The end of a committed checkpoint: what a VM's memory was then. Within one VM no two moments have the same
/// numbers, because one host has a generation, and it counts its checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Moment {
    /// The generation in which the checkpoint was captured.
    pub generation: u64,
    /// Its number.
    pub checkpoint: u64,
}
