//! A file system that takes as long as a test says for what it does, or fails: a FUSE server that passes
//! everything on to another directory.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, Request, Session,
    TimeOrNow, WriteFlags,
};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FallocateFlags, RenameFlags as How, fallocate, renameat2};
use nix::libc::{O_NOFOLLOW, O_PATH};
use nix::sys::statvfs::fstatvfs;
use nix::unistd::{Whence, lseek};

/// Requests that are answered at the same time.
const THREADS: usize = 6;
/// How long the kernel may remember names and attributes: nobody else changes them.
const FRESH: Duration = Duration::from_secs(1);
/// The numbers below are not the other directory's.
const OWN_NUMBERS: u64 = 16;

/// How the file system behaves; at first it is as fast as it can be.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pace {
    /// For each write.
    pub(crate) write: Duration,
    /// For each read.
    pub(crate) read: Duration,
    /// Where that begins; reads of what is before take no time.
    pub(crate) read_from: u64,
    /// For each change of a directory, and for making anything durable.
    pub(crate) sync: Duration,
    /// Every request fails with this error.
    pub(crate) error: Option<Errno>,
    /// All writes together carry at most so many bytes a second.
    pub(crate) rate: Option<u64>,
}

/// The file system, until it is dropped.
pub(crate) struct Slow {
    place: PathBuf,
    behind: PathBuf,
    pace: Arc<Dial>,
    session: Option<BackgroundSession>,
}

/// The pace, and its change.
#[derive(Default)]
struct Dial {
    /// With the number of changes so far.
    pace: Mutex<(Pace, u64)>,
    changed: Condvar,
    /// How many requests take their time now.
    waiting: AtomicUsize,
    /// Until when the writes that came so far keep a disk with a rate busy.
    busy_until: Mutex<Option<Instant>>,
    /// Bytes written so far, by file.
    written: Mutex<HashMap<u64, u64>>,
}

impl Slow {
    /// Mounts it on a new directory; files are kept in `behind`. `None`, after saying why, where that is not
    /// possible.
    pub(crate) fn mount(place: PathBuf, behind: &Path) -> Option<Slow> {
        fs::create_dir(&place).unwrap();
        let pace = Arc::<Dial>::default();
        let root = Arc::new(File::open(behind).unwrap());
        let nodes = HashMap::from([(INodeNo::ROOT.0, Node { file: root, known: 1 })]);
        let server = Server { pace: pace.clone(), nodes: Mutex::new(nodes), handles: Mutex::default() };
        let mut config = Config::default();
        config.n_threads = Some(THREADS);
        let session = Session::new(server, &place, &config).and_then(Session::spawn);
        match session {
            Ok(session) => {
                let behind = behind.to_owned();
                Some(Slow { place, behind, pace, session: Some(session) })
            }
            Err(error) => {
                println!("skipped: no FUSE: {error}");
                None
            }
        }
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.place
    }

    /// Changes the pace. Requests that wait are answered at once and counted anew.
    pub(crate) fn set(&self, pace: Pace) {
        let mut now = lock(&self.pace.pace);
        *now = (pace, now.1 + 1);
        self.pace.changed.notify_all();
    }

    /// Bytes that were written so far to the file of this name, each as often as it was written.
    pub(crate) fn written(&self, name: &str) -> u64 {
        // Not by this file system: a test that is killed while it asks itself would never end.
        let number = fs::metadata(self.behind.join(name)).map_or(0, |file| file.ino() + OWN_NUMBERS);
        lock(&self.pace.written).get(&number).copied().unwrap_or(0)
    }

    /// How many requests take their time now.
    pub(crate) fn waiting(&self) -> usize {
        self.pace.waiting.load(Ordering::SeqCst)
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.set(Pace::default());
        Command::new("umount").arg("-l").arg(&self.place).status().ok();
        drop(self.session.take());
    }
}

/// A file or directory that the kernel knows.
struct Node {
    /// Opened only as a place (O_PATH).
    file: Arc<File>,
    /// How often the kernel was told of it.
    known: u64,
}

/// Something open.
#[derive(Clone)]
enum Handle {
    File(Arc<File>),
    Directory(Arc<Vec<(u64, FileType, OsString)>>),
}

struct Server {
    pace: Arc<Dial>,
    nodes: Mutex<HashMap<u64, Node>>,
    handles: Mutex<(u64, HashMap<u64, Handle>)>,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

fn attributes(number: u64, from: &Metadata) -> FileAttr {
    FileAttr {
        ino: INodeNo(number),
        size: from.len(),
        blocks: from.blocks(),
        atime: from.accessed().unwrap_or(SystemTime::UNIX_EPOCH),
        mtime: from.modified().unwrap_or(SystemTime::UNIX_EPOCH),
        ctime: from.modified().unwrap_or(SystemTime::UNIX_EPOCH),
        crtime: SystemTime::UNIX_EPOCH,
        kind: FileType::from_std(from.file_type()).unwrap_or(FileType::RegularFile),
        perm: (from.mode() & 0o7777) as u16,
        nlink: from.nlink() as u32,
        uid: from.uid(),
        gid: from.gid(),
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Server {
    /// Takes the time that the test has set, or fails.
    fn take_time(&self, time: impl Fn(Pace) -> Duration) -> io::Result<()> {
        let now = lock(&self.pace.pace);
        let (pace, changes) = *now;
        let time = time(pace);
        if !time.is_zero() {
            self.pace.waiting.fetch_add(1, Ordering::SeqCst);
            let waiting = self.pace.changed.wait_timeout_while(now, time, |now| now.1 == changes);
            drop(waiting.unwrap_or_else(PoisonError::into_inner));
            self.pace.waiting.fetch_sub(1, Ordering::SeqCst);
        }
        pace.error.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Waits until a disk with a rate has written these bytes behind all others.
    fn take_turn(&self, bytes: usize) {
        let now = lock(&self.pace.pace);
        let (pace, changes) = *now;
        let Some(rate) = pace.rate else { return };
        let began = Instant::now();
        let until = {
            let mut busy = lock(&self.pace.busy_until);
            let until = busy.map_or(began, |busy| busy.max(began))
                + Duration::from_secs(1) * bytes as u32 / rate as u32;
            *busy.insert(until)
        };
        self.pace.waiting.fetch_add(1, Ordering::SeqCst);
        let waiting = self.pace.changed.wait_timeout_while(now, until - began, |now| now.1 == changes);
        drop(waiting.unwrap_or_else(PoisonError::into_inner));
        self.pace.waiting.fetch_sub(1, Ordering::SeqCst);
    }

    fn node(&self, number: INodeNo) -> io::Result<Arc<File>> {
        let nodes = lock(&self.nodes);
        nodes.get(&number.0).map(|node| node.file.clone()).ok_or_else(|| Errno::ESTALE.into())
    }

    /// A path to the file, wherever it is by now. It holds as long as the file that comes along.
    fn path(&self, number: INodeNo) -> io::Result<(Arc<File>, PathBuf)> {
        let file = self.node(number)?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        Ok((file, path))
    }

    fn within(&self, parent: INodeNo, name: &OsStr) -> io::Result<(Arc<File>, PathBuf)> {
        let (file, path) = self.path(parent)?;
        Ok((file, path.join(name)))
    }

    /// Tells the kernel of a file.
    fn enter(&self, path: &Path) -> io::Result<FileAttr> {
        let file = OpenOptions::new().read(true).custom_flags(O_PATH | O_NOFOLLOW).open(path)?;
        let metadata = file.metadata()?;
        let number = metadata.ino() + OWN_NUMBERS;
        let mut nodes = lock(&self.nodes);
        nodes.entry(number).or_insert(Node { file: Arc::new(file), known: 0 }).known += 1;
        Ok(attributes(number, &metadata))
    }

    fn opened(&self, handle: Handle) -> FileHandle {
        let mut handles = lock(&self.handles);
        handles.0 += 1;
        let number = handles.0;
        handles.1.insert(number, handle);
        FileHandle(number)
    }

    fn file(&self, handle: FileHandle) -> io::Result<Arc<File>> {
        match lock(&self.handles).1.get(&handle.0) {
            Some(Handle::File(file)) => Ok(file.clone()),
            _ => Err(Errno::EBADF.into()),
        }
    }

    fn open_file(&self, path: &Path, flags: OpenFlags) -> io::Result<FileHandle> {
        let writes = flags.acc_mode() != OpenAccMode::O_RDONLY;
        let file = OpenOptions::new().read(true).write(writes).open(path)?;
        Ok(self.opened(Handle::File(Arc::new(file))))
    }

    fn list(&self, directory: INodeNo) -> io::Result<FileHandle> {
        let (_held, path) = self.path(directory)?;
        let mut entries = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let kind = FileType::from_std(entry.file_type()?).unwrap_or(FileType::RegularFile);
            let number = fs::symlink_metadata(entry.path()).map_or(1, |it| it.ino()) + OWN_NUMBERS;
            entries.push((number, kind, entry.file_name()));
        }
        Ok(self.opened(Handle::Directory(Arc::new(entries))))
    }

    fn change(&self) -> io::Result<()> {
        self.take_time(|pace| pace.sync)
    }
}

fn done(result: io::Result<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error.into()),
    }
}

fn entry(result: io::Result<FileAttr>, reply: ReplyEntry) {
    match result {
        Ok(attributes) => reply.entry(&FRESH, &attributes, Generation(0)),
        Err(error) => reply.error(error.into()),
    }
}

fn open(result: io::Result<FileHandle>, reply: ReplyOpen) {
    match result {
        Ok(handle) => reply.opened(handle, FopenFlags::empty()),
        Err(error) => reply.error(error.into()),
    }
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.take_time(|_| Duration::ZERO).and_then(|()| self.within(parent, name));
        entry(found.and_then(|(_held, path)| self.enter(&path)), reply);
    }

    fn forget(&self, _: &Request, number: INodeNo, times: u64) {
        let mut nodes = lock(&self.nodes);
        let known = nodes.get_mut(&number.0).filter(|_| number != INodeNo::ROOT);
        if let Some(node) = known {
            node.known = node.known.saturating_sub(times);
            if node.known == 0 {
                nodes.remove(&number.0);
            }
        }
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.node(number).and_then(|file| file.metadata()) {
            Ok(metadata) => reply.attr(&FRESH, &attributes(number.0, &metadata)),
            Err(error) => reply.error(error.into()),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        number: INodeNo,
        mode: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let result = self.take_time(|pace| pace.write).and_then(|()| {
            let (_held, path) = self.path(number)?;
            if let Some(mode) = mode {
                fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
            }
            if let Some(size) = size {
                OpenOptions::new().write(true).open(&path)?.set_len(size)?;
            }
            fs::metadata(&path)
        });
        match result {
            Ok(metadata) => reply.attr(&FRESH, &attributes(number.0, &metadata)),
            Err(error) => reply.error(error.into()),
        }
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        let made = self.change().and_then(|()| {
            let (_held, path) = self.within(parent, name)?;
            fs::create_dir(&path)?;
            self.enter(&path)
        });
        entry(made, reply);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let place = self.change().and_then(|()| self.within(parent, name));
        done(place.and_then(|(_held, path)| fs::remove_file(path)), reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let place = self.change().and_then(|()| self.within(parent, name));
        done(place.and_then(|(_held, path)| fs::remove_dir(path)), reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let renamed = self.change().and_then(|()| {
            let (from, to) = (self.within(parent, name)?, self.within(new_parent, new_name)?);
            let how = How::from_bits_truncate(flags.bits());
            Ok(renameat2(AT_FDCWD, &from.1, AT_FDCWD, &to.1, how)?)
        });
        done(renamed, reply);
    }

    fn link(&self, _: &Request, number: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let linked = self.change().and_then(|()| {
            let (file, to) = (self.path(number)?, self.within(parent, name)?);
            // The name in /proc is a link to the file, and the file gets the new name.
            let follow = nix::fcntl::AtFlags::AT_SYMLINK_FOLLOW;
            nix::unistd::linkat(AT_FDCWD, &file.1, AT_FDCWD, &to.1, follow)?;
            self.enter(&to.1)
        });
        entry(linked, reply);
    }

    fn open(&self, _: &Request, number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let place = self.take_time(|_| Duration::ZERO).and_then(|()| self.path(number));
        open(place.and_then(|(_held, path)| self.open_file(&path, flags)), reply);
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let created = self.change().and_then(|()| {
            let (_held, path) = self.within(parent, name)?;
            OpenOptions::new().write(true).create(true).truncate(false).mode(mode).open(&path)?;
            Ok((self.enter(&path)?, self.open_file(&path, OpenFlags(flags))?))
        });
        match created {
            Ok((attributes, handle)) => {
                reply.created(&FRESH, &attributes, Generation(0), handle, FopenFlags::empty());
            }
            Err(error) => reply.error(error.into()),
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let slow = |pace: Pace| if offset < pace.read_from { Duration::ZERO } else { pace.read };
        let read = self.take_time(slow).and_then(|()| {
            let (file, mut bytes, mut length) = (self.file(handle)?, vec![0; size as usize], 0);
            while length < bytes.len() {
                match file.read_at(&mut bytes[length..], offset + length as u64)? {
                    0 => break,
                    more => length += more,
                }
            }
            bytes.truncate(length);
            Ok(bytes)
        });
        match read {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(error.into()),
        }
    }

    fn write(
        &self,
        _: &Request,
        number: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.take_turn(data.len());
        let file = self.take_time(|pace| pace.write).and_then(|()| self.file(handle));
        match file.and_then(|file| file.write_all_at(data, offset)) {
            Ok(()) => {
                *lock(&self.pace.written).entry(number.0).or_default() += data.len() as u64;
                reply.written(data.len() as u32);
            }
            Err(error) => reply.error(error.into()),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        lock(&self.handles).1.remove(&handle.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        let file = self.change().and_then(|()| self.file(handle));
        done(file.and_then(|file| file.sync_data()), reply);
    }

    fn opendir(&self, _: &Request, number: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let list = self.take_time(|_| Duration::ZERO).and_then(|()| self.list(number));
        open(list, reply);
    }

    fn readdir(&self, _: &Request, _: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let handle = lock(&self.handles).1.get(&handle.0).cloned();
        if let Some(Handle::Directory(entries)) = handle {
            for (at, (number, kind, name)) in entries.iter().enumerate().skip(offset as usize) {
                if reply.add(INodeNo(*number), at as u64 + 1, *kind, name) {
                    break;
                }
            }
        }
        reply.ok();
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        lock(&self.handles).1.remove(&handle.0);
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        done(self.change(), reply);
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        match self.node(INodeNo::ROOT).and_then(|root| Ok(fstatvfs(&*root)?)) {
            Ok(it) => reply.statfs(
                it.blocks(),
                it.blocks_free(),
                it.blocks_available(),
                it.files(),
                it.files_free(),
                it.block_size() as u32,
                it.name_max() as u32,
                it.fragment_size() as u32,
            ),
            Err(error) => reply.error(error.into()),
        }
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let file = self.take_time(|pace| pace.write).and_then(|()| self.file(handle));
        let mode = FallocateFlags::from_bits_truncate(mode);
        done(file.and_then(|file| Ok(fallocate(&*file, mode, offset as i64, length as i64)?)), reply);
    }

    fn lseek(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let whence = if whence == Whence::SeekData as i32 { Whence::SeekData } else { Whence::SeekHole };
        let found = self.file(handle).and_then(|file| Ok(lseek(&*file, offset, whence)?));
        match found {
            Ok(offset) => reply.offset(offset),
            Err(error) => reply.error(error.into()),
        }
    }
}
