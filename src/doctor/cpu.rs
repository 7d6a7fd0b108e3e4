//! The CPU: its name, the part of it that this process may use, and what it can do for the kernels.

use super::memory::read;
use serde::Serialize;
use std::path::Path;

/// What the kernels can make use of: the kernel's name for it, and the usual one.
const FEATURES: &[(&str, &str)] = &[
    ("avx2", "AVX2"),
    ("fma", "FMA"),
    ("f16c", "F16C"),
    ("avx512f", "AVX-512F"),
    ("avx512bw", "AVX-512BW"),
    ("avx512_bf16", "AVX-512-BF16"),
    ("avx512_vnni", "AVX-512-VNNI"),
    ("amx_bf16", "AMX-BF16"),
];

/// The CPU as this process finds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Cpu {
    /// Its name.
    pub model: String,
    /// CPUs of the machine.
    pub online: usize,
    /// CPUs in the affinity mask of this process.
    pub allowed: usize,
    /// The same as a list, `0-7,16-23`.
    pub allowed_list: String,
    /// Features that the kernels make use of.
    pub features: Vec<&'static str>,
    /// Those that this CPU lacks.
    pub lacks: Vec<&'static str>,
    /// The CPUs of each NUMA node, as lists.
    pub numa_nodes: Vec<String>,
}

/// Looks under `root` for `proc` and `sys`.
pub fn inspect(root: &Path) -> Cpu {
    let cpuinfo = read(&root.join("proc/cpuinfo"));
    let field = |key: &str| {
        cpuinfo.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            (name.trim() == key).then(|| value.trim().to_owned())
        })
    };
    let flags = field("flags")
        .or_else(|| field("Features"))
        .unwrap_or_default();
    let has = |(name, _): &&(&str, &str)| flags.split(' ').any(|flag| flag == *name);
    let (features, lacks): (Vec<_>, Vec<_>) = FEATURES.iter().partition(has);
    let names = |list: Vec<&(&str, &'static str)>| list.iter().map(|(_, name)| *name).collect();
    let status = read(&root.join("proc/self/status"));
    let allowed_list = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))
        .unwrap_or_default()
        .trim()
        .to_owned();
    Cpu {
        model: field("model name")
            .unwrap_or_else(|| format!("unknown ({})", std::env::consts::ARCH)),
        online: cpus_in(read(&root.join("sys/devices/system/cpu/online")).trim()),
        allowed: cpus_in(&allowed_list),
        allowed_list,
        features: names(features),
        lacks: names(lacks),
        numa_nodes: numa_nodes(root),
    }
}

/// How many CPUs a list such as `0-3,8` names.
fn cpus_in(list: &str) -> usize {
    let size = |part: &str| -> Option<usize> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        last.checked_sub(first)?.checked_add(1)
    };
    list.split(',')
        .filter_map(size)
        .fold(0, usize::saturating_add)
}

fn numa_nodes(root: &Path) -> Vec<String> {
    let nodes = root.join("sys/devices/system/node");
    (0..1024)
        .map(|n| nodes.join(format!("node{n}/cpulist")))
        .filter(|path| path.exists())
        .map(|path| read(&path).trim().to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::folder;
    use super::*;

    #[test]
    fn a_server_is_read() {
        let root = folder(&[
            (
                "proc/cpuinfo",
                "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 fma f16c avx512f amx_bf16\n\n",
            ),
            (
                "proc/self/status",
                "Name:\tx\nCpus_allowed:\tff\nCpus_allowed_list:\t0-3,8,10-11\n",
            ),
            ("sys/devices/system/cpu/online", "0-63\n"),
            ("sys/devices/system/node/node0/cpulist", "0-31\n"),
            ("sys/devices/system/node/node2/cpulist", "32-63\n"),
        ]);
        let cpu = inspect(root.path());
        assert_eq!(cpu.model, "Some CPU @ 2 GHz");
        assert_eq!((cpu.allowed, cpu.online), (7, 64));
        assert_eq!(
            cpu.features,
            ["AVX2", "FMA", "F16C", "AVX-512F", "AMX-BF16"]
        );
        assert_eq!(cpu.lacks, ["AVX-512BW", "AVX-512-BF16", "AVX-512-VNNI"]);
        assert_eq!(cpu.numa_nodes, ["0-31", "32-63"]);
    }

    #[test]
    fn nothing_and_nonsense_are_no_failure() {
        let cpu = inspect(folder(&[]).path());
        assert!(cpu.model.starts_with("unknown"));
        assert_eq!((cpu.online, cpu.features.len()), (0, 0));
        for list in ["", "-", "x", "3-1", "0-18446744073709551615", "1,,"] {
            assert!(cpus_in(list) <= 1, "{list}");
        }
    }
}
