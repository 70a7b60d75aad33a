//! Programs of a few instructions, for tests and benchmarks.

/// Where the guests are linked.
const IMAGE: u64 = 0x20_0000;

/// A static ELF program of this code.
pub(crate) fn elf(code: &[u8]) -> Vec<u8> {
    let mut elf = vec![0u8; 120];
    elf[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    elf[16..18].copy_from_slice(&2u16.to_le_bytes());
    elf[18..20].copy_from_slice(&62u16.to_le_bytes());
    elf[24..32].copy_from_slice(&IMAGE.to_le_bytes());
    elf[32..40].copy_from_slice(&64u64.to_le_bytes());
    elf[54..56].copy_from_slice(&56u16.to_le_bytes());
    elf[56..58].copy_from_slice(&1u16.to_le_bytes());
    let header = &mut elf[64..];
    header[..4].copy_from_slice(&1u32.to_le_bytes());
    header[8..16].copy_from_slice(&120u64.to_le_bytes());
    header[24..32].copy_from_slice(&IMAGE.to_le_bytes());
    for at in [32, 40] {
        header[at..at + 8].copy_from_slice(&(code.len() as u64).to_le_bytes());
    }
    elf.extend_from_slice(code);
    elf
}
