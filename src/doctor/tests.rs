use super::testing::{folder, shared_library};
use super::*;

fn nothing(_: &str) -> Option<String> {
    None
}

#[test]
fn a_machine_without_anything_gets_a_report() {
    let root = folder(&[]);
    let report = inspect_at(root.path(), &nothing, false);
    let text = report.to_string();
    assert!(
        text.contains("no GPU; the CPU ranks run everything"),
        "{text}"
    );
    assert!(
        text.contains("looked in the loader's path, CUDA_HOME (not set)"),
        "{text}"
    );
    assert!(text.contains("one process: rank 0 of 1"), "{text}");
    assert!(text.contains("an unknown amount"), "{text}");
    assert!(serde_json::to_value(&report).unwrap()["memory"]["total"] == 0);
}

#[test]
fn what_is_in_the_way_is_told_with_its_cost() {
    let root = folder(&[
        ("dev/nvidia0", ""),
        (
            "proc/meminfo",
            "MemTotal: 67108864 kB\nMemAvailable: 50331648 kB\n",
        ),
        (
            "proc/self/mountinfo",
            "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        ),
        ("proc/self/cgroup", "0::/job_7\n"),
        ("sys/fs/cgroup/job_7/memory.max", "8589934592\n"),
        ("proc/self/status", "Cpus_allowed_list:\t0-7\n"),
        ("sys/devices/system/cpu/online", "0-63\n"),
    ]);
    let report = inspect_at(root.path(), &nothing, false);
    let text = report.to_string();
    for line in [
        "allows 8 of 64 CPUs",
        "/sys/fs/cgroup/job_7 allows 8.00 GiB of the machine's 64.00 GiB",
        "GPU nodes in /dev (1) but no driver library",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
    assert_eq!(
        report.default_host_budget,
        Some((8 << 30) - memory::PROCESS_RESERVE)
    );
}

#[test]
fn a_driver_without_its_companions_costs_what_each_is_for() {
    let root = folder(&[]);
    let driver =
        "int cuInit(unsigned f) { return 0; } int cuDeviceGetCount(int *n) { *n = 0; return 0; }
        int cuDeviceGet(void) { return 1; } int cuDeviceGetName(void) { return 1; }
        int cuDeviceTotalMem_v2(void) { return 1; } int cuDeviceGetAttribute(void) { return 1; }";
    shared_library(root.path(), "usr/lib/wsl/lib/libcuda.so.1", driver);
    let text = inspect_at(root.path(), &nothing, false).to_string();
    for line in [
        "the driver shows no GPU: the CPU ranks",
        "no libcublasLt.so (looked in",
        "no libnvrtc.so",
        "no libnccl.so",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
}

#[test]
fn control_characters_of_the_environment_do_not_reach_the_terminal() {
    let env = |name: &str| (name == "CUDA_VISIBLE_DEVICES").then(|| "0\x1b[31m".to_owned());
    let text = inspect_at(folder(&[]).path(), &env, false).to_string();
    assert!(text.contains("CUDA_VISIBLE_DEVICES=0?[31m"), "{text}");
}

#[test]
fn this_machine_is_inspected() {
    let report = inspect();
    assert!(report.cpu.allowed > 0 && report.memory.total > 0);
    // Seen with --nocapture: the report of the machine at hand.
    println!("{report}");
}
