//! Numbers in headers. A place behind the end reads as zeroes; headers are read whole, so there is none.

fn at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    let found = bytes.get(offset..).and_then(|rest| rest.first_chunk());
    found.copied().unwrap_or([0; N])
}

pub(crate) fn be32(bytes: &[u8], offset: usize) -> u32 {
    u32::from_be_bytes(at(bytes, offset))
}

pub(crate) fn be64(bytes: &[u8], offset: usize) -> u64 {
    u64::from_be_bytes(at(bytes, offset))
}

pub(crate) fn le16(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(at(bytes, offset))
}

pub(crate) fn le32(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(at(bytes, offset))
}

pub(crate) fn le64(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(at(bytes, offset))
}
