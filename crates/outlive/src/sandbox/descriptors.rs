//! Descriptors that somebody has left open when this process was started.

use std::fs;
use std::os::fd::RawFd;

use nix::unistd::close;

/// Closes everything but standard input, output and error, and what the command line names as `/dev/fd/N` or
/// `/proc/self/fd/N`. Call it before this process opens anything. A descriptor is a right that no later step takes
/// away.
pub(super) fn close_inherited() {
    let named: Vec<RawFd> = std::env::args_os().flat_map(|it| named_in(&it.to_string_lossy())).collect();
    let open: Vec<RawFd> = fs::read_dir("/proc/self/fd")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    for fd in open.into_iter().filter(|fd| *fd > 2 && !named.contains(fd)) {
        // The one that the folder itself was read by is closed already.
        let _ = close(fd);
    }
}

/// The numbers of descriptors in an argument.
fn named_in(argument: &str) -> Vec<RawFd> {
    let after = ["/dev/fd/", "/proc/self/fd/"].into_iter().flat_map(|it| argument.split(it).skip(1));
    let number = |text: &str| text.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok();
    after.filter_map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_found_in_options() {
        assert_eq!(named_in("--events=/dev/fd/17"), [17]);
        assert_eq!(named_in("path=/proc/self/fd/3,readonly"), [3]);
        assert_eq!(named_in("/dev/fd/"), [] as [RawFd; 0]);
        assert_eq!(named_in("/srv/fd/4"), [] as [RawFd; 0]);
    }
}
