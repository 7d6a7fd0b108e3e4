//! Host memory: what the machine has, and what the control group of this process may have of it.
//!
//! A batch system limits a job through a control group, and whoever passes the limit is killed, however much the machine
//! has left. Both versions are read; the limit may sit on any ancestor of the group that the process is in (Slurm puts
//! it on the job and on the step, the process is in the task).

use serde::Serialize;
use std::path::{Component, Path, PathBuf};

/// Memory that a process fills besides its weights, KV cache and step buffers: code, tokenizer, file headers.
pub const PROCESS_RESERVE: u64 = 200 << 20;

/// v1 writes "no limit" as the largest number of whole pages.
const UNLIMITED: u64 = 1 << 62;

/// Host memory as this process finds it, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostMemory {
    /// All memory of the machine; 0 where the system does not say.
    pub total: u64,
    /// What new processes could fill without swapping; 0 where the system does not say.
    pub available: u64,
    /// Bytes that the control group which leaves the least room may fill; `None` where none limits memory.
    pub cgroup_limit: Option<u64>,
    /// Bytes that it fills now, all its processes together; file cache that would be dropped first is not counted.
    pub cgroup_used: u64,
    /// Its folder.
    pub cgroup_path: Option<PathBuf>,
    /// Largest amount that may be locked in memory (`ulimit -l`); `None` for no limit.
    pub memlock: Option<u64>,
}

impl HostMemory {
    /// Bytes that `n_ranks` of tandem's processes on this machine may plan with together, [`PROCESS_RESERVE`] kept for
    /// each of them; `None` where the system says nothing at all.
    ///
    /// The room in the control group counts, and no more than is available. A limit of more than twice the machine's
    /// total is a machine that grows as it is used (some virtual machines start small): there the limit alone counts.
    pub fn budget(&self, n_ranks: usize) -> Option<u64> {
        let room = |limit: u64| limit.saturating_sub(self.cgroup_used);
        let free = match self.cgroup_limit {
            Some(limit) if limit / 2 > self.total => room(limit),
            Some(limit) => room(limit).min(self.available),
            None if self.total == 0 => return None,
            None => self.available,
        };
        Some(free.saturating_sub(PROCESS_RESERVE.saturating_mul(n_ranks as u64)))
    }
}

/// The host memory of this process.
pub fn host_limit() -> HostMemory {
    host_limit_at(Path::new("/"))
}

/// [`host_limit`] with `proc` and the control groups looked up under `root`.
pub fn host_limit_at(root: &Path) -> HostMemory {
    let meminfo = read(&root.join("proc/meminfo"));
    let group = tightest_group(root);
    HostMemory {
        total: kib_field(&meminfo, "MemTotal:"),
        available: kib_field(&meminfo, "MemAvailable:"),
        cgroup_limit: group.as_ref().map(|g| g.limit),
        cgroup_used: group.as_ref().map_or(0, |g| g.used),
        cgroup_path: group.map(|g| g.path),
        memlock: memlock(&read(&root.join("proc/self/limits"))),
    }
}

/// A file's text; empty where it cannot be read, because not every system has every file.
pub(super) fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn kib_field(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// The soft limit, of the columns name, soft, hard, unit; a name has spaces.
fn memlock(limits: &str) -> Option<u64> {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"));
    line?.split_whitespace().next()?.parse().ok()
}

/// One mounted hierarchy that may limit memory.
struct Hierarchy {
    version: u8,
    /// Where it is mounted.
    mount: PathBuf,
    /// Which of its groups is mounted there.
    top: PathBuf,
}

/// A control group with a limit.
struct Group {
    path: PathBuf,
    limit: u64,
    used: u64,
}

impl Group {
    fn room(&self) -> u64 {
        self.limit.saturating_sub(self.used)
    }
}

fn tightest_group(root: &Path) -> Option<Group> {
    let mountinfo = read(&root.join("proc/self/mountinfo"));
    let membership = read(&root.join("proc/self/cgroup"));
    let mut tightest: Option<Group> = None;
    for hierarchy in mountinfo.lines().filter_map(hierarchy) {
        let Some(member) = group_of(&membership, hierarchy.version) else {
            continue;
        };
        // A container sees its own group as the top of the mount, or a path that leads out of what is mounted.
        let inside = member.strip_prefix(&hierarchy.top).unwrap_or(Path::new(""));
        let leaves = inside.components().any(|c| c == Component::ParentDir);
        let inside = if leaves { Path::new("") } else { inside };
        for ancestor in inside.ancestors() {
            let path = match ancestor.as_os_str().is_empty() {
                true => hierarchy.mount.clone(),
                false => hierarchy.mount.join(ancestor),
            };
            if let Some((limit, used)) = limit_of(&under(root, &path), hierarchy.version) {
                let found = Group { path, limit, used };
                if tightest
                    .as_ref()
                    .is_none_or(|best| found.room() < best.room())
                {
                    tightest = Some(found);
                }
            }
        }
    }
    tightest
}

fn under(root: &Path, absolute: &Path) -> PathBuf {
    root.join(absolute.strip_prefix("/").unwrap_or(absolute))
}

/// Reads a line of mountinfo: `… root mount-point options … - type source super-options`.
fn hierarchy(line: &str) -> Option<Hierarchy> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut fields = mount.split(' ').skip(3);
    let (top, mount) = (fields.next()?, fields.next()?);
    let mut filesystem = filesystem.split(' ');
    let version = match filesystem.next()? {
        "cgroup2" => 2,
        "cgroup"
            if filesystem
                .nth(1)?
                .split(',')
                .any(|option| option == "memory") =>
        {
            1
        }
        _ => return None,
    };
    // The kernel writes a space in a path as an octal escape.
    let path = |text: &str| PathBuf::from(text.replace("\\040", " "));
    Some(Hierarchy {
        version,
        mount: path(mount),
        top: path(top),
    })
}

/// This process's group, from the lines `number:controllers:path`.
fn group_of(membership: &str, version: u8) -> Option<PathBuf> {
    membership.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let ours = match version {
            2 => number == "0" && controllers.is_empty(),
            _ => controllers.split(',').any(|c| c == "memory"),
        };
        ours.then(|| PathBuf::from(path))
    })
}

/// Limit and use of one group, where it has a limit.
fn limit_of(folder: &Path, version: u8) -> Option<(u64, u64)> {
    let (limit, usage, cache) = match version {
        2 => ("memory.max", "memory.current", "inactive_file "),
        _ => (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file ",
        ),
    };
    let number = |name: &str| read(&folder.join(name)).trim().parse::<u64>().ok();
    let limit = number(limit).filter(|&bytes| bytes < UNLIMITED)?;
    let stat = read(&folder.join("memory.stat"));
    let cached = stat
        .lines()
        .find_map(|line| line.strip_prefix(cache)?.trim().parse::<u64>().ok());
    Some((
        limit,
        number(usage)
            .unwrap_or(0)
            .saturating_sub(cached.unwrap_or(0)),
    ))
}

#[cfg(test)]
mod tests {
    use super::super::testing::folder;
    use super::*;

    const GIB: u64 = 1 << 30;
    const V2_MOUNT: &str =
        "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
    const V1_MOUNT: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                            33 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                            35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
    const MEMINFO: &str =
        "MemTotal:       67108864 kB\nMemFree: 1 kB\nMemAvailable:   50331648 kB\n";

    #[test]
    fn a_slurm_job_s_limit_is_found_above_the_task() {
        let job = "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7";
        let root = folder(&[
            ("proc/meminfo", MEMINFO),
            ("proc/self/mountinfo", V2_MOUNT),
            (
                "proc/self/cgroup",
                "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n",
            ),
            (
                "proc/self/limits",
                "Max locked memory         8388608              unlimited            bytes     \n",
            ),
            (&format!("{job}/step_0/user/task_0/memory.max"), "max\n"),
            (&format!("{job}/step_0/memory.max"), "17179869184\n"),
            (&format!("{job}/step_0/memory.current"), "1073741824\n"),
            (&format!("{job}/memory.max"), "8589934592\n"),
            (&format!("{job}/memory.current"), "3221225472\n"),
            (
                &format!("{job}/memory.stat"),
                "anon 5\ninactive_file 1073741824\nactive_file 7\n",
            ),
        ]);
        let memory = host_limit_at(root.path());
        assert_eq!((memory.total, memory.available), (64 * GIB, 48 * GIB));
        assert_eq!(memory.memlock, Some(8 << 20));
        assert_eq!(memory.cgroup_path, Some(Path::new("/").join(job)));
        assert_eq!(
            (memory.cgroup_limit, memory.cgroup_used),
            (Some(8 * GIB), 2 * GIB)
        );
        assert_eq!(memory.budget(2), Some(6 * GIB - 400 * (1 << 20)));
    }

    #[test]
    fn version_1_and_its_no_limit_are_read() {
        let group = "sys/fs/cgroup/memory/slurm/uid_0/job_3";
        let files = [
            ("proc/meminfo", MEMINFO.to_owned()),
            ("proc/self/mountinfo", V1_MOUNT.to_owned()),
            (
                "proc/self/cgroup",
                "4:cpu:/elsewhere\n3:hugetlb,memory:/slurm/uid_0/job_3/step_0\n0::/\n".to_owned(),
            ),
            (
                "sys/fs/cgroup/memory/memory.limit_in_bytes",
                "9223372036854771712\n".to_owned(),
            ),
            (
                "sys/fs/cgroup/memory/slurm/uid_0/job_3/step_0/memory.limit_in_bytes",
                "9223372036854771712\n".to_owned(),
            ),
        ];
        let mut files: Vec<(&str, &str)> = files
            .iter()
            .map(|(path, text)| (*path, text.as_str()))
            .collect();
        assert_eq!(host_limit_at(folder(&files).path()).cgroup_limit, None);
        let (limit, usage) = (
            format!("{group}/memory.limit_in_bytes"),
            format!("{group}/memory.usage_in_bytes"),
        );
        let stat = format!("{group}/memory.stat");
        files.extend([
            (limit.as_str(), "4294967296\n"),
            (&usage, "2000\n"),
            (&stat, "inactive_file 9\ntotal_inactive_file 500\n"),
        ]);
        let found = host_limit_at(folder(&files).path());
        assert_eq!(
            (found.cgroup_limit, found.cgroup_used),
            (Some(4 * GIB), 1500)
        );
    }

    #[test]
    fn a_container_s_own_group_is_the_top_of_its_mount() {
        // Without a namespace, the path is the host's and the mount shows that group; with one, the path may lead out.
        for (mount, group) in [
            (
                "31 23 0:28 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw\n",
                "0::/docker/abc\n",
            ),
            (V2_MOUNT, "0::/\n"),
            (V2_MOUNT, "0::/../../outside\n"),
        ] {
            let root = folder(&[
                ("proc/self/mountinfo", mount),
                ("proc/self/cgroup", group),
                ("sys/fs/cgroup/memory.max", "1073741824\n"),
            ]);
            let found = host_limit_at(root.path());
            assert_eq!(found.cgroup_limit, Some(GIB), "{mount}{group}");
            assert_eq!(
                found.cgroup_path,
                Some("/sys/fs/cgroup".into()),
                "{mount}{group}"
            );
        }
    }

    #[test]
    fn a_machine_that_says_nothing_has_no_budget() {
        let memory = host_limit_at(folder(&[]).path());
        assert_eq!(
            (memory.total, memory.available, memory.memlock),
            (0, 0, None)
        );
        assert_eq!((memory.cgroup_limit, memory.budget(1)), (None, None));
    }

    #[test]
    fn the_budget_is_the_least_room_unless_the_machine_grows() {
        let memory = |limit, available| HostMemory {
            total: 64 * GIB,
            available,
            cgroup_limit: Some(limit),
            cgroup_used: GIB,
            cgroup_path: Some("/".into()),
            memlock: None,
        };
        assert_eq!(memory(32 * GIB, 60 * GIB).budget(0), Some(31 * GIB));
        assert_eq!(memory(32 * GIB, 10 * GIB).budget(0), Some(10 * GIB));
        assert_eq!(memory(72 * GIB, 60 * GIB).budget(0), Some(60 * GIB));
        assert_eq!(memory(512 * GIB, 60 * GIB).budget(0), Some(511 * GIB));
        assert_eq!(memory(2 * GIB, 10 * GIB).budget(1000), Some(0));
    }

    #[test]
    fn this_machine_says_what_it_has() {
        let memory = host_limit();
        assert!(memory.total > 0 && memory.available <= memory.total);
        assert!(memory.budget(1).is_some());
    }
}
