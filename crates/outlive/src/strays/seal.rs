//! How a stray goes over a network: sealed with the key of its link.
//!
//! A datagram is who has sealed it and its number, 4 and 8 bytes, little endian; then, sealed, the queue pair in 2 bytes and
//! the frame with its header of virtio-net; then a tag of 16 bytes. The first 12 bytes are the nonce, so no two datagrams
//! of a key may have the same: a process and its sentinel count apart, and each forwards once.

use outlive_epoch::StrayKey;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

/// Bytes that a datagram has beside the frame.
pub(super) const AROUND: usize = NONCE_LEN + PAIR + 16;
const PAIR: usize = 2;

/// Who seals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// The process that had the VM.
    Process = 0,
    /// Its sentinel.
    Sentinel = 1,
}

fn key(key: &StrayKey) -> LessSafeKey {
    let key = UnboundKey::new(&CHACHA20_POLY1305, &key.0);
    LessSafeKey::new(key.unwrap_or_else(|_| unreachable!("the key has the length of the algorithm's")))
}

/// Seals frames. There is one for each key and whoever seals.
pub(super) struct Sealer {
    key: LessSafeKey,
    by: By,
    next: u64,
}

impl Sealer {
    pub(super) fn new(of: &StrayKey, by: By) -> Self {
        Self { key: key(of), by, next: 0 }
    }

    /// Puts a datagram for this frame into `out`. False if nothing can be sealed any more.
    pub(super) fn seal(&mut self, pair: u16, packet: &[u8], out: &mut Vec<u8>) -> bool {
        let mut nonce = [0; NONCE_LEN];
        nonce[..4].copy_from_slice(&(self.by as u32).to_le_bytes());
        nonce[4..].copy_from_slice(&self.next.to_le_bytes());
        self.next += 1;
        out.clear();
        out.extend_from_slice(&nonce);
        out.extend_from_slice(&pair.to_le_bytes());
        out.extend_from_slice(packet);
        let nonce = Nonce::assume_unique_for_key(nonce);
        let tag = self.key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut out[NONCE_LEN..]);
        let Ok(tag) = tag else { return false };
        out.extend_from_slice(tag.as_ref());
        true
    }
}

/// Opens what was sealed with a key.
pub(super) struct Opener {
    key: LessSafeKey,
    /// The number that comes next at least, of each who seals.
    next: [u64; 2],
}

impl Opener {
    pub(super) fn new(of: &StrayKey) -> Self {
        Self { key: key(of), next: [0; 2] }
    }

    /// Queue pair and frame of a datagram. `None` if it was not sealed with this key, was changed, or is not newer than
    /// all before it: order is worth less than that nothing is given twice.
    pub(super) fn open<'a>(&mut self, datagram: &'a mut [u8]) -> Option<(u16, &'a [u8])> {
        let (nonce, sealed) = datagram.split_first_chunk_mut::<NONCE_LEN>()?;
        let (by, number) = nonce.split_first_chunk::<4>()?;
        let number = u64::from_le_bytes(number.try_into().ok()?);
        let next = self.next.get_mut(usize::try_from(u32::from_le_bytes(*by)).ok()?)?;
        if number < *next {
            return None;
        }
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let opened = self.key.open_in_place(nonce, Aad::empty(), sealed).ok()?;
        *next = number.checked_add(1)?;
        let (pair, packet) = opened.split_first_chunk::<PAIR>()?;
        Some((u16::from_le_bytes(*pair), packet))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn bytes(hex: &str) -> Vec<u8> {
        let pair = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        (0..hex.len()).step_by(2).map(pair).collect()
    }

    /// What two hosts of different releases send each other.
    #[test]
    fn the_datagrams_are_the_committed_ones() {
        let secret = StrayKey(std::array::from_fn(|at| 0xa0 ^ at as u8));
        let packets = [(0, &b"a frame with its header"[..]), (0x0102, &[0; 40][..]), (7, &[][..])];
        let (mut written, mut datagram) = (String::new(), Vec::new());
        for by in [By::Process, By::Sentinel] {
            let mut sealer = Sealer::new(&secret, by);
            for (pair, packet) in packets {
                assert!(sealer.seal(pair, packet, &mut datagram));
                assert_eq!(datagram.len(), packet.len() + AROUND);
                written += &(hex(&datagram) + "\n");
            }
        }
        let golden = golden::keeps("strays-v1.txt", &written);
        let mut opener = Opener::new(&secret);
        let mut opened = golden.lines().map(bytes).collect::<Vec<_>>();
        let read: Vec<_> = opened.iter_mut().map(|datagram| opener.open(datagram).unwrap()).collect();
        assert_eq!(read, [packets, packets].concat());
    }
}
