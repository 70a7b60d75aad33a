//! The key-value store: a hash table that never rehashes, within a memory budget.
//!
//! Built for few dirty pages: the bucket array has its final size from the start, an entry never moves, and
//! key and value share one allocation that is overwritten in place. A SET or INCR of an existing key whose
//! value still fits writes one page (two when the value crosses a page boundary).

use alloc::vec::Vec;
use core::hash::Hasher;
use core::mem;

use siphasher::sip::SipHasher13;

use super::resp::MAX_BULK;

/// End of a chain.
const NONE: u32 = u32::MAX;
/// Entries are allocated in groups of this many.
const GROUP: usize = 64;
/// The overhead of an allocation, rounded up.
const ALLOCATION_COST: usize = 16;
/// The overhead of a key, beside the bytes of key and value.
pub const KEY_COST: usize = mem::size_of::<Entry>() + ALLOCATION_COST;
/// The bytes of budget for each bucket.
const BYTES_PER_BUCKET: usize = 256;

/// Why a write was refused. The store is as it was before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreError {
    /// The budget, or the heap, is used up.
    OutOfMemory,
    /// The value would be longer than [`MAX_BULK`].
    TooLong,
}

#[derive(Debug)]
struct Entry {
    /// Key, then value. Empty capacity when the entry is free.
    data: Vec<u8>,
    key_len: u32,
    hash: u32,
    /// Next entry of the bucket, or next free entry.
    next: u32,
}

/// Strings by key.
#[derive(Debug)]
pub struct Store {
    buckets: Vec<u32>,
    groups: Vec<Vec<Entry>>,
    free: u32,
    keys: usize,
    used: usize,
    limit: usize,
    seed: (u64, u64),
}

impl Store {
    /// An empty store for `limit` bytes, its hash function keyed by `seed` so that nobody can aim at one
    /// bucket.
    pub fn new(limit: usize, seed: (u64, u64)) -> Result<Self, StoreError> {
        let count = (limit / BYTES_PER_BUCKET).clamp(16, 1 << 24).next_power_of_two();
        let mut buckets = Vec::new();
        buckets.try_reserve_exact(count).map_err(|_| StoreError::OutOfMemory)?;
        buckets.resize(count, NONE);
        Ok(Self { buckets, groups: Vec::new(), free: NONE, keys: 0, used: 0, limit, seed })
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.keys
    }

    /// Bytes of the budget in use.
    pub fn used(&self) -> usize {
        self.used
    }

    /// The budget.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// The value of `key`.
    pub fn get(&self, key: &[u8]) -> Option<&[u8]> {
        let entry = self.entry(self.find(key, self.hash(key))?);
        Some(&entry.data[entry.key_len as usize..])
    }

    /// The value of `key` for changes that keep its length.
    pub fn get_mut(&mut self, key: &[u8]) -> Option<&mut [u8]> {
        let index = self.find(key, self.hash(key))?;
        let entry = self.entry_mut(index);
        let key_len = entry.key_len as usize;
        Some(&mut entry.data[key_len..])
    }

    /// Sets `key` to `value`.
    pub fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        check_length(value.len())?;
        let hash = self.hash(key);
        match self.find(key, hash) {
            Some(index) => self.overwrite(index, value),
            None => self.insert(key, hash, value),
        }
    }

    /// Adds `tail` to the value of `key` and returns the new length; a missing key counts as empty.
    pub fn append(&mut self, key: &[u8], tail: &[u8]) -> Result<usize, StoreError> {
        let hash = self.hash(key);
        let Some(index) = self.find(key, hash) else {
            check_length(tail.len())?;
            return self.insert(key, hash, tail).map(|()| tail.len());
        };
        let (len, key_len) = (self.entry(index).data.len(), self.entry(index).key_len as usize);
        check_length(len - key_len + tail.len())?;
        self.grow(index, len + tail.len(), true)?;
        self.entry_mut(index).data.extend_from_slice(tail);
        Ok(len - key_len + tail.len())
    }

    /// True when these pairs fit at once even if all keys are new: the worst case.
    pub fn has_room<'a>(&self, pairs: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> bool {
        let need: usize = pairs.map(|(key, value)| KEY_COST + key.len() + value.len()).sum();
        self.used.saturating_add(need) <= self.limit
    }

    /// Removes `key`. False when there was none.
    pub fn remove(&mut self, key: &[u8]) -> bool {
        let hash = self.hash(key);
        let Some(index) = self.find(key, hash) else { return false };
        let next = self.entry(index).next;
        match self.predecessor(index, hash) {
            Some(previous) => self.entry_mut(previous).next = next,
            None => {
                let bucket = self.bucket(hash);
                self.buckets[bucket] = next;
            }
        }
        let free = self.free;
        let entry = self.entry_mut(index);
        let freed = entry.data.capacity();
        entry.data = Vec::new();
        entry.next = free;
        self.free = index;
        self.used -= freed + KEY_COST;
        self.keys -= 1;
        true
    }

    /// Removes everything.
    pub fn clear(&mut self) {
        let groups = mem::take(&mut self.groups);
        // Only the buckets in use: writing all of them would dirty megabytes for a handful of keys.
        for entry in groups.iter().flatten() {
            let bucket = self.bucket(entry.hash);
            self.buckets[bucket] = NONE;
        }
        (self.free, self.keys, self.used) = (NONE, 0, 0);
    }

    fn hash(&self, key: &[u8]) -> u32 {
        let mut hasher = SipHasher13::new_with_keys(self.seed.0, self.seed.1);
        hasher.write(key);
        hasher.finish() as u32
    }

    fn bucket(&self, hash: u32) -> usize {
        hash as usize & (self.buckets.len() - 1)
    }

    fn entry(&self, index: u32) -> &Entry {
        &self.groups[index as usize / GROUP][index as usize % GROUP]
    }

    fn entry_mut(&mut self, index: u32) -> &mut Entry {
        &mut self.groups[index as usize / GROUP][index as usize % GROUP]
    }

    fn find(&self, key: &[u8], hash: u32) -> Option<u32> {
        let mut index = self.buckets[self.bucket(hash)];
        while index != NONE {
            let entry = self.entry(index);
            if entry.hash == hash && &entry.data[..entry.key_len as usize] == key {
                return Some(index);
            }
            index = entry.next;
        }
        None
    }

    fn predecessor(&self, index: u32, hash: u32) -> Option<u32> {
        let mut previous = None;
        let mut at = self.buckets[self.bucket(hash)];
        while at != index && at != NONE {
            previous = Some(at);
            at = self.entry(at).next;
        }
        previous
    }

    fn insert(&mut self, key: &[u8], hash: u32, value: &[u8]) -> Result<(), StoreError> {
        check_length(key.len())?;
        let len = key.len() + value.len();
        if self.used.saturating_add(len + KEY_COST) > self.limit {
            return Err(StoreError::OutOfMemory);
        }
        let mut data = Vec::new();
        data.try_reserve_exact(len).map_err(|_| StoreError::OutOfMemory)?;
        data.extend_from_slice(key);
        data.extend_from_slice(value);
        let index = self.take_free()?;
        self.used += data.capacity() + KEY_COST;
        self.keys += 1;
        let bucket = self.bucket(hash);
        let next = mem::replace(&mut self.buckets[bucket], index);
        *self.entry_mut(index) = Entry { data, key_len: key.len() as u32, hash, next };
        Ok(())
    }

    /// A free entry, from the list or from a new group.
    fn take_free(&mut self) -> Result<u32, StoreError> {
        if self.free == NONE {
            let base = self.groups.len() * GROUP;
            let mut group = Vec::new();
            let room = self.groups.try_reserve(1).and_then(|()| group.try_reserve_exact(GROUP));
            if room.is_err() || base + GROUP >= NONE as usize {
                return Err(StoreError::OutOfMemory);
            }
            let next = |i: usize| if i + 1 < GROUP { (base + i + 1) as u32 } else { NONE };
            group.extend((0..GROUP).map(|i| Entry { data: Vec::new(), key_len: 0, hash: 0, next: next(i) }));
            self.groups.push(group);
            self.free = base as u32;
        }
        let index = self.free;
        self.free = self.entry(index).next;
        Ok(index)
    }

    fn overwrite(&mut self, index: u32, value: &[u8]) -> Result<(), StoreError> {
        let (capacity, key_len) = (self.entry(index).data.capacity(), self.entry(index).key_len as usize);
        let len = key_len + value.len();
        if len <= capacity && capacity <= 2 * len + 64 {
            let data = &mut self.entry_mut(index).data;
            if data.len() == len {
                data[key_len..].copy_from_slice(value);
            } else {
                data.truncate(key_len);
                data.extend_from_slice(value);
            }
            return Ok(());
        }
        // Too small, or so large that the rest should go back to the heap: the value moves.
        if self.used - capacity + len > self.limit {
            return Err(StoreError::OutOfMemory);
        }
        let mut data = Vec::new();
        data.try_reserve_exact(len).map_err(|_| StoreError::OutOfMemory)?;
        data.extend_from_slice(&self.entry(index).data[..key_len]);
        data.extend_from_slice(value);
        self.used = self.used - capacity + data.capacity();
        self.entry_mut(index).data = data;
        Ok(())
    }

    /// Makes room for `len` bytes in an entry, with slack for further appends when there is budget for it.
    fn grow(&mut self, index: u32, len: usize, slack: bool) -> Result<(), StoreError> {
        let capacity = self.entry(index).data.capacity();
        if len <= capacity {
            return Ok(());
        }
        let others = self.used - capacity;
        let wanted = if slack && others + len + len / 2 <= self.limit { len + len / 2 } else { len };
        if others + wanted > self.limit {
            return Err(StoreError::OutOfMemory);
        }
        let data = &mut self.entry_mut(index).data;
        data.try_reserve_exact(wanted - data.len()).map_err(|_| StoreError::OutOfMemory)?;
        let grown = data.capacity();
        self.used = others + grown;
        Ok(())
    }
}

fn check_length(len: usize) -> Result<(), StoreError> {
    if len > MAX_BULK { Err(StoreError::TooLong) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Op {
        Set(u8, Vec<u8>),
        Append(u8, Vec<u8>),
        Remove(u8),
        Get(u8),
        Clear,
    }

    fn op() -> impl Strategy<Value = Op> {
        let value = || {
            prop_oneof![prop::collection::vec(any::<u8>(), 0..40), prop::collection::vec(any::<u8>(), 300)]
        };
        prop_oneof![
            6 => (any::<u8>(), value()).prop_map(|(key, value)| Op::Set(key % 60, value)),
            3 => (any::<u8>(), value()).prop_map(|(key, value)| Op::Append(key % 60, value)),
            3 => any::<u8>().prop_map(|key| Op::Remove(key % 60)),
            3 => any::<u8>().prop_map(|key| Op::Get(key % 60)),
            1 => (0..40_u8).prop_map(|n| if n == 0 { Op::Clear } else { Op::Get(n) }),
        ]
    }

    /// The memory that the store reports is the memory that it holds.
    fn check_accounting(store: &Store, oracle: &HashMap<Vec<u8>, Vec<u8>>) {
        assert_eq!(store.len(), oracle.len());
        assert!(store.used() <= store.limit());
        let least: usize = oracle.iter().map(|(key, value)| key.len() + value.len() + KEY_COST).sum();
        assert!(store.used() >= least);
        if oracle.is_empty() {
            assert_eq!(store.used(), 0);
        }
    }

    fn key(n: u8) -> Vec<u8> {
        format!("key:{n}").into_bytes()
    }

    proptest! {
        #[test]
        fn behaves_like_a_map(limit in 1000_usize..60_000, ops in prop::collection::vec(op(), 1..400)) {
            let mut store = Store::new(limit, (1, 2)).unwrap();
            let mut oracle: HashMap<Vec<u8>, Vec<u8>> = HashMap::new();
            for op in ops {
                match op {
                    Op::Set(n, value) => match store.set(&key(n), &value) {
                        Ok(()) => { oracle.insert(key(n), value); }
                        Err(error) => {
                            prop_assert_eq!(error, StoreError::OutOfMemory);
                            prop_assert!(store.used() + key(n).len() + value.len() + KEY_COST > limit);
                        }
                    },
                    Op::Append(n, tail) => match store.append(&key(n), &tail) {
                        Ok(len) => {
                            let value = oracle.entry(key(n)).or_default();
                            value.extend_from_slice(&tail);
                            prop_assert_eq!(len, value.len());
                        }
                        Err(error) => prop_assert_eq!(error, StoreError::OutOfMemory),
                    },
                    Op::Remove(n) => prop_assert_eq!(store.remove(&key(n)), oracle.remove(&key(n)).is_some()),
                    Op::Get(n) => prop_assert_eq!(store.get(&key(n)), oracle.get(&key(n)).map(Vec::as_slice)),
                    Op::Clear => { store.clear(); oracle.clear(); }
                }
                check_accounting(&store, &oracle);
            }
            for (key, value) in &oracle {
                prop_assert_eq!(store.get(key), Some(value.as_slice()));
            }
        }
    }

    #[test]
    fn same_length_values_stay_where_they_are() {
        let mut store = Store::new(1 << 20, (3, 4)).unwrap();
        store.set(b"counter", b"100").unwrap();
        let before = store.get(b"counter").unwrap().as_ptr();
        store.set(b"counter", b"101").unwrap();
        store.set(b"counter", b"99").unwrap();
        assert_eq!(store.get(b"counter").unwrap().as_ptr(), before);
        assert_eq!(store.get(b"counter"), Some(&b"99"[..]));
    }

    #[test]
    fn a_full_store_refuses_and_serves_on() {
        let mut store = Store::new(100_000, (5, 6)).unwrap();
        let mut count = 0_u32;
        while store.set(&count.to_le_bytes(), &[7; 100]).is_ok() {
            count += 1;
        }
        assert!(count > 400, "only {count} keys in 100,000 bytes");
        assert_eq!(store.get(&0_u32.to_le_bytes()), Some(&[7; 100][..]));
        assert!(store.set(&0_u32.to_le_bytes(), &[8; 100]).is_ok(), "overwriting in place needs no memory");
        assert_eq!(store.append(&0_u32.to_le_bytes(), &[0; 5000]), Err(StoreError::OutOfMemory));
        assert!(store.remove(&1_u32.to_le_bytes()));
        assert!(store.set(b"new", &[9; 50]).is_ok());
    }

    #[test]
    fn long_values_shrink_and_the_longest_is_bounded() {
        let mut store = Store::new(MAX_BULK * 2, (7, 8)).unwrap();
        store.set(b"k", &vec![1; MAX_BULK]).unwrap();
        assert_eq!(store.set(b"k", &vec![1; MAX_BULK + 1]), Err(StoreError::TooLong));
        assert_eq!(store.append(b"k", b"x"), Err(StoreError::TooLong));
        store.set(b"k", b"short").unwrap();
        assert!(store.used() < 1000, "the long buffer is still there: {}", store.used());
    }
}
