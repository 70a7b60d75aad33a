//! The costs on this machine.

use std::time::{Duration, Instant};

use super::{BASE, Backing, Memory, open};
use crate::layout::MemoryLayout;
use crate::source::Source;

fn median(mut rounds: Vec<Duration>) -> f64 {
    rounds.sort_unstable();
    rounds[rounds.len() / 2].as_secs_f64() * 1e6
}

/// `cargo test --release -p outlive-dirty uffd::costs -- --ignored --nocapture --test-threads=1`
#[test]
#[ignore = "measures"]
fn costs() {
    for (gib, backing) in [(1, Backing::Private), (1, Backing::Shared), (4, Backing::Shared)] {
        let memory = Memory::new(backing, gib << 18).unwrap();
        let layout = MemoryLayout::new(vec![memory.slot(3, BASE)]).unwrap();
        let Some(uffd) = open(&layout) else { return };
        uffd.populate(0);
        for touched in [false, true] {
            if touched {
                (0..memory.pages).for_each(|page| memory.store(page, 1));
            }
            let begin = Instant::now();
            uffd.arm_all(&layout).unwrap();
            let arm = begin.elapsed();
            for written in [0, 1, 100, 1000, 3000] {
                let (mut writes, mut takes) = (Vec::new(), Vec::new());
                for round in 0..31 {
                    let begin = Instant::now();
                    (0..written).for_each(|page| memory.store(page * memory.pages / written, round));
                    writes.push(begin.elapsed());
                    let begin = Instant::now();
                    let taken = uffd.take_armed(&layout, true, &mut |_| true).unwrap();
                    takes.push(begin.elapsed());
                    assert_eq!(taken as u64, written);
                }
                println!(
                    "{gib} GiB {backing:?} touched {touched}: {written} pages: take {:.0} us, write fault {:.2} us",
                    median(takes),
                    median(writes) / written.max(1) as f64
                );
            }
            let begin = Instant::now();
            uffd.disarm_all(&layout).unwrap();
            println!("  arm_all {arm:?}, disarm_all {:?}", begin.elapsed());
        }
    }
}
