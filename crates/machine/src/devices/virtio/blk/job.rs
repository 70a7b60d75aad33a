//! One request on its way through the disk: which operations it takes, and what it changed.

use outlive_epoch::image::{DiskOp, DiskRecord};

use super::engine::{Operation, ZEROES};
use super::log::MAX_RECORD;
use super::request::{Extent, RequestType, Status};

/// How a range is made zero. If the host's file system does not support one way, the next is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    PunchHole,
    ZeroRange,
    /// Write zeroes.
    Zeroes,
}

/// The current step of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The operations of the request itself.
    Work,
    /// Makes the request's changes durable.
    Sync,
    /// Nothing is left.
    Finished(Status),
}

/// What a result leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// There is one more operation to do.
    Again,
    /// The request is done. A failure comes with the error number of the host.
    Finished(Status, Option<i32>),
}

/// How many of a job's changes are in the log.
#[derive(Clone, Copy, Debug, Default)]
struct Logged {
    bytes: u64,
    ranges: usize,
    flush: bool,
}

/// A request for the disk, and how far it is.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) kind: RequestType,
    /// The part of the disk that it concerns, from the first byte to the last.
    pub(super) span: Extent,
    /// Bytes of data.
    pub(super) len: usize,
    /// The ranges of a discard or write-zeroes.
    pub(super) ranges: Vec<Extent>,
    /// The current range.
    current: usize,
    /// Bytes done: of all data, or of the current range.
    done: u64,
    method: Method,
    phase: Phase,
    /// Whether a change must be durable before it is complete.
    write_through: bool,
    /// How often the host said "try again".
    retries: u8,
    logged: Logged,
}

/// How often an operation is repeated because the host says "try again".
const MAX_RETRIES: u8 = 100;

impl Job {
    /// A job without work; [`begin`](Self::begin) fills it.
    pub(super) fn idle() -> Self {
        Self {
            kind: RequestType::Flush,
            span: Extent { offset: 0, len: 0, unmap: false },
            len: 0,
            ranges: Vec::new(),
            current: 0,
            done: 0,
            method: Method::PunchHole,
            phase: Phase::Finished(Status::Ok),
            write_through: false,
            retries: 0,
            logged: Logged::default(),
        }
    }

    /// Begins a request; its ranges are in `ranges` already.
    pub(super) fn begin(&mut self, kind: RequestType, span: Extent, len: usize, write_through: bool) {
        let phase = if kind == RequestType::Flush { Phase::Sync } else { Phase::Work };
        let ranges = std::mem::take(&mut self.ranges);
        *self = Self { kind, span, len, ranges, phase, write_through, ..Self::idle() };
        self.choose_method();
        self.skip_empty();
    }

    /// The next operation; `None` when there is none.
    pub(super) fn operation(&self) -> Option<Operation> {
        match self.phase {
            Phase::Finished(_) => None,
            Phase::Sync => Some(Operation::Sync),
            Phase::Work => {
                let from = self.done as usize;
                let offset = self.span.offset + self.done;
                Some(match self.kind {
                    RequestType::Read => Operation::Read { offset, from, len: self.len - from },
                    RequestType::Write => Operation::Write { offset, from, len: self.len - from },
                    _ => self.zero(),
                })
            }
        }
    }

    fn zero(&self) -> Operation {
        let range = self.ranges[self.current];
        let (offset, len) = (range.offset + self.done, range.len - self.done);
        match self.method {
            Method::PunchHole => Operation::PunchHole { offset, len },
            Method::ZeroRange => Operation::ZeroRange { offset, len },
            Method::Zeroes => Operation::Zeroes { offset, len: len.min(ZEROES as u64) as usize },
        }
    }

    /// Takes the result of the current operation.
    pub(super) fn done(&mut self, result: Result<usize, i32>) -> After {
        match (self.phase, result) {
            (_, Err(libc::EINTR | libc::EAGAIN)) if self.retries < MAX_RETRIES => {
                self.retries += 1;
                After::Again
            }
            // EINVAL: a block device's sectors are larger than the guest's, and the range is no whole number
            // of them.
            (Phase::Work, Err(libc::EOPNOTSUPP | libc::EINVAL))
                if self.kind != RequestType::Read && self.kind != RequestType::Write =>
            {
                self.other_method()
            }
            (_, Err(number)) => self.finish(Status::IoError, Some(number)),
            (Phase::Work, Ok(bytes)) => self.advance(bytes as u64),
            (Phase::Sync | Phase::Finished(_), Ok(_)) => self.finish(Status::Ok, None),
        }
    }

    fn advance(&mut self, bytes: u64) -> After {
        match self.kind {
            RequestType::Read | RequestType::Write => {
                // No bytes moved because the image has become shorter.
                if bytes == 0 {
                    return self.finish(Status::IoError, Some(libc::EIO));
                }
                self.done += bytes;
                if self.done < self.len as u64 {
                    return After::Again;
                }
            }
            _ => {
                let range = self.ranges[self.current];
                self.done = if self.method == Method::Zeroes { self.done + bytes } else { range.len };
                if self.method == Method::Zeroes && bytes == 0 {
                    return self.finish(Status::IoError, Some(libc::EIO));
                }
                if self.done >= range.len {
                    self.current += 1;
                    self.done = 0;
                    self.choose_method();
                    self.skip_empty();
                }
                if self.phase == Phase::Work {
                    return After::Again;
                }
            }
        }
        self.work_done()
    }

    /// Skips empty ranges, and ends the work behind the last range.
    fn skip_empty(&mut self) {
        if !matches!(self.kind, RequestType::Discard | RequestType::WriteZeroes) {
            return;
        }
        while self.ranges.get(self.current).is_some_and(|range| range.len == 0) {
            self.current += 1;
            self.choose_method();
        }
        if self.current == self.ranges.len() {
            self.work_done();
        }
    }

    fn work_done(&mut self) -> After {
        if self.write_through && self.kind.changes() {
            self.phase = Phase::Sync;
            return After::Again;
        }
        self.finish(Status::Ok, None)
    }

    fn finish(&mut self, status: Status, error: Option<i32>) -> After {
        self.phase = Phase::Finished(status);
        After::Finished(status, error)
    }

    fn choose_method(&mut self) {
        let unmap = self.ranges.get(self.current).is_some_and(|range| range.unmap);
        self.method = if unmap { Method::PunchHole } else { Method::ZeroRange };
    }

    /// The host's storage cannot do the operation, or not with this range.
    fn other_method(&mut self) -> After {
        // A discard is a hint. A range that was not discarded has not changed.
        if self.kind == RequestType::Discard {
            return self.finish(Status::Ok, None);
        }
        if self.method == Method::Zeroes {
            return self.finish(Status::IoError, Some(libc::EOPNOTSUPP));
        }
        self.method = Method::Zeroes;
        After::Again
    }

    /// The next change of this job that is not in the log yet; `None` when all are.
    pub(super) fn next_change<'a>(&self, disk: u16, buffer: &'a [u8]) -> Option<DiskRecord<'a>> {
        match self.kind {
            RequestType::Write if self.logged.bytes < self.done => {
                let from = self.logged.bytes as usize;
                let to = (self.done as usize).min(from + MAX_RECORD);
                let offset = self.span.offset + self.logged.bytes;
                return Some(DiskRecord { disk, offset, op: DiskOp::Data(&buffer[from..to]) });
            }
            RequestType::Discard | RequestType::WriteZeroes => {
                for (index, range) in self.ranges.iter().enumerate().skip(self.logged.ranges) {
                    let len = match index.cmp(&self.current) {
                        std::cmp::Ordering::Less => range.len,
                        std::cmp::Ordering::Equal => self.done,
                        std::cmp::Ordering::Greater => 0,
                    };
                    if len > 0 {
                        return Some(DiskRecord { disk, offset: range.offset, op: DiskOp::Zero(len) });
                    }
                }
            }
            _ => {}
        }
        let synced = self.kind == RequestType::Flush || self.write_through && self.kind.changes();
        let durable = synced && self.phase == Phase::Finished(Status::Ok) && !self.logged.flush;
        durable.then_some(DiskRecord { disk, offset: 0, op: DiskOp::Flush })
    }

    /// The change that [`next_change`](Self::next_change) returned is in the log.
    pub(super) fn logged(&mut self, write: &DiskRecord<'_>) {
        match write.op {
            DiskOp::Data(data) => self.logged.bytes += data.len() as u64,
            DiskOp::Zero(_) => {
                let at = self.ranges.iter().skip(self.logged.ranges).position(|it| it.len > 0);
                self.logged.ranges += at.map_or(self.ranges.len(), |at| at + 1);
            }
            DiskOp::Flush => self.logged.flush = true,
        }
    }
}
