use outlive_epoch::{DiskOp, DiskRecord, RecordBuf};

mod bookkeeping;
mod check;
mod journal;
mod pair;
mod power;
mod prepare;
mod replay;

/// Disk, offset and operation, one after another.
fn records(writes: &[(u16, u64, DiskOp<'_>)]) -> RecordBuf {
    let mut records = RecordBuf::with_capacity(32 << 20);
    for &(disk, offset, op) in writes {
        assert!(records.push(DiskRecord { disk, offset, op }));
    }
    records
}
