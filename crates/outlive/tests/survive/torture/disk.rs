//! The file systems of a pair of hosts: one for each host's image, sidecar and journal, and one for the
//! arbiter. Each has little room, and a FUSE server in front of it that can be slow or broken.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};

use crate::support::{Pace, Slow, Small, World};

/// Bytes of a block, as the guest's command `DISK` counts.
pub(super) const BLOCK: usize = 4096;
/// Blocks of an image.
pub(super) const BLOCKS: u64 = 1024;
/// Room for image, sidecar and a journal of 64 MiB.
const ROOM_MIB: u64 = 76;
/// Room for an arbiter.
const ARBITER_MIB: u64 = 4;

/// A file system with little room.
pub(super) struct Place {
    slow: Option<Slow>,
    small: Small,
}

impl Place {
    fn new(world: &World, name: &str, mib: u64) -> Place {
        let small = Small::mount(world.dir().join(format!("{name}-behind")), mib);
        let slow = Slow::mount(world.dir().join(name), small.path());
        Place { slow, small }
    }

    /// For a host, with an image of zeroes.
    pub(super) fn of_host(world: &World, letter: char) -> Place {
        let place = Place::new(world, &format!("disk-{letter}"), ROOM_MIB);
        // With all its room: an image with holes cannot be written on a full file system, which costs the
        // protection, and no host survives its own loss then.
        let image = File::create(place.image()).unwrap();
        fallocate(&image, FallocateFlags::empty(), 0, BLOCKS as i64 * BLOCK as i64).unwrap();
        place
    }

    /// For an arbiter, with the arbiter in it.
    pub(super) fn of_arbiter(world: &mut World) -> Place {
        let place = Place::new(world, "third", ARBITER_MIB);
        world.place_arbiter(place.path().join("arbiter"));
        place
    }

    /// Where hosts see it.
    pub(super) fn path(&self) -> &Path {
        self.slow.as_ref().map_or(self.small.path(), Slow::path)
    }

    pub(super) fn image(&self) -> PathBuf {
        self.path().join("image")
    }

    /// The image, as it is for those who wait for nothing.
    pub(super) fn image_behind(&self) -> PathBuf {
        self.small.path().join("image")
    }

    /// The generation in the image's sidecar.
    pub(super) fn generation(&self) -> Option<u64> {
        let sidecar = fs::read_to_string(self.small.path().join("image.outlive")).ok()?;
        sidecar.lines().find_map(|line| line.strip_prefix("generation = ")?.parse().ok())
    }

    /// Whether it can be slow.
    pub(super) fn can_be_slow(&self) -> bool {
        self.slow.is_some()
    }

    pub(super) fn set(&self, pace: Pace) {
        if let Some(slow) = &self.slow {
            slow.set(pace);
        }
    }

    pub(super) fn fill(&self) {
        self.small.fill();
    }

    pub(super) fn make_room(&self) {
        self.small.make_room();
    }
}
