//! A network card whose driver writes whatever it likes into its memory.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    outlive_machine::devices::virtio::net::fuzz::run(data);
});
