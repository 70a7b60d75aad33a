//! How fast the host's storage confirms what is written: each claim and each journal waits for that.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::Finding;

/// Where images and the node's notes are, and what is asked instead where that is missing.
const PLACES: [&str; 3] = ["/var/lib/outlive", "/var/lib", "/var/tmp"];
const ROUNDS: usize = 15;
/// Slower than a disk with moving parts.
const SLOW: Duration = Duration::from_millis(30);

/// With how long a write takes. `None` where this user may write nowhere, or the file system has no files without a name.
pub(super) fn finding() -> Option<(Finding, Duration)> {
    PLACES.iter().find_map(|place| {
        let took = median(Path::new(place)).ok()?;
        Some((judge(place, took), took))
    })
}

fn judge(place: &str, took: Duration) -> Finding {
    const NAME: &str = "storage";
    let found = format!("{place} confirms a write in {:.1} ms", took.as_secs_f64() * 1e3);
    if took < SLOW {
        return Finding::ok(NAME, found);
    }
    Finding::warning(
        NAME,
        found,
        "keep images, and an arbiter's directory, on an SSD or behind a cache with a battery",
    )
}

/// The file has no name, so nothing of it is left.
fn median(place: &Path) -> io::Result<Duration> {
    let mut file = File::options().write(true).custom_flags(libc::O_TMPFILE).open(place)?;
    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let began = Instant::now();
        file.write_all(&[1; 4096])?;
        file.sync_data()?;
        times.push(began.elapsed());
    }
    times.sort_unstable();
    Ok(times[ROUNDS / 2])
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn a_slow_disk_is_warned_of() {
        assert_eq!(judge("/x", Duration::from_millis(3)).state, State::Ok);
        let slow = judge("/x", Duration::from_millis(45));
        assert!(slow.state == State::Warning && slow.found.contains("45.0 ms"), "{slow:?}");
    }

    #[test]
    fn a_look_leaves_no_file() {
        let there = tempfile::tempdir_in("/var/tmp").unwrap();
        match median(there.path()) {
            Ok(took) => assert!(took > Duration::ZERO),
            Err(why) => println!("skipped: no files without a name in /var/tmp: {why}"),
        }
        assert_eq!(std::fs::read_dir(there.path()).unwrap().count(), 0);
    }
}
