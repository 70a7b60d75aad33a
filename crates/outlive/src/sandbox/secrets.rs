//! Private keys of CAs, which no process that runs a VM may read: whoever has one can be any host.
//!
//! A rule for a directory holds for everything below it, and Landlock cannot take a part of it out again. So a file
//! that needs no directory is given alone, and a directory that is needed is refused.

use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat};

use crate::keys;

/// Directories that are never given as a whole for the sake of one file: they have what is none of this process'
/// business, as definitions of other VMs.
const TOO_MUCH: [&str; 3] = ["/", "/etc", "/etc/outlive"];

/// A CA's private key is within reach of a rule.
#[derive(Debug, thiserror::Error)]
#[error(
    "{place} is needed as a whole, and the CA's private key {key} is below it: whoever breaks out of the guest could be \
     any host. Keep the VM's things, or the keys, in a directory of their own, or the CA off this host (docs/trust.md)"
)]
pub(crate) struct Exposed {
    place: String,
    key: String,
}

/// The private keys of CAs that are here.
#[derive(Clone, Debug, Default)]
pub(super) struct Secrets(Vec<PathBuf>);

impl Secrets {
    /// Those of the CA that belongs to this directory of keys, if it is here.
    pub(super) fn guard(&mut self, keys: &Path) {
        // What is not there cannot be read.
        self.0.extend(keys::ca_key(keys).canonicalize());
    }

    /// Where a file that is renewed by another one in its place is, and where it is in truth, if its name is that of a
    /// link: the directories, because a rule holds for a file and not for another one that gets its name.
    pub(super) fn places_of(&self, file: &Path) -> Vec<PathBuf> {
        let whole = |path: &Path| path.canonicalize().ok();
        let beside = match file.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let target = whole(file);
        let directories = [whole(beside), target.as_deref().and_then(Path::parent).map(Path::to_owned)];
        let place = |directory: Option<PathBuf>| {
            let too_much =
                |it: &Path| TOO_MUCH.iter().any(|much| it == Path::new(much)) || self.below(it).is_some();
            // What is not there is reported where it is needed.
            directory.filter(|it| !too_much(it)).unwrap_or_else(|| file.to_owned())
        };
        directories.map(place).into()
    }

    /// Looks whether this process, with the rights that it has now, could read one of them through a rule for this place.
    ///
    /// # Errors
    /// See [`Exposed`].
    pub(super) fn check(&self, place: &Path) -> Result<(), Exposed> {
        let Some(key) = place.canonicalize().ok().and_then(|place| self.below(&place)) else { return Ok(()) };
        if faccessat(AT_FDCWD, key, AccessFlags::R_OK, AtFlags::AT_EACCESS).is_err() {
            return Ok(());
        }
        Err(Exposed { place: place.display().to_string(), key: key.display().to_string() })
    }

    fn below(&self, place: &Path) -> Option<&Path> {
        self.0.iter().map(PathBuf::as_path).find(|key| key.starts_with(place))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::time::Duration;

    use super::*;
    use crate::keys::{Grant, Order};

    #[test]
    fn the_directories_of_renewed_files_are_given_and_of_etc_the_files() {
        let directory = tempfile::tempdir().unwrap();
        let whole = directory.path().canonicalize().unwrap();
        let (live, archive) = (whole.join("live"), whole.join("archive"));
        [&live, &archive].into_iter().for_each(|it| fs::create_dir(it).unwrap());
        fs::write(archive.join("ca1.pem"), "").unwrap();
        symlink("../archive/ca1.pem", live.join("ca.pem")).unwrap();
        let secrets = Secrets::default();
        assert_eq!(secrets.places_of(&live.join("ca.pem")), [live.clone(), archive]);
        assert!(secrets.places_of(&live.join("password")).contains(&live), "also before it is there");
        for file in ["/etc/cert.pem", "/key.pem", "/etc/outlive/etcd-ca.pem"] {
            assert!(secrets.places_of(Path::new(file)).iter().all(|it| it == Path::new(file)), "{file}");
        }
    }

    #[test]
    fn no_directory_with_the_key_of_a_ca_below_it_is_given() {
        let directory = tempfile::tempdir().unwrap();
        let whole = directory.path().canonicalize().unwrap();
        let keys = whole.join("keys");
        let order = Order { host: "a".into(), grant: Grant::ALL, life: Duration::from_secs(60) };
        crate::keys::init(&keys, &order).unwrap();
        let (file, link) = (whole.join("etcd-ca.pem"), whole.join("to-all"));
        fs::write(&file, "").unwrap();
        symlink(&whole, &link).unwrap();
        let mut secrets = Secrets::default();
        assert_eq!(secrets.places_of(&file), [whole.clone(), whole.clone()], "no CA is known of");
        secrets.check(&whole).unwrap();
        secrets.guard(&keys);
        assert_eq!(secrets.places_of(&file), [file.clone(), file.clone()]);
        for place in [Path::new("/"), &whole, &link, &whole.join("keys-ca")] {
            let why = secrets.check(place).unwrap_err().to_string();
            assert!(why.contains("keys-ca/ca.pem is below it") && !why.contains('\n'), "{why}");
        }
        for place in [&keys, &file, &whole.join("nowhere")] {
            secrets.check(place).unwrap();
        }
    }
}
