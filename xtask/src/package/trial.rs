//! The package on a clean system: a Debian of this machine's release in a directory, in namespaces of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::nested::debian::{KEYRING, MIRROR};
use crate::packages;
use crate::run::{StepError, Workspace, output, step};

/// What the trial uses besides the package.
const INCLUDED: &str = "adduser,bash-completion,man-db,procps";

/// Runs inside the clean system, as its root.
const SCRIPT: &str = include_str!("trial.sh");

/// What is outside of it: mounts and processes of its own, which end with it.
const ENTER: &str = r#"
mount -t proc proc "$1/proc"
mount -t tmpfs tmpfs "$1/run"
mount --bind /dev "$1/dev"
exec chroot "$1" /bin/sh /trial.sh
"#;

pub(super) fn run(workspace: &Workspace, deb: &Path, fetch: bool) -> Result<(), StepError> {
    if !packages::is_root() {
        return Err(StepError::Unusable(
            "--test needs root: it makes a system whose files are root's".into(),
        ));
    }
    let place = workspace.root.join("target/package");
    let clean = clean(workspace, &place, fetch)?;
    let root = place.join("root");
    remove(&root)?;
    fs::create_dir_all(&root).map_err(|source| StepError::File { path: root.clone(), source })?;
    step(Command::new("tar").arg("-xf").arg(&clean).arg("-C").arg(&root))?;
    let put =
        |path: PathBuf, done: std::io::Result<u64>| done.map_err(|source| StepError::File { path, source });
    put(deb.to_owned(), fs::copy(deb, root.join("outlive.deb")))?;
    let script = root.join("trial.sh");
    put(script.clone(), fs::write(&script, SCRIPT).map(|()| 0))?;
    let namespaces = ["--mount", "--pid", "--net", "--fork", "--kill-child", "--propagation", "private"];
    let mut trial = Command::new("unshare");
    trial.args(namespaces).args(["sh", "-euc", ENTER, "sh"]).arg(&root);
    trial.env("VERSION", env!("CARGO_PKG_VERSION")).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let ended = step(&mut trial);
    // What failed can be looked at.
    if ended.is_ok() {
        remove(&root)?;
    }
    ended
}

fn remove(directory: &Path) -> Result<(), StepError> {
    match fs::remove_dir_all(directory) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(StepError::File { path: directory.to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// An archive of the clean system, which is kept for the next time.
fn clean(workspace: &Workspace, place: &Path, fetch: bool) -> Result<PathBuf, StepError> {
    let release =
        output(Command::new("sh").args(["-c", ". /etc/os-release; printf %s \"$VERSION_CODENAME\""]));
    let release = release.filter(|it| !it.is_empty()).unwrap_or_else(|| "bookworm".into());
    let archive = place.join(format!("debian-{release}.tar"));
    if archive.exists() {
        return Ok(archive);
    }
    if !fetch {
        return Err(StepError::Unusable(format!(
            "there is no {}: leave --no-fetch out, and it is made",
            archive.display()
        )));
    }
    packages::provide(workspace, &[packages::BOOTSTRAP], true);
    let new = place.join("new.tar");
    let mut make = Command::new("mmdebstrap");
    make.args(["--variant=minbase", "--mode=root", &format!("--include={INCLUDED}"), &release]).arg(&new);
    step(make.arg(format!("deb [signed-by={KEYRING}] {} {release} main", MIRROR)))?;
    fs::rename(&new, &archive).map_err(|source| StepError::File { path: archive.clone(), source })?;
    Ok(archive)
}
