use outlive_epoch::{DiskOp, DiskRecord, Lineage, RecordBuf, VmId};

use super::provenance::{KnownArbiter, Provenance};

mod audit;
mod audit_reads;
mod book;
mod bookkeeping;
mod check;
mod journal;
mod overwrite;
mod pair;
mod part;
mod power;
mod prepare;
mod replay;
mod shared;
mod start;

/// Disk, offset and operation, one after another.
fn records(writes: &[(u16, u64, DiskOp<'_>)]) -> RecordBuf {
    let mut records = RecordBuf::with_capacity(32 << 20);
    for &(disk, offset, op) in writes {
        assert!(records.push(DiskRecord { disk, offset, op }));
    }
    records
}

/// Of a VM that has an arbiter.
pub(crate) fn provenance(vm: VmId) -> Provenance {
    let arbiter = KnownArbiter::Id("9c01".repeat(8));
    Provenance { vm, name: "server".into(), arbiter, lineage: Lineage::default() }
}
