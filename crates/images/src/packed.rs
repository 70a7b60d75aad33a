//! Compressed clusters. What they become is bounded by the cluster's length, whatever their streams say.

use std::io::Read;

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::{
    TINFL_FLAG_PARSE_ZLIB_HEADER, TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF,
};
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};
use ruzstd::decoding::StreamingDecoder;

use crate::error::ReadError;
use crate::layer::Codec;

/// The largest window of a zstd stream: none needs more than a cluster, which has 2 MiB at most.
const WINDOW: u64 = 8 << 20;

/// Unpacks a cluster into `cluster`, which it fills. Returns how many bytes of `packed` that took: what is behind them is
/// of no interest, because the end of a cluster is only known by the sector.
pub(crate) fn unpack(codec: Codec, packed: &[u8], cluster: &mut [u8]) -> Result<usize, ReadError> {
    match codec {
        Codec::Deflate => inflate(packed, cluster, 0),
        Codec::Zlib => inflate(packed, cluster, TINFL_FLAG_PARSE_ZLIB_HEADER),
        Codec::Zstd => unzstd(packed, cluster),
    }
}

fn inflate(packed: &[u8], cluster: &mut [u8], flags: u32) -> Result<usize, ReadError> {
    let mut state = Box::<DecompressorOxide>::default();
    let flags = flags | TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (status, read, written) = decompress(&mut state, packed, cluster, 0, flags);
    // A stream that would go on has filled the cluster all the same; what is behind it is nobody's.
    let full = matches!(status, TINFLStatus::Done | TINFLStatus::HasMoreOutput) && written == cluster.len();
    if full { Ok(read) } else { Err(ReadError::damaged("a compressed cluster cannot be unpacked")) }
}

fn unzstd(packed: &[u8], cluster: &mut [u8]) -> Result<usize, ReadError> {
    let wrong = |why: String| ReadError::Damaged(format!("a compressed cluster cannot be unpacked: {why}"));
    let mut rest = packed;
    let mut stream = StreamingDecoder::new_with_max_window_size(&mut rest, WINDOW)
        .map_err(|why| wrong(why.to_string()))?;
    stream.read_exact(cluster).map_err(|why| wrong(why.to_string()))?;
    drop(stream);
    Ok(packed.len() - rest.len())
}
