//! The report as text for a person.

use super::Report;
use crate::bytes;
use std::fmt;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "tandem {}", self.version)?;
        section(f, "CPU", &self.cpu_lines())?;
        section(f, "memory", &self.memory_lines())?;
        section(f, "launcher", &self.launcher_lines())?;
        section(f, "CUDA", &self.library_lines())?;
        section(f, "GPUs", &self.gpu_lines())?;
        section(
            f,
            "MPI",
            &[if self.mpi { "built in" } else { "not built in" }.to_owned()],
        )?;
        section(f, "notes", &self.missing)
    }
}

/// A label and its lines, one under the other.
fn section(f: &mut fmt::Formatter<'_>, label: &str, lines: &[String]) -> fmt::Result {
    for (i, line) in lines.iter().enumerate() {
        let label = if i == 0 { label } else { "" };
        // Variables and file names may hold anything; a terminal gets letters only.
        let line: String = line
            .chars()
            .map(|c| if c.is_control() { '?' } else { c })
            .collect();
        for (n, part) in textwrap::wrap(&line, 90).iter().enumerate() {
            let label = if n == 0 { label } else { "" };
            writeln!(f, "{label:<9} {part}")?;
        }
    }
    Ok(())
}

impl Report {
    fn cpu_lines(&self) -> Vec<String> {
        let cpu = &self.cpu;
        let nodes = match cpu.numa_nodes.as_slice() {
            [] => "NUMA unknown".to_owned(),
            [_] => "one NUMA node".to_owned(),
            nodes => format!("{} NUMA nodes ({})", nodes.len(), nodes.join("; ")),
        };
        let mut features = cpu.features.join(" ");
        if !cpu.lacks.is_empty() {
            features += &format!(
                "{}without {}",
                if features.is_empty() { "" } else { "; " },
                cpu.lacks.join(" ")
            );
        }
        vec![
            format!(
                "{}; may use {} of {} CPUs ({}); {nodes}",
                cpu.model, cpu.allowed, cpu.online, cpu.allowed_list
            ),
            features,
            format!("kernels: {}", self.kernels),
        ]
    }

    fn memory_lines(&self) -> Vec<String> {
        let m = &self.memory;
        let cgroup = match (m.cgroup_limit, &m.cgroup_path) {
            (Some(limit), Some(path)) => format!(
                "control group {} limits it to {}, {} used",
                path.display(),
                bytes::format(limit),
                bytes::format(m.cgroup_used),
            ),
            _ => "no control group limits it".to_owned(),
        };
        let or =
            |size: Option<u64>, none: &str| size.map_or_else(|| none.to_owned(), bytes::format);
        vec![
            format!(
                "{} in all, {} available; {cgroup}",
                bytes::format(m.total),
                bytes::format(m.available)
            ),
            format!(
                "a plan for one rank may fill {}; ulimit -l {}",
                or(self.default_host_budget, "an unknown amount"),
                or(m.memlock, "unlimited")
            ),
        ]
    }

    fn launcher_lines(&self) -> Vec<String> {
        let launcher = &self.launcher;
        let place = match (launcher.rank, launcher.size) {
            (Some(rank), Some(size)) => format!(": rank {rank} of {size}"),
            _ => String::new(),
        };
        let mut lines = vec![format!("{}{place}", launcher.kind)];
        lines.extend(
            launcher
                .variables
                .iter()
                .map(|(name, value)| format!("{name}={value}")),
        );
        lines
    }

    fn library_lines(&self) -> Vec<String> {
        let line = |library: &super::cuda::CudaLibrary| match &library.path {
            None => format!("{:<15} not found", library.name),
            Some(path) => {
                let version = library.version.as_deref().unwrap_or("of unknown version");
                format!("{:<15} {version} ({})", library.name, path.display())
            }
        };
        self.cuda.libraries.iter().map(line).collect()
    }

    fn gpu_lines(&self) -> Vec<String> {
        let nodes: Vec<String> = self
            .cuda
            .device_nodes
            .iter()
            .map(|n| n.display().to_string())
            .collect();
        let nodes = if nodes.is_empty() {
            "no /dev/nvidia*".to_owned()
        } else {
            nodes.join(" ")
        };
        if self.cuda.gpus.is_empty() {
            return vec![format!("none ({nodes})")];
        }
        let gpu = |(index, gpu): (usize, &super::cuda::Gpu)| {
            format!(
                "{index}: {}, {}, compute capability {}",
                gpu.name,
                bytes::format(gpu.memory),
                gpu.compute_capability
            )
        };
        let mut lines: Vec<String> = self.cuda.gpus.iter().enumerate().map(gpu).collect();
        lines.push(nodes);
        lines
    }
}
