//! The output of a VM's process: a file that the process appends to by itself, so that it needs no node, and that the
//! node keeps short.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::files;

/// Longer files are cut, in bytes.
pub(crate) const MOST: u64 = 8 << 20;

/// Opens the log for a process.
///
/// # Errors
/// The operating system's.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o640).open(path)
}

/// Where the older part goes.
pub(crate) fn older(path: &Path) -> PathBuf {
    let mut older = path.as_os_str().to_owned();
    older.push(".1");
    older.into()
}

/// Copies a log that is longer than `most` bytes to `.1`, and empties it. Its process goes on appending to the same
/// file; what it writes in between is lost.
///
/// # Errors
/// The operating system's. A log that cannot be copied is emptied all the same, because it must not fill the disk.
pub(crate) fn bound(path: &Path, most: u64) -> io::Result<()> {
    if fs::metadata(path).map_or(0, |it| it.len()) <= most {
        return Ok(());
    }
    let copied = fs::copy(path, older(path));
    OpenOptions::new().write(true).open(path)?.set_len(0)?;
    copied.map(drop)
}

/// The last `bytes` of a log, from the start of a line, and where that ends. Without a file it is empty.
///
/// # Errors
/// The operating system's.
pub(crate) fn tail(path: &Path, bytes: u64) -> io::Result<(String, u64)> {
    let mut file = match files::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((String::new(), 0)),
        file => file?,
    };
    let end = file.metadata()?.len();
    let from = end.saturating_sub(bytes);
    file.seek(SeekFrom::Start(from))?;
    let mut tail = Vec::new();
    file.take(end - from).read_to_end(&mut tail)?;
    // The log may have been cut since.
    let end = from + tail.len() as u64;
    if from > 0
        && let Some(line) = tail.iter().position(|byte| *byte == b'\n')
    {
        tail.drain(..=line);
    }
    Ok((String::from_utf8_lossy(&tail).into_owned(), end))
}

/// What a log has from byte `from` on, in whole lines and at most `most` bytes, and where that ends. Of a log that was cut
/// meanwhile it is the beginning.
///
/// # Errors
/// The operating system's.
pub(crate) fn after(path: &Path, from: u64, most: u64) -> io::Result<(String, u64)> {
    let mut file = match files::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((String::new(), 0)),
        file => file?,
    };
    let from = if file.metadata()?.len() < from { 0 } else { from };
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    match bytes.iter().rposition(|byte| *byte == b'\n') {
        Some(end) => bytes.truncate(end + 1),
        // Its line goes on. One that is longer than an answer is told in parts.
        None if (bytes.len() as u64) < most => bytes.clear(),
        None => {}
    }
    Ok((String::from_utf8_lossy(&bytes).into_owned(), from + bytes.len() as u64))
}

/// The longest line that is told elsewhere, in characters.
const LINE: usize = 400;

/// What a process has said last, behind the first `from` bytes of its log: its line for people, if it has one. A log that
/// was cut meanwhile counts from its beginning.
pub(crate) fn last_line(path: &Path, from: u64) -> Option<String> {
    let length = fs::metadata(path).ok()?.len();
    let own = if length < from { length } else { length - from };
    // With the end of the line before, because the first line that may be a part of one is left out.
    let (tail, _) = tail(path, own.min(16 << 10) + 1).ok()?;
    let lines = || tail.lines().rev().map(str::trim).filter(|line| !line.is_empty());
    let for_people = |line: &str| {
        let line = line.strip_prefix("outlive: ").or_else(|| line.strip_prefix("error: "));
        line.map(str::to_owned)
    };
    let line = lines().find_map(for_people).or_else(|| lines().next().map(str::to_owned))?;
    Some(if line.chars().count() > LINE { line.chars().take(LINE).collect::<String>() + "…" } else { line })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_last_line_is_the_process_s_own_and_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.log");
        let line = |text: &str, from| {
            fs::write(&path, text).unwrap();
            last_line(&path, from)
        };
        assert_eq!(last_line(&path, 0), None);
        assert_eq!(line("outlive: old\n", 13), None);
        assert_eq!(line("outlive: old\nnew\n\n", 13).as_deref(), Some("new"));
        assert_eq!(line("outlive: why; do it\nINFO more\n", 0).as_deref(), Some("why; do it"));
        assert_eq!(line("error: no such option\n\nUsage: x\n", 0).as_deref(), Some("no such option"));
        assert_eq!(line("short\n", 1000).as_deref(), Some("short"), "it was cut");
        assert_eq!(line(&"ä".repeat(5000), 0).unwrap().chars().count(), LINE + 1);
    }

    #[test]
    fn a_log_is_followed_in_whole_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.log");
        assert_eq!(after(&path, 7, 100).unwrap(), (String::new(), 0));
        fs::write(&path, "one\ntwo\nthr").unwrap();
        assert_eq!(after(&path, 4, 100).unwrap(), ("two\n".into(), 8));
        assert_eq!(after(&path, 8, 100).unwrap(), (String::new(), 8));
        assert_eq!(after(&path, 0, 5).unwrap(), ("one\n".into(), 4));
        assert_eq!(after(&path, 4, 2).unwrap(), ("tw".into(), 6));
        // It was cut, and begins anew.
        fs::write(&path, "new\n").unwrap();
        assert_eq!(after(&path, 8, 100).unwrap(), ("new\n".into(), 4));
    }

    #[test]
    fn a_log_stays_short_while_its_process_writes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.log");
        assert_eq!(tail(&path, 100).unwrap(), (String::new(), 0));
        bound(&path, 10).unwrap();
        let mut process = open(&path).unwrap();
        for number in 0..100 {
            writeln!(process, "line {number}").unwrap();
            bound(&path, 50).unwrap();
            assert!(fs::metadata(&path).unwrap().len() <= 50);
        }
        let both = fs::read_to_string(older(&path)).unwrap() + &fs::read_to_string(&path).unwrap();
        assert!(both.ends_with("line 98\nline 99\n") && both.starts_with("line "), "{both}");
        assert!(!both.contains('\0'));
        assert_eq!(tail(&path, 10).unwrap(), ("line 99\n".into(), fs::metadata(&path).unwrap().len()));
    }
}
