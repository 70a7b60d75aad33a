//! The VM's record (`--record`): what its base is copied from here, and what log and events say of it.

use std::io;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use outlive_dirty::Gfn;
use outlive_epoch::{DeviceKind, Hello, Incoming};
use outlive_machine::{PAGE_SIZE, Ram, TouchedPages};
use outlive_record::{Config, Recorder, Session, Settled, Source, Told};

use super::sinks::{CommitSink, SinkError};
use crate::cli::RecordSpec;
use crate::disk::{ImageReader, Replica};
use crate::events::{Event, EventWriter};
use crate::told;

/// Starts the recorder, and says what happens to it.
///
/// # Errors
/// There is no thread.
pub(super) fn open(spec: &RecordSpec, events: &EventWriter) -> io::Result<Arc<Recorder>> {
    let (events, place) = (events.clone(), spec.directory.display().to_string());
    let said = Mutex::new(told::Told::default());
    let is_news =
        move |why: &str| said.lock().unwrap_or_else(PoisonError::into_inner).is_news(why, Instant::now());
    let tell = move |what: Told| match what {
        Told::Began { run } => {
            tracing::info!(run, "recording in {place}: memory and disks are being copied");
            events.emit(Event::RecordBegan { run });
        }
        Told::Whole { run, from } => {
            tracing::info!(
                run,
                from,
                "the record's base is whole: the VM can be had from this checkpoint on"
            );
            events.emit(Event::RecordWhole { run, from });
        }
        Told::Gap { run, why } => {
            if is_news(&why) {
                tracing::warn!(
                    run,
                    "A GAP IN THE RECORD in {place}: {why}; another run begins after a while"
                );
            }
            events.emit(Event::RecordGap { run, why });
        }
        Told::Note(why) => {
            if is_news(&why) {
                tracing::warn!("the record in {place}: {why}");
            }
        }
    };
    let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| outlive_machine::spawn(name, body);
    let config = Config { directory: spec.directory.clone(), keep: spec.keep, spawn, tell: Arc::new(tell) };
    Recorder::open(config).map(Arc::new)
}

/// Records a copy's commits. It comes before memory and disks get them: the record's base has nothing that is newer than
/// the last checkpoint that the record was given.
pub(super) struct RecordSink {
    session: Session,
    ram: Arc<Ram>,
    disks: Arc<Replica>,
}

impl RecordSink {
    /// Of a copy. `None` for a VM whose past cannot be had: on a shared disk there is only the present.
    pub(super) fn new(
        recorder: &Recorder,
        hello: &Hello,
        ram: Arc<Ram>,
        disks: Arc<Replica>,
    ) -> Option<Self> {
        if hello.devices.iter().any(|it| it.kind == DeviceKind::Disk && it.flags.shared) {
            tracing::warn!("the VM is not recorded, because it has a shared disk, which has no past");
            return None;
        }
        Some(Self { session: recorder.session(hello), ram, disks })
    }

    /// The copy is thrown away; because it was found not to be the VM, if `difference` says so.
    pub(super) fn end(self, difference: Option<&str>) {
        match difference {
            None => self.session.finish("the standby's copy has ended: the link, the VM or the standby"),
            Some(why) => self.session.finish_suspect(why),
        }
    }

    /// The VM runs here from now on.
    pub(super) fn taken_over(self) {
        self.session.finish("the VM was taken over by this host, which records no VM that it runs");
    }
}

impl CommitSink for RecordSink {
    fn commit(&mut self, staged: &mut Incoming) -> Result<(), SinkError> {
        let Some(checkpoint) = staged.checkpoint() else { return Ok(()) };
        let (ram, disks) = (&self.ram, &self.disks);
        self.session.commit(&checkpoint, || Arc::new(Copied::new(ram.clone(), disks)));
        Ok(())
    }
}

/// What a base is copied from.
struct Copied {
    ram: Arc<Ram>,
    touched: TouchedPages,
    /// Comes when everything in front is in the images.
    coming: Mutex<Receiver<Vec<Option<ImageReader>>>>,
    images: OnceLock<Vec<Option<ImageReader>>>,
}

impl Copied {
    fn new(ram: Arc<Ram>, disks: &Replica) -> Self {
        let (coming, touched) = (Mutex::new(disks.images()), TouchedPages::open());
        Self { ram, touched, coming, images: OnceLock::new() }
    }

    fn image(&self, disk: usize) -> io::Result<&ImageReader> {
        let image = self.images.get().and_then(|images| images.get(disk)?.as_ref());
        image.ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Source for Copied {
    fn touched(&self, first: u64) -> u64 {
        self.touched.of(&self.ram, Gfn(first))
    }

    fn read_page(&self, gfn: u64, to: &mut [u8; PAGE_SIZE]) -> bool {
        self.ram.read_page(Gfn(gfn), to)
    }

    fn settled(&self) -> Settled {
        if self.images.get().is_some() {
            return Settled::Yes;
        }
        match self.coming.lock().unwrap_or_else(PoisonError::into_inner).try_recv() {
            Ok(images) => {
                self.images.set(images).ok();
                Settled::Yes
            }
            Err(TryRecvError::Empty) => Settled::NotYet,
            Err(TryRecvError::Disconnected) => Settled::Never,
        }
    }

    fn disks(&self) -> Vec<Option<u64>> {
        let images = self.images.get().map(Vec::as_slice).unwrap_or_default();
        images.iter().map(|image| image.as_ref().map(ImageReader::bytes)).collect()
    }

    fn next_data(&self, disk: usize, from: u64) -> io::Result<Option<u64>> {
        self.image(disk)?.next_data(from)
    }

    fn read_disk(&self, disk: usize, to: &mut [u8], at: u64) -> io::Result<()> {
        self.image(disk)?.read(to, at)
    }
}
