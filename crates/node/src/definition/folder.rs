//! The directory with all definitions of a host.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::claims::{Claim, claims, shared};
use super::{Definition, DefinitionError, Fault};
use crate::files::{self, replace};
use crate::program::Program;

/// How the names of definitions end.
pub const ENDING: &str = "toml";
/// The longest definition, in bytes.
pub const LONGEST: usize = 64 << 10;

/// A directory with definitions.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
    host: String,
}

/// What is in a directory: each VM by its name, with its definition or what is wrong with it.
pub type Read = BTreeMap<String, Result<Definition, DefinitionError>>;

/// What of a file changes when it is written.
pub(crate) type Seen = BTreeMap<PathBuf, Option<(SystemTime, u64)>>;

impl Folder {
    /// The definitions at `path` for the host of this name.
    pub fn new(path: PathBuf, host: String) -> Self {
        Self { path, host }
    }

    /// Reads all of them. Of two VMs that want the same, the one whose name comes later is refused.
    ///
    /// # Errors
    /// The operating system's, if there is no such directory.
    pub fn read(&self, program: &Program) -> io::Result<Read> {
        let mut all = Read::new();
        let mut good: Vec<(Definition, Vec<Claim>)> = Vec::new();
        for file in self.files()? {
            let name = file.file_stem().map(|it| it.to_string_lossy().into_owned()).unwrap_or_default();
            let read = self.read_one(&file, program).and_then(|definition| {
                // Each file that it names is looked at once.
                let mine = claims(&definition);
                if let Some(why) =
                    good.iter().find_map(|(it, theirs)| shared((&definition, &mine), (it, theirs)))
                {
                    return Err(why);
                }
                good.push((definition.clone(), mine));
                Ok(definition)
            });
            all.insert(name, read);
        }
        Ok(all)
    }

    /// Reads a text as the definition of this VM would be read.
    ///
    /// # Errors
    /// See [`DefinitionError`].
    pub fn parse(&self, name: &str, text: &str, program: &Program) -> Result<Definition, DefinitionError> {
        Definition::parse(&self.file(name), text, &self.host, program)
    }

    /// Whether the definition of this VM is this text.
    pub(crate) fn has(&self, name: &str, known: &str) -> bool {
        text(&self.file(name)).is_ok_and(|it| it.as_deref() == Some(known))
    }

    /// Writes a definition, whole or not at all.
    ///
    /// # Errors
    /// The operating system's.
    pub fn write(&self, name: &str, text: &str) -> io::Result<()> {
        replace(&self.file(name), text.as_bytes())
    }

    /// Removes a definition.
    ///
    /// # Errors
    /// The operating system's.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.file(name))
    }

    /// Where the definition of this VM is.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.{ENDING}"))
    }

    /// What would be different if a file had been written, made or removed.
    pub(crate) fn seen(&self) -> io::Result<Seen> {
        let stamp = |file: &Path| {
            let it = fs::metadata(file).ok()?;
            Some((it.modified().ok()?, it.len()))
        };
        Ok(self.files()?.into_iter().map(|file| (file.clone(), stamp(&file))).collect())
    }

    fn files(&self) -> io::Result<Vec<PathBuf>> {
        let mut files: Vec<PathBuf> =
            fs::read_dir(&self.path)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
        files.retain(|it| {
            let is_hidden = it.file_name().is_some_and(|it| it.to_string_lossy().starts_with('.'));
            !is_hidden && it.extension().is_some_and(|it| it == ENDING)
        });
        files.sort();
        Ok(files)
    }

    fn read_one(&self, file: &Path, program: &Program) -> Result<Definition, DefinitionError> {
        let wrong = |fault| DefinitionError::new(file, "", fault);
        let text = text(file).map_err(|error| wrong(Fault::Unreadable(error.to_string())))?;
        let text = text.ok_or_else(|| wrong(Fault::TooLong))?;
        Definition::parse(file, &text, &self.host, program)
    }
}

/// `None`: it is longer than a definition can be.
fn text(file: &Path) -> io::Result<Option<String>> {
    let mut text = String::new();
    files::open(file)?.take(LONGEST as u64 + 1).read_to_string(&mut text)?;
    Ok((text.len() <= LONGEST).then_some(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn good_ones_are_read_beside_bad_ones() {
        let directory = tempfile::tempdir().unwrap();
        let folder = Folder::new(directory.path().to_owned(), "hosta".into());
        let before = folder.seen().unwrap();
        folder.write("a", "net = 'tap=t0'").unwrap();
        folder.write("b", "net = 'tap=t0'").unwrap();
        folder.write("c", "memory = '64M'").unwrap();
        folder.write("d", &"#".repeat(LONGEST + 1)).unwrap();
        fs::create_dir(directory.path().join("e.toml")).unwrap();
        fs::write(directory.path().join("notes.txt"), "x").unwrap();
        fs::write(directory.path().join(".hidden.toml"), "x").unwrap();
        let read = folder.read(&testing::program()).unwrap();
        let good: Vec<_> = read.iter().map(|(name, it)| (name.as_str(), it.is_ok())).collect();
        assert_eq!(good, [("a", true), ("b", false), ("c", true), ("d", false), ("e", false)]);
        assert_ne!(folder.seen().unwrap(), before);
        folder.remove("a").unwrap();
        assert!(folder.read(&testing::program()).unwrap()["b"].is_ok());
        Folder::new("/no/such".into(), "hosta".into()).read(&testing::program()).unwrap_err();
    }
}
