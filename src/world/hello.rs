//! What every rank tells at the rendezvous, and what must agree.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What a rank found before the ranks met.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Hello {
    /// The rank that speaks.
    pub rank: usize,
    /// Its crate version.
    pub version: String,
    /// Hash of the model's configuration and of the arguments that must be the same everywhere.
    pub fingerprint: u64,
    /// Hash of the weights' headers and of samples of their data.
    pub weights: u64,
    /// Host name.
    pub host: String,
    /// Process id.
    pub pid: u32,
    /// The CPUs that it may run on (its affinity mask).
    pub cpus: Vec<usize>,
    /// What it computes on, in words.
    pub device: String,
    /// UUID of its GPU.
    pub gpu_uuid: Option<String>,
    /// Bytes of memory that it may use (device memory on a GPU).
    pub memory: u64,
    /// Bytes of host memory that the ranks of its machine may plan with together.
    pub host_memory: u64,
    /// Bytes of the cgroup's memory limit, if there is one.
    pub memory_limit: Option<u64>,
    /// Exit code and line of what has already gone wrong on this rank.
    pub error: Option<(u8, String)>,
}

impl Hello {
    /// A hello with what the operating system says; the rest is the caller's.
    pub fn new(rank: usize) -> Self {
        Hello {
            rank,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            fingerprint: 0,
            weights: 0,
            host: host_name(),
            pid: std::process::id(),
            cpus: allowed_cpus(),
            device: "cpu".to_owned(),
            gpu_uuid: None,
            memory: 0,
            host_memory: u64::MAX,
            memory_limit: None,
            error: None,
        }
    }

    /// The same with an error: a rank that has failed still comes to the rendezvous to say so.
    pub fn with_error(mut self, error: &Error) -> Self {
        self.error = Some((error.exit_code(), error.to_string()));
        self
    }
}

pub(super) fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "localhost".to_owned(),
        name => name.to_owned(),
    }
}

fn allowed_cpus() -> Vec<usize> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let list = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let ranges = list.unwrap_or_default().trim().split(',');
    ranges
        .filter_map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            Some(first.parse().ok()?..=last.parse::<usize>().ok()?)
        })
        .flatten()
        .collect()
}

/// One rank's failure: exit code and line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub rank: usize,
    pub host: String,
    pub code: u8,
    pub line: String,
}

/// The error that stands for all: what every rank says when all say the same, or else the lowest failing rank's.
pub(super) fn root_cause(failures: &[Failure], size: usize) -> Option<Error> {
    let first = failures.iter().min_by_key(|f| f.rank)?;
    let same = failures.len() == size && failures.iter().all(|f| f.line == first.line);
    // What is wrong with the command line that rank 0 alone reads concerns the run, not the rank.
    let typed = failures.len() == 1 && first.rank == 0 && first.code == 2;
    Some(match (same || typed, first.code) {
        (true, code) => with_code(code, first.line.clone()),
        (false, 1) => Error::Rank {
            rank: first.rank,
            host: first.host.clone(),
            what: first.line.clone(),
        },
        (false, code) => with_code(
            code,
            format!("rank {} ({}): {}", first.rank, first.host, first.line),
        ),
    })
}

/// An error with the exit code that came over the wire.
pub(super) fn with_code(code: u8, line: String) -> Error {
    match code {
        2 => Error::Usage(line),
        _ => Error::Failed(line),
    }
}

/// What must hold before the ranks work together.
pub(super) fn check(hellos: &[Hello]) -> Result<()> {
    let Some(first) = hellos.first() else {
        return Ok(());
    };
    for hello in hellos {
        if hello.version != first.version {
            return Err(versions_differ(
                hello.rank,
                &hello.host,
                &hello.version,
                &first.version,
            ));
        }
        if hello.fingerprint != first.fingerprint {
            return Err(Error::failed(format!(
                "rank {} ({}) has another model or other arguments than rank 0 ({}): \
                 start every rank with the same command line and the same files",
                hello.rank, hello.host, first.host
            )));
        }
        if hello.weights != first.weights {
            return Err(Error::failed(format!(
                "rank {} ({}) has other weights than rank 0 ({}) under the same --model: \
                 give every rank the same .safetensors files",
                hello.rank, hello.host, first.host
            )));
        }
    }
    let mut gpus = BTreeMap::new();
    for hello in hellos {
        let Some(uuid) = &hello.gpu_uuid else {
            continue;
        };
        if let Some(other) = gpus.insert(uuid, hello.rank) {
            return Err(Error::failed(format!(
                "ranks {other} and {} both have GPU {uuid} on {}: \
                 give each rank a GPU of its own (srun --gpus-per-task=1), or start fewer ranks",
                hello.rank, hello.host
            )));
        }
    }
    Ok(())
}

pub(super) fn versions_differ(rank: usize, host: &str, theirs: &str, ours: &str) -> Error {
    Error::failed(format!(
        "rank {rank} ({host}) is tandem {theirs}, rank 0 is {ours}: start the same binary on every rank"
    ))
}

/// `2`, `2 and 3`, `0-2, 4 and 6-9`.
pub(super) fn list_ranks(ranks: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &rank in ranks {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == rank => *last = rank,
            _ => runs.push((rank, rank)),
        }
    }
    let mut words: Vec<String> = Vec::new();
    for (first, last) in runs {
        match last - first {
            0 => words.push(first.to_string()),
            1 => words.extend([first.to_string(), last.to_string()]),
            _ => words.push(format!("{first}-{last}")),
        }
    }
    match words.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(rank: usize, code: u8, line: &str) -> Failure {
        Failure {
            rank,
            host: format!("n{rank}"),
            code,
            line: line.into(),
        }
    }

    fn hellos(n: usize) -> Vec<Hello> {
        (0..n).map(Hello::new).collect()
    }

    #[test]
    fn the_lowest_rank_speaks_unless_all_say_the_same() {
        let a = [failure(2, 1, "no memory"), failure(1, 1, "no file")];
        let cause = root_cause(&a, 3).unwrap();
        assert_eq!(cause.to_string(), "rank 1 (n1): no file");
        let all = [failure(0, 2, "--seed: bad"), failure(1, 2, "--seed: bad")];
        let cause = root_cause(&all, 2).unwrap();
        assert_eq!(
            (cause.to_string().as_str(), cause.exit_code()),
            ("--seed: bad", 2)
        );
        let zero = root_cause(&all[..1], 2).unwrap();
        assert_eq!(zero.to_string(), "--seed: bad");
        let one = root_cause(&all[1..], 2).unwrap();
        assert_eq!(
            (one.to_string().as_str(), one.exit_code()),
            ("rank 1 (n1): --seed: bad", 2)
        );
        assert!(root_cause(&[], 2).is_none());
    }

    #[test]
    fn disagreements_are_named() {
        assert!(check(&hellos(3)).is_ok());
        let mut other = hellos(3);
        other[2].fingerprint = 7;
        let error = check(&other).unwrap_err().to_string();
        assert!(
            error.starts_with("rank 2 (") && error.contains("another model"),
            "{error}"
        );
        let mut other = hellos(3);
        other[1].weights = 7;
        let error = check(&other).unwrap_err().to_string();
        assert!(
            error.starts_with("rank 1 (") && error.contains("other weights"),
            "{error}"
        );
        let mut other = hellos(2);
        other[1].version = "9.9.9".into();
        let error = check(&other).unwrap_err().to_string();
        assert!(error.contains("is tandem 9.9.9"), "{error}");
        let mut twice = hellos(3);
        twice[0].gpu_uuid = Some("GPU-1".into());
        twice[1].gpu_uuid = Some("GPU-2".into());
        assert!(check(&twice).is_ok());
        twice[2].gpu_uuid = Some("GPU-1".into());
        let error = check(&twice).unwrap_err().to_string();
        assert!(
            error.starts_with("ranks 0 and 2 both have GPU GPU-1"),
            "{error}"
        );
    }

    #[test]
    fn ranks_are_listed_in_words() {
        assert_eq!(list_ranks(&[3]), "3");
        assert_eq!(list_ranks(&[2, 3]), "2 and 3");
        assert_eq!(list_ranks(&[0, 1, 2, 4, 6, 7, 8]), "0-2, 4 and 6-8");
    }

    #[test]
    fn a_new_hello_knows_its_machine() {
        let hello = Hello::new(1);
        assert!(!hello.host.is_empty() && !hello.cpus.is_empty());
    }
}
