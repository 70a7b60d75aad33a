//! What both sides make a VM of. `outlive run` starts one; a standby builds its copy and runs it after a
//! takeover. Neither uses the other's code, both use this.
//!
//! ```text
//! host.rs       what this host must have: memory, locked if asked for, and an uplink that is watched
//! tap.rs        the card's place in the host's network
//! guest.rs      what boots; boot_disk.rs the kernel of the guest's own disk, read again at each restart
//! options.rs    from the command line to the machine's options
//! introduce.rs  what a primary tells its standby about the VM; introduced.rs the machine that is made of it
//! following.rs  what a copy keeps of each checkpoint
//! disks.rs      the VM's disks by where their writes go
//! limits.rs     how much a checkpoint may carry
//! relay.rs      keeps a machine's events until it has a coordinator
//! remedy.rs     which option helps against an error of the machine
//! runs.rs       how a host tells another one which VM it runs
//! kept.rs       the memory and the tap of a VM that was handed over
//! launch.rs     a running machine with its identity, on its way to its coordinator
//! ```

mod boot_disk;
mod disks;
mod following;
mod guest;
mod host;
mod introduce;
mod introduced;
mod kept;
mod launch;
pub(crate) mod limits;
mod options;
mod relay;
mod remedy;
mod runs;
mod tap;

pub(crate) use boot_disk::{BootDiskError, BootReader, FromDisk};
pub(crate) use disks::{Disk, replicated, shared};
pub(crate) use following::{LastState, write_pages};
pub(crate) use guest::{Guest, GuestError, LoadError};
pub(crate) use host::{
    NoRandom, StagingTooLarge, UplinkError, VmMemoryError, check_memory, check_staging, lock_memory,
    warn_unfenced, watch_uplink,
};
pub(crate) use introduce::{IntroductionError, devices, fixed_queues, hello};
pub(crate) use introduced::{
    Board, CannotResume, Card, Fitting, NotHereError, UnknownDevices, as_introduced, check_host,
    check_layout, disks_of, machine,
};
pub(crate) use kept::{KeptVm, Shelf};
pub(crate) use launch::{End, Identity, Launch};
pub(crate) use options::{card, card_without_network, disk_options, mac_of};
pub(crate) use relay::{Relay, Stops};
pub(crate) use remedy::Remedied;
pub(crate) use runs::Runs;
pub(crate) use tap::{CardError, open_card, place_card};
