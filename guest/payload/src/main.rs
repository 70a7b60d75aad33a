//! The program inside the VM: a Redis protocol server on bare (virtual) metal.
//!
//! It runs at CPL3 without a kernel, takes no interrupts and talks to the VMM by a virtio-mmio network card
//! and three ports. ../README.md describes memory map, ports and commands; `abi` is the contract with the
//! VMM.
#![no_std]
#![no_main]

extern crate alloc;

#[path = "../../src/abi.rs"]
#[allow(dead_code, reason = "the VMM's half of the contract")]
mod abi;
mod console;
mod cpu;
mod heap;
mod logic;
mod machine;
mod mem;
mod pool;
mod virtio;

use abi::BootInfo;
use logic::clock::Clock;
use logic::server::{Address, Limits, Server};
use pool::Pool;
use virtio::Net;

unsafe extern "C" {
    /// First byte after the image, from link.ld.
    static _image_end: u8;
}

/// Where every vCPU starts; `abi` describes its state.
#[unsafe(no_mangle)]
extern "C" fn _start(info: *const BootInfo, index: u32) -> ! {
    // SAFETY: the VMM passes the address of the block it wrote; nobody changes it.
    let info = unsafe { &*info };
    if let Some(problem) = info.problem() {
        if index > 0 {
            sleep_for_ever();
        }
        panic!("{problem}");
    }
    let heap_start = (&raw const _image_end) as u64;
    let heap_len = (info.low_bytes / 2) & !4095;
    // SAFETY: image, heap and pool do not overlap, the rest of the RAM (below 2 MiB) is tables and stacks.
    let pool = unsafe { Pool::new(info, heap_start + heap_len) };
    if index > 0 {
        if index >= info.vcpus {
            sleep_for_ever();
        }
        // SAFETY: each vCPU comes here once with its own index.
        unsafe { machine::work(info, pool, index) }
    }
    // SAFETY: the RAM from the end of the image belongs to the heap alone, and only vCPU 0 comes here, once.
    unsafe { boot(info, pool, heap_start as usize, heap_len as usize) }
}

fn sleep_for_ever() -> ! {
    loop {
        cpu::idle(abi::IDLE_FOREVER);
    }
}

/// Sets everything up on vCPU 0.
///
/// # Safety
/// Called once; `[heap_start, heap_start + heap_len)` is unused RAM.
unsafe fn boot(info: &BootInfo, pool: Pool, heap_start: usize, heap_len: usize) -> ! {
    // SAFETY: the caller's promise.
    if !unsafe { heap::init(heap_start, heap_len) } {
        panic!("no room for a heap");
    }
    let mut clock = Clock::new(info.tsc_khz, cpu::tsc());
    if info.net_mmio_base == 0 {
        console::line(format_args!(
            "outlive-payload {}: no network, nothing to do",
            env!("CARGO_PKG_VERSION")
        ));
        sleep_for_ever();
    }
    // SAFETY: the VMM names the window of its network card, which this driver alone uses.
    let mut net = match unsafe { Net::new(info.net_mmio_base) } {
        Ok(net) => net,
        Err(error) => panic!("{error}"),
    };
    let address = Address { mac: net.mac(), ipv4: info.ipv4, prefix: info.prefix, gateway: info.gateway };
    let limits = Limits::for_heap(heap_len);
    let now = clock.update(cpu::tsc());
    let Ok(server) = Server::new(&mut net, address, limits, &info.random_seed, now) else {
        panic!("not enough memory for the server");
    };
    let [a, b, c, d] = info.ipv4;
    console::line(format_args!(
        "outlive-payload {}: {} vCPU, {} MiB, serving {} clients on {a}.{b}.{c}.{d}:{}",
        env!("CARGO_PKG_VERSION"),
        info.vcpus,
        info.memory_bytes >> 20,
        limits.connections,
        abi::SERVER_PORT,
    ));
    // SAFETY: this is vCPU 0 and `boot` runs once.
    unsafe { machine::serve(info, pool, net, server, clock) }
}
