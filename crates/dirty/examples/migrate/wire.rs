//! Pages on a socket: an address, then 4096 bytes; the address `END` asks for an answer.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::thread::JoinHandle;

use crate::guest::PAGE;
use crate::vm::{Plan, View};

const END: u64 = u64::MAX;
/// Bytes that are written at once.
const BATCH: usize = 64 * (PAGE as usize + 8);

/// The thread at the other end of a connection.
pub(crate) type Receiver = JoinHandle<io::Result<()>>;

/// The sending end of one connection.
pub(crate) struct Sender {
    stream: TcpStream,
    view: View,
    batch: Vec<u8>,
}

impl Sender {
    /// Reads pages as they are now, and sends them.
    pub(crate) fn send(&mut self, gpas: impl Iterator<Item = u64>) -> io::Result<()> {
        for gpa in gpas {
            self.batch.extend(gpa.to_le_bytes());
            let at = self.batch.len();
            self.batch.resize(at + PAGE as usize, 0);
            self.view.copy_page(gpa, &mut self.batch[at..]);
            if self.batch.len() >= BATCH {
                self.flush()?;
            }
        }
        self.flush()
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.batch)?;
        self.batch.clear();
        Ok(())
    }

    /// Returns once the other side has everything in its memory.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        self.stream.write_all(&END.to_le_bytes())?;
        self.stream.read_exact(&mut [0])
    }
}

/// Connections to a receiver, which writes everything that it receives into its memory file.
pub(crate) fn connect(
    streams: u32,
    view: View,
    plan: Plan,
    memory: &File,
) -> io::Result<(Vec<Sender>, Vec<Receiver>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let (mut senders, mut receivers) = (Vec::new(), Vec::new());
    for _ in 0..streams {
        let stream = TcpStream::connect(listener.local_addr()?)?;
        stream.set_nodelay(true)?;
        let (other, _) = listener.accept()?;
        let memory = memory.try_clone()?;
        receivers.push(std::thread::spawn(move || receive(other, plan, &memory)));
        senders.push(Sender { stream, view, batch: Vec::with_capacity(BATCH) });
    }
    Ok((senders, receivers))
}

fn receive(mut stream: TcpStream, plan: Plan, memory: &File) -> io::Result<()> {
    let mut page = [0; PAGE as usize];
    let mut input = io::BufReader::with_capacity(BATCH, stream.try_clone()?);
    loop {
        let mut address = [0; 8];
        match input.read_exact(&mut address) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        }
        let gpa = u64::from_le_bytes(address);
        if gpa == END {
            stream.write_all(&[1])?;
            continue;
        }
        input.read_exact(&mut page)?;
        let offset = plan.offset(gpa);
        if gpa % PAGE != 0 || offset >= plan.bytes {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no page of the VM"));
        }
        memory.write_all_at(&page, offset)?;
    }
}

/// How many pages of two files differ; holes read as zero.
pub(crate) fn differing_pages(one: &File, other: &File) -> io::Result<u64> {
    let mut extents = crate::vm::extents(one)?;
    extents.extend(crate::vm::extents(other)?);
    extents.sort_by_key(|extent| extent.start);
    let (mut different, mut from) = (0, 0);
    let mut pages = [[0; PAGE as usize]; 2];
    for extent in extents {
        let start = extent.start.max(from);
        for offset in (start..extent.end).step_by(PAGE as usize) {
            one.read_exact_at(&mut pages[0], offset)?;
            other.read_exact_at(&mut pages[1], offset)?;
            different += u64::from(pages[0] != pages[1]);
        }
        from = from.max(extent.end);
    }
    Ok(different)
}
