//! How much memory a VM can get: the smallest of what the kernel, the control groups and the process limits
//! leave.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::resource::{Resource, getrlimit};

use super::Finding;

/// With less, the default VM of 256 MiB and a standby on the same machine do not fit together.
const COMFORT: u64 = 768 << 20;
/// The smallest VM and what the program itself needs.
const LEAST: u64 = 64 << 20;

/// A limit of memory, and how many bytes it leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Room {
    bytes: u64,
    limit: String,
}

/// How many bytes of memory this process can still get, as far as the system reports it. `None` if it does
/// not.
pub fn available_memory_bytes() -> Option<u64> {
    room().map(|room| room.bytes)
}

pub(super) fn finding() -> Finding {
    const NAME: &str = "memory";
    let Some(Room { bytes, limit }) = room() else {
        return Finding::warning(NAME, "the system does not report how much is left", "mount /proc");
    };
    let found = format!("{} MiB available ({limit})", bytes >> 20);
    match bytes {
        COMFORT.. => Finding::ok(NAME, found),
        LEAST.. => {
            Finding::warning(NAME, found, "give VMs less than the default 256M with --memory, or free memory")
        }
        _ => Finding::error(NAME, found, "end other programs, or raise the limit that is named here"),
    }
}

fn room() -> Option<Room> {
    let read = |path: &Path| fs::read_to_string(path).ok();
    let address_space = getrlimit(Resource::RLIMIT_AS).ok().map(|(soft, _)| soft);
    let process = address_space.filter(|&bytes| bytes < u64::MAX >> 1).map(|bytes| {
        let used =
            read(Path::new("/proc/self/statm")).and_then(|text| first_number(&text)).unwrap_or(0) * 4096;
        Room { bytes: bytes.saturating_sub(used), limit: "the process limit, ulimit -v".to_string() }
    });
    let system = read(Path::new("/proc/meminfo")).and_then(|meminfo| {
        let strict = read(Path::new("/proc/sys/vm/overcommit_memory")).is_some_and(|text| text.trim() == "2");
        room_of_system(&meminfo, strict)
    });
    let groups = read(Path::new("/proc/self/cgroup")).and_then(|groups| room_of_groups(&groups, read));
    [system, groups, process].into_iter().flatten().min_by_key(|room| room.bytes)
}

/// What the kernel has left. With strict accounting, memory that was promised counts as used.
fn room_of_system(meminfo: &str, strict: bool) -> Option<Room> {
    let field = |name: &str| {
        let value = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        Some(first_number(value)? * 1024)
    };
    let available = field("MemAvailable")?;
    let promised = || Some(field("CommitLimit")?.saturating_sub(field("Committed_AS")?));
    match promised().filter(|&bytes| strict && bytes < available) {
        Some(bytes) => Some(Room { bytes, limit: "vm.overcommit_memory=2 allows no more".to_string() }),
        None => Some(Room { bytes: available, limit: "of the machine".to_string() }),
    }
}

/// What the control groups of this process leave: the tightest limit of its group and all groups above.
/// `groups` is the text of `/proc/self/cgroup`. Memory that only caches files counts as free.
fn room_of_groups(groups: &str, read: impl Fn(&Path) -> Option<String>) -> Option<Room> {
    let number = |path: PathBuf| read(&path).and_then(|text| first_number(&text));
    let of_group = |directory: &Path, limit: &str, usage: &str, cache: &str| {
        let limit_path = directory.join(limit);
        let most = number(limit_path.clone())?;
        let used = number(directory.join(usage))?;
        let statistics = read(&directory.join("memory.stat")).unwrap_or_default();
        let cached = statistics.lines().find_map(|line| first_number(line.strip_prefix(cache)?)).unwrap_or(0);
        let bytes = most.saturating_sub(used.saturating_sub(cached));
        Some(Room { bytes, limit: format!("control group limit {}", limit_path.display()) })
    };
    let mut tightest: Option<Room> = None;
    for line in groups.lines() {
        // `0::/path` for version 2, `7:memory:/path` for version 1.
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (root, limit, usage, cache) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file "),
            "memory" => (
                "/sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file ",
            ),
            _ => continue,
        };
        let own = Path::new(root).join(path.trim_start_matches('/'));
        let rooms = own
            .ancestors()
            .take_while(|directory| directory.starts_with(root))
            .filter_map(|directory| of_group(directory, limit, usage, cache));
        tightest = tightest.into_iter().chain(rooms).min_by_key(|room| room.bytes);
    }
    tightest
}

/// The number at the start of a text; `max` is no number.
fn first_number(text: &str) -> Option<u64> {
    text.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    const MEMINFO: &str = "MemTotal:       24600000 kB\nMemFree:         1000 kB\nMemAvailable:   2000 kB\n\
                           CommitLimit:    1500 kB\nCommitted_AS:    1000 kB\n";

    #[test]
    fn the_kernel_counts_promises_only_when_told_to() {
        assert_eq!(room_of_system(MEMINFO, false).unwrap().bytes, 2000 << 10);
        let strict = room_of_system(MEMINFO, true).unwrap();
        assert_eq!(strict.bytes, 500 << 10);
        assert!(strict.limit.contains("overcommit"));
        assert_eq!(room_of_system("MemTotal: 1 kB\n", false), None);
    }

    fn groups(own: &str, files: &[(&str, &str)]) -> Option<Room> {
        let files: HashMap<&str, &str> = files.iter().copied().collect();
        room_of_groups(own, |path| files.get(path.to_str()?).map(|text| (*text).to_string()))
    }

    #[test]
    fn the_tightest_group_counts_without_its_file_cache() {
        let files = [
            ("/sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("/sys/fs/cgroup/a/b/memory.current", "10\n"),
            ("/sys/fs/cgroup/a/memory.max", "1000\n"),
            ("/sys/fs/cgroup/a/memory.current", "900\n"),
            ("/sys/fs/cgroup/a/memory.stat", "anon 500\ninactive_file 300\nactive_file 7\n"),
        ];
        let room = groups("0::/a/b\n", &files).unwrap();
        assert_eq!(room.bytes, 400);
        assert_eq!(room.limit, "control group limit /sys/fs/cgroup/a/memory.max");
    }

    #[test]
    fn old_control_groups_are_understood_and_none_is_no_limit() {
        let files = [
            ("/sys/fs/cgroup/memory/x/memory.limit_in_bytes", "5000"),
            ("/sys/fs/cgroup/memory/x/memory.usage_in_bytes", "6000"),
            ("/sys/fs/cgroup/memory/x/memory.stat", "inactive_file 1\ntotal_inactive_file 2000\n"),
        ];
        let own = "12:cpu,cpuacct:/x\n7:memory:/x\n0::/\n";
        assert_eq!(groups(own, &files).unwrap().bytes, 1000);
        assert_eq!(groups("0::/\n", &[]), None);
        assert_eq!(groups("garbage\n", &[]), None);
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(available_memory_bytes().is_some_and(|bytes| bytes > 1 << 20));
    }
}
