//! Debian packages of any release, fetched and unpacked below the target directory. The machine's own package
//! lists, settings and installed packages do not change.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::packages::{apt_get, debs, to_install};
use crate::run::{StepError, output, step};

pub(crate) const MIRROR: &str = "http://deb.debian.org/debian";
const SECURITY: &str = "http://deb.debian.org/debian-security";
/// The archive of suites that are no longer on the mirrors.
const ARCHIVE: &str = "http://archive.debian.org/debian";
const ARCHIVED_SECURITY: &str = "http://archive.debian.org/debian-security";
pub(crate) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Written last. The number grows when more is unpacked than before.
const COMPLETE: &str = "complete-2";

/// Why packages are missing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    /// apt-get has no key to verify Debian's packages.
    #[error(
        "no {KEYRING} here, to check Debian's packages with; to get it: apt-get install debian-archive-keyring"
    )]
    NoKeyring,
    /// A file could not be used.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// apt-get or dpkg-deb failed, and has said why.
    #[error("{0}; this needs apt-get, dpkg-deb and a way to {MIRROR}")]
    Step(#[from] StepError),
}

/// A release of Debian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Suite {
    /// With security updates.
    Stable(&'static str),
    /// A suite that may no longer be on the mirrors.
    Old(&'static str),
    /// Without security updates of its own.
    Unstable,
}

impl Suite {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Suite::Stable(name) | Suite::Old(name) => name,
            Suite::Unstable => "sid",
        }
    }

    /// Lists of sources, one of which has the suite.
    pub(crate) fn sources(self) -> Vec<String> {
        let suite = self.name();
        let line = |mirror: &str, suite: &str| format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n");
        let both = |mirror: &str, security: &str| {
            line(mirror, suite) + &line(security, &format!("{suite}-security"))
        };
        match self {
            Suite::Unstable => vec![line(MIRROR, suite)],
            // An old suite is on the mirrors for as long as its security updates are, or longer.
            Suite::Old(_) => vec![
                both(MIRROR, SECURITY),
                both(ARCHIVE, ARCHIVED_SECURITY),
                line(ARCHIVE, suite),
                line(MIRROR, suite),
            ],
            Suite::Stable(_) => vec![both(MIRROR, SECURITY), line(MIRROR, suite)],
        }
    }
}

/// Packages of a suite, unpacked in `directory/root`.
pub(crate) struct Packages<'a> {
    pub(crate) suite: Suite,
    pub(crate) directory: &'a Path,
    /// The packages that apt-get plans for.
    pub(crate) asked: &'a [&'a str],
    /// Beginnings of names: the packages of the plan that are unpacked.
    pub(crate) wanted: &'a [&'a str],
}

impl Packages<'_> {
    /// Whether they have been fetched.
    pub(crate) fn are_there(&self) -> bool {
        self.directory.join(COMPLETE).exists()
    }

    /// Fetches them as a whole: an unfinished download stays beside it and is thrown away the next time.
    pub(crate) fn fetch(&self) -> Result<(), FetchError> {
        if !Path::new(KEYRING).exists() {
            return Err(FetchError::NoKeyring);
        }
        let new = beside(self.directory, "-new");
        remove(&new)?;
        for part in ["lists/partial", "archives/partial", "debs", "root"] {
            make_directory(&new.join(part))?;
        }
        write(&new.join("status"), "")?;
        let mut fetched = Ok(());
        for sources in self.suite.sources() {
            write(&new.join("sources.list"), &sources)?;
            fetched = self.download(&new);
            if fetched.is_ok() {
                break;
            }
        }
        fetched?;
        for part in ["lists", "archives", "debs"] {
            remove(&new.join(part))?;
        }
        write(&new.join(COMPLETE), "")?;
        remove(self.directory)?;
        fs::rename(&new, self.directory).map_err(file_error(self.directory))
    }

    fn download(&self, new: &Path) -> Result<(), StepError> {
        step(apt(new).arg("--quiet").arg("update"))?;
        let mut simulate = apt(new);
        simulate.args(["--simulate", "install", "--no-install-recommends"]).args(self.asked);
        let plan =
            output(&mut simulate).ok_or_else(|| StepError::Failed("apt-get --simulate".to_string()))?;
        let wanted = |name: &&str| self.wanted.iter().any(|start| name.starts_with(start));
        let names: Vec<&str> = to_install(&plan).into_iter().filter(wanted).collect();
        let downloaded = new.join("debs");
        step(apt(new).arg("--quiet").arg("download").args(names).current_dir(&downloaded))?;
        for deb in debs(&downloaded)? {
            step(Command::new("dpkg-deb").arg("-x").arg(deb).arg(new.join("root")))?;
        }
        Ok(())
    }
}

/// apt-get with sources, lists and packages of its own.
fn apt(new: &Path) -> Command {
    let mut command = apt_get(&[]);
    let paths = [
        ("Dir::Etc::SourceList", "sources.list"),
        ("Dir::Etc::SourceParts", "none"),
        ("Dir::Etc::Preferences", "none"),
        ("Dir::Etc::PreferencesParts", "none"),
        ("Dir::State", ""),
        ("Dir::State::Lists", "lists"),
        ("Dir::State::Status", "status"),
        ("Dir::Cache", ""),
        ("Dir::Cache::Archives", "archives"),
    ];
    for (option, path) in paths {
        command.arg("-o").arg(format!("{option}={}", new.join(path).display()));
    }
    let settings = [
        "APT::Architecture=amd64",
        "APT::Architectures=amd64",
        "APT::Sandbox::User=root",
        "Acquire::Languages=none",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
        // Archived suites are no longer signed.
        "Acquire::Check-Valid-Until=false",
    ];
    for setting in settings {
        command.args(["-o", setting]);
    }
    command
}

/// The path with a suffix.
pub(crate) fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(end);
    name.into()
}

/// Removes a directory with its contents, if it exists.
pub(crate) fn remove(directory: &Path) -> Result<(), FetchError> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(file_error(directory)(error)),
        _ => Ok(()),
    }
}

pub(crate) fn make_directory(path: &Path) -> Result<(), FetchError> {
    fs::create_dir_all(path).map_err(file_error(path))
}

pub(crate) fn write(path: &Path, contents: impl AsRef<[u8]>) -> Result<(), FetchError> {
    fs::write(path, contents).map_err(file_error(path))
}

pub(crate) fn file_error(path: &Path) -> impl FnOnce(io::Error) -> FetchError {
    move |source| FetchError::File { path: path.to_path_buf(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_sources_are_signed() {
        for suite in [Suite::Stable("trixie"), Suite::Old("bullseye"), Suite::Unstable] {
            let signed = format!("deb [signed-by={KEYRING}] http://");
            for list in suite.sources() {
                assert!(
                    list.lines().all(|line| line.starts_with(&signed) && line.ends_with(" main")),
                    "{list}"
                );
                assert!(list.contains(suite.name()));
            }
        }
    }

    #[test]
    fn what_is_half_done_is_not_there() {
        let directory = std::env::temp_dir().join(format!("outlive-debian-{}", std::process::id()));
        let packages = Packages { suite: Suite::Unstable, directory: &directory, asked: &[], wanted: &[] };
        make_directory(&beside(&directory, "-new")).unwrap();
        assert!(!packages.are_there());
        make_directory(&directory).unwrap();
        write(&directory.join("complete"), "of an older version").unwrap();
        assert!(!packages.are_there());
        write(&directory.join(COMPLETE), "").unwrap();
        assert!(packages.are_there());
        for path in [&directory, &beside(&directory, "-new")] {
            remove(path).unwrap();
            remove(path).unwrap();
        }
    }
}
