//! What two VMs of one host must not have in common.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{Definition, DefinitionError, Fault};
use crate::bounded;

/// Something that only one VM of a host may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The key of the definition.
    pub key: &'static str,
    /// What it is, for a person.
    pub what: &'static str,
    /// Which.
    pub value: String,
    /// Two VMs may have it if both only read it.
    readonly: bool,
    identity: Identity,
}

/// What makes two of them the same.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Identity {
    Text(String),
    /// Device and number of a file, by whatever path.
    File(u64, u64),
    /// Address and port. An address of zeros is all of them.
    Address(String, String),
}

impl Identity {
    /// A file that does not answer is known by its path alone.
    fn of_file(path: &str) -> Self {
        let of_thread = path.to_owned();
        bounded::look(&format!("file {path}"), move || Self::found(&of_thread)).unwrap_or_else(|| {
            tracing::warn!(
                "{path} does not answer, so it is not known whether two VMs have it: look after its mount"
            );
            Self::Text(path.to_owned())
        })
    }

    fn found(path: &str) -> Self {
        match fs::metadata(path) {
            // Two device nodes may be one device.
            Ok(it) if it.rdev() != 0 => Self::File(u64::MAX, it.rdev()),
            Ok(it) => Self::File(it.dev(), it.ino()),
            Err(_) => {
                Self::Text(fs::canonicalize(Path::new(path).parent().unwrap_or(Path::new("/"))).map_or_else(
                    |_| path.to_owned(),
                    |folder| {
                        folder.join(Path::new(path).file_name().unwrap_or_default()).display().to_string()
                    },
                ))
            }
        }
    }

    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Address(a, port), Self::Address(b, other)) => {
                let all = |it: &str| matches!(it, "" | "0.0.0.0" | "[::]" | "*");
                port == other && port != "0" && (a == b || all(a) || all(b))
            }
            (a, b) => a == b,
        }
    }
}

impl Claim {
    fn is(&self, other: &Self) -> bool {
        self.what == other.what && self.identity.is(&other.identity) && !(self.readonly && other.readonly)
    }
}

/// What a VM has for itself. It looks at files.
pub(super) fn claims(of: &Definition) -> Vec<Claim> {
    let mut claims = Vec::new();
    let mut claim = |key, what, value: &str, readonly, identity| {
        claims.push(Claim { key, what, value: value.to_owned(), readonly, identity });
    };
    for disk in of.values("disk") {
        let mut parts = disk.split(',');
        let readonly = disk.split(',').any(|it| it == "readonly");
        if let Some(path) = parts.find_map(|it| it.strip_prefix("path=")) {
            claim("disk", "the disk image", path, readonly, Identity::of_file(path));
        }
    }
    for net in of.values("net") {
        for (start, what) in [("tap=", "the tap"), ("mac=", "the card's address")] {
            if let Some(value) = net.split(',').find_map(|it| it.strip_prefix(start)) {
                claim("net", what, value, false, Identity::Text(value.to_ascii_lowercase()));
            }
        }
    }
    for listen in of.values("listen") {
        if let Some((host, port)) = listen.rsplit_once(':') {
            claim("listen", "the address", &listen, false, Identity::Address(host.into(), port.into()));
        }
    }
    for (key, what) in [("console", "the directory"), ("events", "the file")] {
        for path in of.values(key) {
            claim(key, what, &path, false, Identity::of_file(&path));
        }
    }
    for record in of.values("record") {
        let directory = record.rsplit_once(",keep=").map_or(&*record, |(directory, _)| directory);
        claim("record", "the directory", directory, false, Identity::of_file(directory));
    }
    claims
}

/// Two VMs that want the same.
pub type Conflict = DefinitionError;

/// The first thing that a VM has in common with one of the others and must not.
pub fn conflict<'a>(one: &Definition, others: impl IntoIterator<Item = &'a Definition>) -> Option<Conflict> {
    let mine = claims(one);
    let others = others.into_iter().filter(|other| other.name != one.name);
    others.into_iter().find_map(|other| shared((one, &mine), (other, &claims(other))))
}

/// The first thing that two VMs have in common.
pub(super) fn shared(
    (one, mine): (&Definition, &[Claim]),
    (other, theirs): (&Definition, &[Claim]),
) -> Option<Conflict> {
    let claim = mine.iter().find(|claim| theirs.iter().any(|it| it.is(claim)))?;
    let (what, value) = (claim.what, claim.value.clone());
    let fault = Fault::Shared { what, value, of: other.name.clone(), file: other.file.clone() };
    Some(DefinitionError::new(&one.file, claim.key, fault))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn vm(name: &str, text: &str) -> Definition {
        let file = format!("/vms/{name}.toml");
        Definition::parse(Path::new(&file), text, "hosta", &testing::program()).unwrap()
    }

    #[test]
    fn two_vms_share_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (image, alias) = (folder.path().join("image"), folder.path().join("alias"));
        fs::write(&image, "").unwrap();
        std::os::unix::fs::symlink(&image, &alias).unwrap();
        let disk = |path: &Path, more: &str| format!("disk = ['path={}{more}']", path.display());
        let listen = |at: &str| {
            format!("arbiter = 'file:/x'\ndisk = ['path=/{at}']\nstandby = ['b:1']\nlisten = '{at}'")
        };
        for (a, b, key) in [
            (disk(&image, ""), disk(&alias, ",readonly"), Some("disk")),
            (disk(&image, ",readonly"), disk(&alias, ",readonly"), None),
            (disk(Path::new("/no/x"), ""), disk(Path::new("/no/x"), ""), Some("disk")),
            (disk(Path::new("/no/x"), ""), disk(Path::new("/no/y"), ""), None),
            ("net = 'tap=t0'".into(), "net = 'bridge=b,tap=t0'".into(), Some("net")),
            (
                "net = 'tap=t0,mac=02:00:00:00:00:0A'".into(),
                "net = 'tap=t1,mac=02:00:00:00:00:0a'".into(),
                Some("net"),
            ),
            ("net = 'tap=t0,bridge=b'".into(), "net = 'tap=t1,bridge=b'".into(), None),
            (listen("0.0.0.0:7000"), listen("10.0.0.1:7000"), Some("listen")),
            (listen("10.0.0.2:7000"), listen("10.0.0.1:7000"), None),
            (listen("0.0.0.0:7001"), listen("0.0.0.0:7000"), None),
            ("console = '/run/x'".into(), "console = '/run/x'".into(), Some("console")),
            ("record = '/x,keep=1h'".into(), "record = '/x'".into(), Some("record")),
            ("record = '/x,keep=1h'".into(), "record = '/y,keep=1h'".into(), None),
            ("events = '/run/x'".into(), "console = '/run/x'".into(), None),
        ] {
            let (a, b) = (vm("a", &a), vm("b", &b));
            let said = conflict(&b, [&a, &b]);
            assert_eq!(said.as_ref().map(|it| it.key.as_str()), key, "{said:?}");
            if let Some(said) = said.map(|it| it.to_string()) {
                assert!(
                    said.starts_with("/vms/b.toml: ") && said.contains("a's, too (/vms/a.toml)"),
                    "{said}"
                );
            }
        }
    }
}
