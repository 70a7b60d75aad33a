//! Writes sections. The page bytes themselves are never copied: the encoder appends what comes in front of
//! them to the caller's buffer, and the sender hands both to one `writev`.

use crate::device::{DeviceInfo, MAX_DEVICES, MAX_SERIAL};
use crate::disk::{
    DISK_SUM_LEN, DiskRecords, DiskSums, DiskWant, MAX_RECORD_BYTES, MAX_SUMS, MAX_ZERO_CHUNKS,
};
use crate::message::{
    Accept, Ack, CheckpointBegin, CheckpointEnd, EndReason, Hello, LeaveReason, MAX_REFUSE_TEXT, MAX_TEXT,
    RefuseCode, StateRef,
};
use crate::pages::{MAX_PAGES_PER_SECTION, PageEntry};
use crate::section::{HEADER_LEN, Kind, MAX_STATE_SECTION, SectionHeader};

/// A caller's mistake. Nothing was appended and the stream can go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// A text or a state section beyond its limit.
    #[error("{field} has {length} bytes; the limit is {limit}")]
    TooLong {
        /// Which field.
        field: &'static str,
        /// Its length.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// More pages than a section may have.
    #[error("{0} pages in one section; the limit is {MAX_PAGES_PER_SECTION}")]
    TooManyPages(usize),
    /// Entries and data do not belong together.
    #[error("the entries need {expected} bytes of data, not {found}")]
    DataLength {
        /// Bytes that the entries need.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// Disk records that no reader would take.
    #[error("disk records: {0}")]
    Records(String),
    /// Pages, state or an end without a checkpoint, or a checkpoint inside another one.
    #[error("{0}")]
    Order(&'static str),
    /// More or less was sent than the checkpoint's beginning said.
    #[error("checkpoint {number} was announced with {announced} {what} and has {sent}")]
    Totals {
        /// The checkpoint's number.
        number: u64,
        /// Pages, bytes of state, or bytes of disk records.
        what: &'static str,
        /// In the beginning.
        announced: u32,
        /// Sent.
        sent: u32,
    },
}

struct Open {
    begin: CheckpointBegin,
    pages: u32,
    state_bytes: u32,
    disk_bytes: u32,
    chain: crc32fast::Hasher,
}

/// The sending half of a connection: numbers the sections and keeps the totals and the chain of the open
/// checkpoint.
///
/// The bytes must reach the link in the order of the calls, so one thread owns encoder and socket. Each call
/// appends to `out`; with enough capacity (64 + 8 bytes per page are ample for a `Pages` section) none
/// allocates. Calls whose names end in `_head` append everything but the data, which the caller must send
/// right behind.
#[derive(Default)]
pub struct Encoder {
    sequence: u64,
    open: Option<Open>,
}

impl Encoder {
    /// The encoder of a new connection.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether a checkpoint has been begun and not ended.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Appends [`Hello`].
    ///
    /// # Errors
    /// [`EncodeError::TooLong`] for a text.
    pub fn hello(&mut self, out: &mut Vec<u8>, hello: &Hello) -> Result<(), EncodeError> {
        for (field, text) in [
            ("the VM's name", &hello.name),
            ("the host's name", &hello.host),
            ("the tracker's name", &hello.tracker),
            ("the vendor's name", &hello.vendor),
        ] {
            check_length(field, text.len(), MAX_TEXT)?;
        }
        check_length("the list of devices", hello.devices.len(), MAX_DEVICES)?;
        for DeviceInfo { serial, .. } in &hello.devices {
            check_length("a disk's serial number", serial.len(), MAX_SERIAL)?;
        }
        self.section(out, Kind::Hello, &[], |out| {
            out.extend_from_slice(&hello.vm.0);
            for word in [hello.generation, hello.memory_bytes, hello.interval_us, hello.dead_after_us] {
                out.extend_from_slice(&word.to_le_bytes());
            }
            let limits = &hello.limits;
            for word in
                [hello.vcpus, limits.max_pages, limits.max_state_bytes, limits.slots, limits.max_disk_bytes]
            {
                out.extend_from_slice(&word.to_le_bytes());
            }
            out.extend_from_slice(&hello.firmware_bytes.to_le_bytes());
            out.push(u8::from(hello.mac.is_some()));
            out.extend_from_slice(&hello.mac.unwrap_or_default());
            out.push(hello.layout.ranges().len() as u8);
            for range in hello.layout.ranges() {
                out.extend_from_slice(&range.start.to_le_bytes());
                out.extend_from_slice(&range.pages.to_le_bytes());
            }
            out.push(hello.devices.len() as u8);
            for device in &hello.devices {
                device.put(out);
                put_text(out, &device.serial);
            }
            for text in [&hello.name, &hello.host, &hello.tracker, &hello.vendor] {
                put_text(out, text);
            }
        });
        Ok(())
    }

    /// Appends [`Accept`].
    ///
    /// # Errors
    /// [`EncodeError::TooLong`] for the host's name.
    pub fn accept(&mut self, out: &mut Vec<u8>, accept: &Accept) -> Result<(), EncodeError> {
        check_length("the host's name", accept.host.len(), MAX_TEXT)?;
        self.section(out, Kind::Accept, &[], |out| {
            out.extend_from_slice(&accept.generation.to_le_bytes());
            out.extend_from_slice(&accept.dead_after_us.to_le_bytes());
            put_text(out, &accept.host);
        });
        Ok(())
    }

    /// Appends a refusal. A text that is too long is cut.
    pub fn refuse(&mut self, out: &mut Vec<u8>, code: RefuseCode, text: &str) {
        let mut end = text.len().min(MAX_REFUSE_TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.section(out, Kind::Refuse, &[], |out| {
            out.extend_from_slice(&(code as u16).to_le_bytes());
            put_text(out, &text[..end]);
        });
    }

    /// Appends the head of a `BasePages` section; `data` (the bytes of the raw entries, in order) must follow
    /// it.
    ///
    /// # Errors
    /// [`EncodeError::TooManyPages`], [`EncodeError::DataLength`], [`EncodeError::Order`] inside a
    /// checkpoint.
    pub fn base_pages_head(
        &mut self,
        out: &mut Vec<u8>,
        round: u64,
        entries: impl ExactSizeIterator<Item = PageEntry> + Clone,
        data: &[u8],
    ) -> Result<(), EncodeError> {
        if self.open.is_some() {
            return Err(EncodeError::Order("base pages inside a checkpoint"));
        }
        check_pages(entries.clone(), data)?;
        self.section(out, Kind::BasePages, data, |out| put_entries(out, round, entries, data));
        Ok(())
    }

    /// Appends [`CheckpointBegin`].
    ///
    /// # Errors
    /// [`EncodeError::Order`] if one is open already.
    pub fn checkpoint_begin(
        &mut self,
        out: &mut Vec<u8>,
        begin: &CheckpointBegin,
    ) -> Result<(), EncodeError> {
        if self.open.is_some() {
            return Err(EncodeError::Order("a checkpoint inside another one"));
        }
        let header = self.section(out, Kind::CheckpointBegin, &[], |out| {
            out.extend_from_slice(&begin.generation.to_le_bytes());
            out.extend_from_slice(&begin.number.to_le_bytes());
            out.extend_from_slice(&begin.pages.to_le_bytes());
            out.extend_from_slice(&begin.state_bytes.to_le_bytes());
            out.extend_from_slice(&begin.flags.to_wire().to_le_bytes());
            out.extend_from_slice(&begin.disk_bytes.to_le_bytes());
        });
        let mut chain = crc32fast::Hasher::new();
        chain.update(&header.chained());
        self.open = Some(Open { begin: *begin, pages: 0, state_bytes: 0, disk_bytes: 0, chain });
        Ok(())
    }

    /// Appends the head of a `Pages` section of the open checkpoint; `data` (the bytes of the raw entries, in
    /// order) must follow it. For pages that are all raw: `gfns.iter().map(|gfn| PageEntry::raw(*gfn))`.
    ///
    /// # Errors
    /// [`EncodeError::TooManyPages`], [`EncodeError::DataLength`], [`EncodeError::Order`].
    pub fn pages_head(
        &mut self,
        out: &mut Vec<u8>,
        entries: impl ExactSizeIterator<Item = PageEntry> + Clone,
        data: &[u8],
    ) -> Result<(), EncodeError> {
        check_pages(entries.clone(), data)?;
        let mut open = self.open.take().ok_or(EncodeError::Order("pages outside a checkpoint"))?;
        open.pages = open.pages.saturating_add(entries.len() as u32);
        let number = open.begin.number;
        let header = self.section(out, Kind::Pages, data, |out| put_entries(out, number, entries, data));
        open.chain.update(&header.chained());
        self.open = Some(open);
        Ok(())
    }

    /// Appends the head of a `State` section of the open checkpoint; `state.bytes` must follow it.
    ///
    /// # Errors
    /// [`EncodeError::TooLong`], [`EncodeError::Order`].
    pub fn state_head(&mut self, out: &mut Vec<u8>, state: &StateRef<'_>) -> Result<(), EncodeError> {
        check_length("a state section", state.bytes.len(), MAX_STATE_SECTION)?;
        let mut open = self.open.take().ok_or(EncodeError::Order("state outside a checkpoint"))?;
        open.state_bytes = open.state_bytes.saturating_add(state.bytes.len() as u32);
        let number = open.begin.number;
        let header = self.section(out, Kind::State, state.bytes, |out| {
            out.extend_from_slice(&number.to_le_bytes());
            for half in [state.kind, state.version, state.index, 0] {
                out.extend_from_slice(&half.to_le_bytes());
            }
        });
        open.chain.update(&header.chained());
        self.open = Some(open);
        Ok(())
    }

    /// Appends the head of a `DiskWrites` section of the open checkpoint; `records` (see
    /// [`DiskRecord::put`](crate::DiskRecord::put)) must follow it.
    ///
    /// # Errors
    /// [`EncodeError::TooLong`], [`EncodeError::Records`], [`EncodeError::Order`].
    pub fn disk_writes_head(&mut self, out: &mut Vec<u8>, records: &[u8]) -> Result<(), EncodeError> {
        check_records(Kind::DiskWrites, records)?;
        let mut open = self.open.take().ok_or(EncodeError::Order("disk writes outside a checkpoint"))?;
        open.disk_bytes = open.disk_bytes.saturating_add(records.len() as u32);
        let number = open.begin.number;
        let header = self.section(out, Kind::DiskWrites, records, |out| {
            out.extend_from_slice(&number.to_le_bytes());
        });
        open.chain.update(&header.chained());
        self.open = Some(open);
        Ok(())
    }

    /// Appends the head of a `DiskBlocks` section; `records` must follow it.
    ///
    /// # Errors
    /// [`EncodeError::TooLong`], [`EncodeError::Records`], [`EncodeError::Order`] inside a checkpoint.
    pub fn disk_blocks_head(
        &mut self,
        out: &mut Vec<u8>,
        round: u64,
        records: &[u8],
    ) -> Result<(), EncodeError> {
        if self.open.is_some() {
            return Err(EncodeError::Order("disk blocks inside a checkpoint"));
        }
        check_records(Kind::DiskBlocks, records)?;
        self.section(out, Kind::DiskBlocks, records, |out| out.extend_from_slice(&round.to_le_bytes()));
        Ok(())
    }

    /// Appends [`DiskSums`].
    ///
    /// # Errors
    /// [`EncodeError::TooLong`] for the window, [`EncodeError::DataLength`] if there is not one sum a chunk,
    /// [`EncodeError::Order`] inside a checkpoint.
    pub fn disk_sums(&mut self, out: &mut Vec<u8>, window: &DiskSums<'_>) -> Result<(), EncodeError> {
        if self.open.is_some() {
            return Err(EncodeError::Order("disk sums inside a checkpoint"));
        }
        let DiskSums { disk, first, count, sums } = *window;
        let limit = if sums.is_some() { MAX_SUMS } else { MAX_ZERO_CHUNKS as usize };
        check_length("a window of sums", count as usize, limit)?;
        if let Some(sums) = sums
            && sums.len() != count as usize
        {
            let (expected, found) = (count as usize * DISK_SUM_LEN, sums.len() * DISK_SUM_LEN);
            return Err(EncodeError::DataLength { expected, found });
        }
        self.section(out, Kind::DiskSums, &[], |out| {
            out.extend_from_slice(&disk.to_le_bytes());
            out.extend_from_slice(&u16::from(sums.is_none()).to_le_bytes());
            out.extend_from_slice(&count.to_le_bytes());
            out.extend_from_slice(&first.to_le_bytes());
            out.extend_from_slice(sums.unwrap_or_default().as_flattened());
        });
        Ok(())
    }

    /// Appends [`DiskWant`].
    ///
    /// # Errors
    /// [`EncodeError::TooLong`].
    pub fn disk_want(&mut self, out: &mut Vec<u8>, want: &DiskWant) -> Result<(), EncodeError> {
        check_length("the list of wanted chunks", want.wanted.len(), MAX_SUMS)?;
        self.section(out, Kind::DiskWant, &[], |out| {
            out.extend_from_slice(&want.disk.to_le_bytes());
            out.extend_from_slice(&(want.wanted.len() as u16).to_le_bytes());
            out.extend_from_slice(&want.count.to_le_bytes());
            out.extend_from_slice(&want.first.to_le_bytes());
            want.wanted.iter().for_each(|at| out.extend_from_slice(&at.to_le_bytes()));
        });
        Ok(())
    }

    /// Appends [`CheckpointEnd`]. `stamp_us` is the primary's clock now.
    ///
    /// # Errors
    /// [`EncodeError::Order`]; [`EncodeError::Totals`] if the beginning said something else (the checkpoint
    /// then stays open, and no standby will ever take it for whole).
    pub fn checkpoint_end(&mut self, out: &mut Vec<u8>, stamp_us: u64) -> Result<(), EncodeError> {
        let open =
            self.open.take().ok_or(EncodeError::Order("the end of a checkpoint that was not begun"))?;
        let Open { begin, pages, state_bytes, disk_bytes, .. } = open;
        for (what, announced, sent) in [
            ("pages", begin.pages, pages),
            ("bytes of state", begin.state_bytes, state_bytes),
            ("bytes of disk writes", begin.disk_bytes, disk_bytes),
        ] {
            if announced != sent {
                let number = begin.number;
                self.open = Some(open);
                return Err(EncodeError::Totals { number, what, announced, sent });
            }
        }
        let end = CheckpointEnd {
            number: begin.number,
            stamp_us,
            pages,
            state_bytes,
            disk_bytes,
            chain: open.chain.finalize(),
        };
        self.section(out, Kind::CheckpointEnd, &[], |out| {
            out.extend_from_slice(&end.number.to_le_bytes());
            out.extend_from_slice(&end.stamp_us.to_le_bytes());
            out.extend_from_slice(&end.pages.to_le_bytes());
            out.extend_from_slice(&end.state_bytes.to_le_bytes());
            out.extend_from_slice(&end.chain.to_le_bytes());
            out.extend_from_slice(&end.disk_bytes.to_le_bytes());
        });
        Ok(())
    }

    /// Appends [`Ack`].
    pub fn ack(&mut self, out: &mut Vec<u8>, ack: &Ack) {
        self.section(out, Kind::Ack, &[], |out| {
            for word in [ack.generation, ack.number, ack.stamp_us] {
                out.extend_from_slice(&word.to_le_bytes());
            }
        });
    }

    /// Appends a heartbeat; allowed at any time after the introduction, also inside a checkpoint.
    pub fn heartbeat(&mut self, out: &mut Vec<u8>, stamp_us: u64) {
        self.section(out, Kind::Heartbeat, &[], |out| out.extend_from_slice(&stamp_us.to_le_bytes()));
    }

    /// Appends the orderly end of the VM.
    pub fn end(&mut self, out: &mut Vec<u8>, reason: EndReason) {
        self.section(out, Kind::End, &[], |out| out.extend_from_slice(&[reason as u8, 0, 0, 0]));
    }

    /// Appends the standby's orderly leave.
    pub fn leave(&mut self, out: &mut Vec<u8>, reason: LeaveReason) {
        self.section(out, Kind::Leave, &[], |out| out.extend_from_slice(&[reason as u8, 0, 0, 0]));
    }

    /// Appends a section: header, what `fixed` writes, and (not appended, but counted and summed) `data`.
    fn section(
        &mut self,
        out: &mut Vec<u8>,
        kind: Kind,
        data: &[u8],
        fixed: impl FnOnce(&mut Vec<u8>),
    ) -> SectionHeader {
        let start = out.len();
        out.extend_from_slice(&[0; HEADER_LEN]);
        fixed(out);
        let mut crc = crc32fast::Hasher::new();
        crc.update(&out[start + HEADER_LEN..]);
        crc.update(data);
        let length = out.len() - start - HEADER_LEN + data.len();
        debug_assert!(length <= kind.limit() as usize);
        let payload_crc = crc.finalize();
        let header = SectionHeader { kind, length: length as u32, payload_crc, sequence: self.sequence };
        out[start..start + HEADER_LEN].copy_from_slice(&header.encode());
        self.sequence += 1;
        header
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u16).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put_entries(out: &mut Vec<u8>, tag: u64, entries: impl ExactSizeIterator<Item = PageEntry>, data: &[u8]) {
    out.extend_from_slice(&tag.to_le_bytes());
    out.extend_from_slice(&(entries.len() as u32).to_le_bytes());
    out.extend_from_slice(&(data.len() as u32).to_le_bytes());
    for entry in entries {
        out.extend_from_slice(&entry.to_wire().to_le_bytes());
    }
}

fn check_length(field: &'static str, length: usize, limit: usize) -> Result<(), EncodeError> {
    if length > limit { Err(EncodeError::TooLong { field, length, limit }) } else { Ok(()) }
}

fn check_records(kind: Kind, records: &[u8]) -> Result<(), EncodeError> {
    check_length("a section of disk records", records.len(), MAX_RECORD_BYTES)?;
    DiskRecords::parse(kind, records).map(drop).map_err(|error| EncodeError::Records(error.to_string()))
}

fn check_pages(entries: impl ExactSizeIterator<Item = PageEntry>, data: &[u8]) -> Result<(), EncodeError> {
    if entries.len() > MAX_PAGES_PER_SECTION {
        return Err(EncodeError::TooManyPages(entries.len()));
    }
    let expected = entries.map(PageEntry::data_len).sum();
    if expected != data.len() {
        return Err(EncodeError::DataLength { expected, found: data.len() });
    }
    Ok(())
}
