//! Windows of a tracker that is sampled while the guest runs.

use super::kernel::FakeKernel;
use crate::rate::{RateMeter, RateSampler};
use crate::{DirtyKind, Gfn, GlobalLog, HarvestError, MemoryLayout, MemorySlot, TrackerConfig};

#[test]
fn each_window_has_what_was_written_in_it() {
    for kind in [DirtyKind::Ring, DirtyKind::ClearLog, DirtyKind::Bitmap] {
        let slot = MemorySlot { id: 0, base: Gfn(0), pages: 10_000, host_addr: 0 };
        let layout = MemoryLayout::new(vec![slot]).unwrap();
        let (global, config) = (GlobalLog::new(10_000, 100), TrackerConfig::default());
        let config = config.with_max_vcpus(1);
        let (kernel, tracker) = FakeKernel::tracker(layout, config, kind, 16_384, global).unwrap();
        assert!(matches!(RateSampler::new(&tracker), Err(HarvestError::NotEnabled)));
        tracker.enable_stopped().unwrap();
        kernel.write(0, Gfn(1), false);
        let mut sampler = RateSampler::new(&tracker).unwrap();
        let mut meter = RateMeter::new(10_000);
        assert_eq!(sampler.window().unwrap().pages, [], "{kind}: what was before is forgotten");
        for round in 0..3 {
            // More pages than are fetched at once, and the same page written by the VMM.
            (0..5000).rev().for_each(|page| kernel.write(0, Gfn(round + page), false));
            tracker.global().mark(Gfn(9000));
            let window = sampler.window().unwrap();
            let expected: Vec<Gfn> = (round..round + 5000).chain([9000]).map(Gfn).collect();
            assert_eq!((window.devices, window.pages == expected), (1, true), "{kind}");
            meter.add(&window);
        }
        assert_eq!(meter.report().windows, 3);
        assert_eq!(sampler.window().unwrap().pages, [], "{kind}");
    }
}
