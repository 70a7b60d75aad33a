//! `cargo xtask nested`: hosts with stock Debian kernels in QEMU's software emulation, where KVM works through AMD's
//! nested paging, so that tests see kernels and processors that this machine does not have.

mod dirty;
mod host;
mod initramfs;
mod kernel;

use clap::Subcommand;

use crate::run::{StepError, Workspace};
use crate::summary::Summary;

#[derive(clap::Args)]
pub(crate) struct NestedOptions {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Test dirty tracking on the kernel of each Debian release
    #[command(after_help = dirty::EXAMPLES)]
    Dirty(dirty::DirtyOptions),
}

/// What `cargo xtask test` runs of it.
pub(crate) fn in_tests(workspace: &Workspace, fetch: bool, summary: &mut Summary) -> Result<(), StepError> {
    dirty::in_tests(workspace, fetch, summary)
}

pub(crate) fn run(workspace: &Workspace, options: &NestedOptions) -> Result<(), StepError> {
    match &options.what {
        What::Dirty(options) => dirty::run(workspace, options),
    }
}
