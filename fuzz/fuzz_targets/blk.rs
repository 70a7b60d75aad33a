//! A disk whose driver writes whatever it likes into its memory.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| outlive_machine::devices::virtio::blk::fuzz::fuzz(data));
