//! `cargo xtask nested`: hosts with stock Debian kernels in QEMU's software emulation, where KVM works
//! through AMD's nested paging, so that tests see kernels and processors that this machine does not have.

#[allow(dead_code, reason = "the proofs on hosts use it")]
mod background;
#[allow(dead_code, reason = "the proofs on hosts use it")]
mod cluster;
pub(crate) mod debian;
mod dirty;
mod host;
mod image;
mod initramfs;
mod kernel;
mod modules;
#[allow(dead_code, reason = "the proofs on hosts use it")]
mod network;
mod programs;
mod proof;
mod share;
mod shell;
mod survive;

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
    /// Run the tests with whole VMs on an emulated host, also on a machine without `/dev/kvm`
    #[command(after_help = survive::EXAMPLES)]
    Survive(survive::SurviveOptions),
    /// Get a prompt on hosts that see each other, with everything needed to protect a Linux guest
    #[command(after_help = shell::EXAMPLES)]
    Shell(shell::ShellOptions),
    /// Cut the power of hosts that run Linux guests, and check that nothing is lost
    #[command(after_help = proof::EXAMPLES)]
    Prove(proof::ProofOptions),
    /// Watch a Debian guest with Redis on two emulated hosts, one of which loses its power (`outlive demo
    /// --nested`)
    Demo,
    /// Build the guest images, and print where they are
    Images,
}

/// Fetches the kernel for tests that start a host themselves and, with `images`, the images of the guests. If
/// that fails, the tests and proofs say what is missing.
pub(crate) fn prepare(workspace: &Workspace, fetch: bool, images: bool) {
    if let Err(error) = kernel::Kernel::get(workspace, kernel::Series::Bookworm, fetch) {
        eprintln!("xtask: {error}");
    }
    if images && let Err(error) = image::GuestImage::get(workspace, fetch) {
        eprintln!("xtask: {error}");
    }
}

/// The part that `cargo xtask test` runs.
pub(crate) fn in_tests(
    workspace: &Workspace,
    fetch: bool,
    all: bool,
    summary: &mut Summary,
) -> Result<(), StepError> {
    if all {
        dirty::in_tests(workspace, fetch, summary)?;
    }
    proof::in_tests(workspace, fetch, all, summary)
}

pub(crate) fn run(workspace: &Workspace, options: &NestedOptions) -> Result<(), StepError> {
    match &options.what {
        What::Dirty(options) => dirty::run(workspace, options),
        What::Survive(options) => survive::run(workspace, options),
        What::Shell(options) => shell::run(workspace, options),
        What::Demo => proof::demo(workspace),
        What::Prove(options) => proof::run(workspace, options),
        What::Images => {
            let image = image::GuestImage::get(workspace, true);
            let image = image.map_err(|error| shell::step_error(error.into()))?;
            println!("{}", image.path("").display());
            Ok(())
        }
    }
}
