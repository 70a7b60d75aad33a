use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::kernel::KernelError;
use super::params::memory_map;
use super::*;
use crate::map::HOLE_END;
use crate::map::linux::ACPI;

const MIB: u64 = 1 << 20;
const SETUP: usize = 5 * 512;

fn ram() -> Ram {
    Ram::new(64 * MIB, 1024).unwrap()
}

fn set(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The least that is a bzImage: a header and some code, which is its own offset in bytes of 8.
pub(crate) fn bzimage() -> Vec<u8> {
    let mut image = vec![0; SETUP + 0x1000];
    image[0x1f1] = 4; // setup sectors
    set(&mut image, 0x1f4, &(0x1000u32 / 16).to_le_bytes()); // syssize
    image[0x201] = 0x6a; // header up to 0x26c
    set(&mut image, 0x202, b"HdrS");
    set(&mut image, 0x206, &0x020fu16.to_le_bytes());
    image[0x211] = 1; // loaded high
    set(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    set(&mut image, 0x236, &1u16.to_le_bytes()); // 64-bit entry
    set(&mut image, 0x238, &2047u32.to_le_bytes()); // cmdline_size
    set(&mut image, 0x258, &(16 * MIB).to_le_bytes()); // pref_address
    set(&mut image, 0x260, &(4 * MIB as u32).to_le_bytes()); // init_size
    set(&mut image, SETUP, b"the kernel's first bytes");
    image
}

/// The least that is a `vmlinux`: one segment with more memory than file.
fn elf() -> Vec<u8> {
    let mut image = vec![0; 0x200];
    set(&mut image, 0, &[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    set(&mut image, 16, &2u16.to_le_bytes());
    set(&mut image, 18, &62u16.to_le_bytes());
    set(&mut image, 24, &(16 * MIB + 0x10).to_le_bytes()); // entry
    set(&mut image, 32, &64u64.to_le_bytes()); // program headers
    set(&mut image, 54, &56u16.to_le_bytes());
    set(&mut image, 56, &1u16.to_le_bytes());
    let segment = 64;
    set(&mut image, segment, &1u32.to_le_bytes());
    set(&mut image, segment + 8, &0x100u64.to_le_bytes()); // offset
    set(&mut image, segment + 24, &(16 * MIB).to_le_bytes()); // address
    set(&mut image, segment + 32, &0x100u64.to_le_bytes()); // in file
    set(&mut image, segment + 40, &0x3000u64.to_le_bytes()); // in memory
    set(&mut image, 0x100, b"vmlinux");
    image
}

fn boot(kernel: Vec<u8>, initrd: &[u8], command_line: &str) -> LinuxBoot {
    LinuxBoot::new(kernel, initrd.to_vec(), command_line.to_string()).unwrap()
}

fn load_in(ram: &Ram, boot: &LinuxBoot) -> Result<u64, LinuxBootError> {
    load(ram, boot, &Description { vcpus: 2, ..Default::default() })
}

fn read(ram: &Ram, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

#[test]
fn everything_is_where_the_boot_protocol_wants_it() {
    let ram = ram();
    let entry = load_in(&ram, &boot(bzimage(), b"initrd!", "console=ttyS0")).unwrap();
    assert_eq!(entry, 16 * MIB + 0x200);
    assert_eq!(read(&ram, 16 * MIB, 24), b"the kernel's first bytes");
    assert_eq!(read(&ram, COMMAND_LINE.base, 14), b"console=ttyS0\0");
    let page = read(&ram, ZERO_PAGE.base, 4096);
    let word = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().unwrap());
    assert_eq!((page[0x1e8], page[0x1ef], page[0x210], page[0x211] & 1), (3, 0, 0xff, 1));
    assert_eq!((word(0x202), word(0x228)), (0x5372_6448, COMMAND_LINE.base as u32));
    assert_eq!(word(0x070), ACPI.base as u32);
    let initrd = u64::from(word(0x218));
    assert_eq!((initrd, word(0x21c)), (64 * MIB - 4096, 7));
    assert_eq!(read(&ram, initrd, 7), b"initrd!");
    assert_eq!(read(&ram, ACPI.base, 8), b"RSD PTR ");
    assert_eq!(word(0x260), 4 << 20, "the kernel's own header");
}

#[test]
fn a_jump_to_the_reset_vector_resets() {
    let ram = ram();
    load_in(&ram, &boot(bzimage(), b"", "")).unwrap();
    // mov dx, 0x602; mov al, 1; out dx, al
    assert_eq!(read(&ram, 0xf_fff0, 6), [0xba, 0x02, 0x06, 0xb0, 0x01, 0xee]);
}

#[test]
fn a_vmlinux_boots_too_and_its_memory_beyond_the_file_is_zero() {
    let ram = ram();
    ram.memory().write_slice(&[0xff; 0x3000], GuestAddress(16 * MIB)).unwrap();
    let entry = load_in(&ram, &boot(elf(), b"", "")).unwrap();
    assert_eq!(entry, 16 * MIB + 0x10);
    assert_eq!(read(&ram, 16 * MIB, 7), b"vmlinux");
    assert!(read(&ram, 16 * MIB + 0x100, 0x2f00).iter().all(|&byte| byte == 0));
    let page = read(&ram, ZERO_PAGE.base, 4096);
    assert_eq!(page[0x202..0x206], *b"HdrS");
    assert_eq!(page[0x218..0x220], [0; 8], "no initrd");
}

#[test]
fn the_memory_map_leaves_the_hole_and_the_first_megabyte_alone() {
    for (bytes, high) in [(256 * MIB, 0), (3 << 30, 0), (5 << 30, 2 << 30), (1 << 40, (1 << 40) - (3 << 30))]
    {
        let map = memory_map(bytes);
        assert!(map.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{map:x?}");
        assert_eq!(map[1], (0x9_fc00, 0x6_0400, 2));
        let usable: u64 = map.iter().filter(|entry| entry.2 == 1).map(|entry| entry.1).sum();
        assert_eq!(usable, bytes - 0x6_0400);
        let above = map.iter().find(|entry| entry.0 == HOLE_END);
        assert_eq!(above.map_or(0, |entry| entry.1), high);
        assert!(map.iter().all(|entry| entry.0 + entry.1 <= HOLE_START || entry.0 >= HOLE_END));
    }
}

#[test]
fn an_initrd_stays_below_what_the_kernel_allows_and_off_the_kernel() {
    let mut kernel = bzimage();
    set(&mut kernel, 0x22c, &(32 * MIB as u32 - 1).to_le_bytes());
    let ram = ram();
    load_in(&ram, &boot(kernel.clone(), &[1; 5000], "")).unwrap();
    let page = read(&ram, ZERO_PAGE.base, 4096);
    assert_eq!(u32::from_le_bytes(page[0x218..0x21c].try_into().unwrap()), 32 * MIB as u32 - 8192);
    let large = vec![1; 12 * MIB as usize + 1];
    assert!(matches!(load_in(&ram, &boot(kernel, &large, "")), Err(LinuxBootError::Initrd { .. })));
}

#[test]
fn a_command_line_longer_than_the_kernels_is_refused() {
    let fits = "a".repeat(2047);
    assert!(load_in(&ram(), &boot(bzimage(), b"", &fits)).is_ok());
    let error = load_in(&ram(), &boot(bzimage(), b"", &(fits + "b"))).unwrap_err();
    assert!(matches!(error, LinuxBootError::CommandLine { len: 2048, limit: 2047 }));
}

#[test]
fn kernels_of_other_kinds_are_refused_by_name() {
    let refusal = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut image = bzimage();
        change(&mut image);
        load_in(&ram(), &boot(image, b"", "")).unwrap_err().to_string()
    };
    assert!(refusal(&|image| image[0x236] = 0).contains("no 64-bit entry"));
    assert!(refusal(&|image| image[0x206] = 0x0b).contains("boot protocol 0x020b"));
    assert!(refusal(&|image| image.truncate(SETUP + 0x800)).contains("shorter than its header says"));
    assert!(refusal(&|image| image.truncate(SETUP - 1)).contains("truncated"));
    assert!(
        refusal(&|image| set(image, 0x258, &(u64::MAX - 10).to_le_bytes()))
            .contains("load address is invalid")
    );
    assert!(refusal(&|image| set(image, 0x258, &0x9_0000u64.to_le_bytes())).contains("below 1 MiB"));
    assert!(refusal(&|image| set(image, 0x260, &u32::MAX.to_le_bytes())).contains("needs memory up to"));
    assert!(refusal(&|image| image.clear()).contains("neither a bzImage"));
    let mut other = elf();
    set(&mut other, 18, &183u16.to_le_bytes());
    assert!(matches!(
        load_in(&ram(), &boot(other, b"", "")),
        Err(LinuxBootError::Kernel(KernelError::Format))
    ));
}

#[test]
fn every_kernel_that_is_cut_short_is_an_error_of_one_line() {
    for image in [bzimage(), elf()] {
        for len in (0..image.len()).step_by(7).chain([SETUP - 1, SETUP, image.len() - 1]) {
            let Err(error) = load_in(&ram(), &boot(image[..len.min(image.len())].to_vec(), b"", "")) else {
                // What an ELF file has behind its last segment is nothing that is loaded.
                assert!(len >= 0x200 || image.len() == 0x200 && len >= 0x1ff, "{len}");
                continue;
            };
            assert_eq!(error.to_string().lines().count(), 1);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever stands in the headers, loading ends in a kernel inside memory or in an error.
    #[test]
    fn headers_of_garbage_never_panic(
        elf_file in any::<bool>(),
        changes in prop::collection::vec((0usize..0x280, any::<u8>()), 1..24),
    ) {
        let mut image = if elf_file { elf() } else { bzimage() };
        for (at, byte) in changes {
            if let Some(to) = image.get_mut(at) {
                *to = byte;
            }
        }
        if let Ok(entry) = load_in(&ram(), &boot(image, b"initrd", "console=ttyS0")) {
            prop_assert!((MIB..64 * MIB).contains(&entry));
        }
    }

    #[test]
    fn bytes_of_garbage_never_panic(image in prop::collection::vec(any::<u8>(), 0..4096)) {
        prop_assert!(load_in(&ram(), &boot(image, b"", "")).is_err());
    }
}
