//! The directory of a VM that is rewound: its images get their names when all of them are whole and durable. Unless it is
//! kept, nothing of it stays.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use outlive_machine::{ImageError, LockedImage};

/// What an image is called until it is whole.
const SUFFIX: &str = "rewinding";
/// Every file system of the ext family has it.
const FOUND: &str = "lost+found";

/// Why there is no place for the VM's images.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FolderError {
    /// There is no room for a directory there, or the like.
    #[error("cannot make the directory {}: {source}; give --into another one", .path.display())]
    Make { path: PathBuf, source: io::Error },
    /// Its own parent is missing.
    #[error("cannot make the directory {}, because {} is not there: make that first", .path.display(), .parent.display())]
    NoParent { path: PathBuf, parent: PathBuf },
    /// Something is there.
    #[error("{} is not empty, and nothing is overwritten: give --into a directory that is made, or an empty one", .0.display())]
    NotEmpty(PathBuf),
    /// It is a file.
    #[error("{} is no directory: give --into a directory that is made, or an empty one", .0.display())]
    NoDirectory(PathBuf),
    /// The storage has no room, or fails.
    #[error("cannot write {}: {source}; what was written is removed", .path.display())]
    Write { path: PathBuf, source: io::Error },
    /// An image has been touched by somebody else.
    #[error(transparent)]
    Image(#[from] ImageError),
}

/// The directory; see the module.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    /// It was not there before.
    is_new: bool,
    images: Vec<PathBuf>,
    is_kept: bool,
}

impl Folder {
    /// Makes the directory, or finds that it is empty.
    ///
    /// # Errors
    /// See [`FolderError`].
    pub(crate) fn claim(path: &Path) -> Result<Self, FolderError> {
        let make = |source| FolderError::Make { path: path.to_owned(), source };
        let is_new = match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => true,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => false,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let parent = path.parent().unwrap_or(Path::new("/")).to_owned();
                return Err(FolderError::NoParent { path: path.to_owned(), parent });
            }
            Err(error) => return Err(make(error)),
        };
        if !is_new && !path.is_dir() {
            return Err(FolderError::NoDirectory(path.to_owned()));
        }
        let path = fs::canonicalize(path).map_err(make)?;
        let folder = Self { path, is_new, images: Vec::new(), is_kept: false };
        for entry in fs::read_dir(&folder.path).map_err(make)? {
            if entry.map_err(make)?.file_name() != FOUND {
                return Err(FolderError::NotEmpty(folder.path.clone()));
            }
        }
        Ok(folder)
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it was made for this.
    pub(crate) fn is_new(&self) -> bool {
        self.is_new
    }

    /// Makes the image of the next disk, empty, under the name that it has until it is whole.
    ///
    /// # Errors
    /// See [`FolderError`].
    pub(crate) fn add(&mut self, bytes: u64) -> Result<File, FolderError> {
        let image = self.path.join(format!("disk-{}.raw", self.images.len()));
        let unfinished = unfinished(&image);
        self.images.push(image);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&unfinished);
        let sized = file.and_then(|file| file.set_len(bytes).map(|()| file));
        sized.map_err(|source| FolderError::Write { path: unfinished, source })
    }

    /// Gives the images their names, once they are durable, and locks them. After a kill between two of them the first one
    /// alone starts nowhere: its sidecar, which says of how many disks it is one, comes before its name.
    ///
    /// # Errors
    /// See [`FolderError`].
    pub(crate) fn finish<E: From<FolderError>>(
        &self,
        files: &[File],
        sidecars: impl FnOnce(&[PathBuf], &[PathBuf]) -> Result<(), E>,
    ) -> Result<Vec<LockedImage>, E> {
        let unfinished: Vec<_> = self.images.iter().map(|image| unfinished(image)).collect();
        for (file, path) in files.iter().zip(&unfinished) {
            file.sync_all().map_err(|source| FolderError::Write { path: path.clone(), source })?;
        }
        sidecars(&self.images, &unfinished)?;
        let mut locked = Vec::new();
        for (from, to) in unfinished.iter().zip(&self.images) {
            fs::rename(from, to).map_err(|source| FolderError::Write { path: to.clone(), source })?;
            locked.push(LockedImage::open(to).map_err(FolderError::from)?);
        }
        let synced = File::open(&self.path).and_then(|it| it.sync_all());
        synced.map_err(|source| FolderError::Write { path: self.path.clone(), source })?;
        Ok(locked)
    }

    /// The VM runs: from now on all of it stays.
    pub(crate) fn keep(mut self) {
        self.is_kept = true;
    }
}

fn unfinished(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".");
    name.push(SUFFIX);
    name.into()
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        // Images, and what is beside them. It was empty, and nobody else makes files of these names.
        let ours = |name: &str| {
            self.images.iter().any(|image| {
                let image = image.file_name().unwrap_or_default().to_string_lossy();
                name.strip_prefix(&*image).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
            })
        };
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            if ours(&entry.file_name().to_string_lossy()) {
                fs::remove_file(entry.path()).ok();
            }
        }
        if self.is_new {
            // Fails where this process' user may not: an empty directory stays, and can be given again.
            fs::remove_dir(&self.path).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let names = fs::read_dir(folder).unwrap().map(|it| it.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    #[test]
    fn only_what_is_new_or_empty_is_taken() {
        let there = tempfile::tempdir().unwrap();
        let refused = |path: &Path| Folder::claim(path).unwrap_err().to_string();
        fs::write(there.path().join("file"), "").unwrap();
        assert!(refused(there.path()).contains("is not empty"));
        assert_eq!(names(there.path()), ["file"], "it is not this program's");
        assert!(refused(&there.path().join("file")).contains("is no directory"));
        assert!(refused(&there.path().join("a/b")).contains("a is not there: make that first"));
        fs::create_dir_all(there.path().join("mount/lost+found")).unwrap();
        let folder = Folder::claim(&there.path().join("mount")).unwrap();
        assert!(!folder.is_new());
        drop(folder);
        assert_eq!(names(there.path()), ["file", "mount"]);
    }

    #[test]
    fn images_have_their_names_when_they_are_whole_and_nothing_stays_of_a_failure() {
        let there = tempfile::tempdir().unwrap();
        let path = there.path().join("vm");
        let make = || {
            let mut folder = Folder::claim(&path).unwrap();
            let files = [folder.add(4096).unwrap(), folder.add(8192).unwrap()];
            (folder, files)
        };
        let (folder, _) = make();
        assert_eq!(names(&path), ["disk-0.raw.rewinding", "disk-1.raw.rewinding"]);
        drop(folder);
        assert!(!path.exists());

        let (folder, files) = make();
        let beside = |images: &[PathBuf], _: &[PathBuf]| {
            for image in images {
                fs::write(format!("{}.outlive", image.display()), "").unwrap();
            }
            Ok::<_, FolderError>(())
        };
        let locked = folder.finish(&files, beside).unwrap();
        let all = ["disk-0.raw", "disk-0.raw.outlive", "disk-1.raw", "disk-1.raw.outlive"];
        assert_eq!(names(&path), all);
        assert!(LockedImage::open(&path.join("disk-1.raw")).is_err(), "nobody else begins to use it");
        drop((locked, folder));
        assert!(!path.exists(), "the machine could not be made");

        let (folder, files) = make();
        folder.finish(&files, beside).unwrap();
        folder.keep();
        assert_eq!(names(&path), all);
    }
}
