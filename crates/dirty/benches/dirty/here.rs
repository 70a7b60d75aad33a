//! The machine, in a line: without it a number says little.

use std::fs;

/// Processor, kernel, and the module that runs the VMs.
pub(crate) fn describe() -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown processor", |(_, model)| model.trim());
    let processors = std::thread::available_parallelism().map_or(1, |number| number.get());
    let modules: Vec<String> = fs::read_dir("/sys/module")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm_"))
        .collect();
    let modules = if modules.is_empty() { "kvm".to_string() } else { modules.join(", ") };
    format!(
        "{model}, {processors} processors, Linux {}, {modules}",
        read("/proc/sys/kernel/osrelease").trim()
    )
}
