//! What the system's limits allow, said before anything is started that they would end.

use rustix::process::{Resource, getrlimit, setrlimit};

use crate::{Error, Result};

/// Open files of a rank besides its connections: standard streams, listeners, memory, the model's files.
const OWN_FILES: u64 = 32;
/// Threads of a rank at the least: the main one, and those that watch the others.
const OWN_THREADS: u64 = 4;

/// Room for the connections of `size` ranks: one to each other rank for data, on rank 0 another for control.
///
/// # Errors
/// The limit of open files, where the system lets it be raised no further.
pub(super) fn allow_connections(size: usize) -> Result<()> {
    let needed = 2 * size as u64 + OWN_FILES;
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|now| now >= needed) {
        return Ok(());
    }
    // The soft limit is for programs that count descriptors in 1024 bits; this one does not.
    limit.current = limit.maximum;
    if limit.maximum.is_none_or(|most| most >= needed) && setrlimit(Resource::Nofile, limit).is_ok()
    {
        return Ok(());
    }
    Err(too_few(
        "open files",
        "ulimit -n",
        size,
        needed,
        getrlimit(Resource::Nofile).maximum,
    ))
}

/// Room for `size` ranks on this machine.
///
/// # Errors
/// The limit of open files, or of this user's processes.
pub(super) fn allow_ranks_here(size: usize) -> Result<()> {
    allow_connections(size)?;
    let limit = getrlimit(Resource::Nproc).current;
    // Each rank's thread listens to rank 0, and one of rank 0's to it. The limit does not bind root.
    let needed = size as u64 * (OWN_THREADS + 1);
    if rustix::process::geteuid().is_root() || limit.is_none_or(|most| most >= needed) {
        return Ok(());
    }
    Err(too_few(
        "processes and threads",
        "ulimit -u",
        size,
        needed,
        limit,
    ))
}

fn too_few(what: &str, ulimit: &str, size: usize, needed: u64, limit: Option<u64>) -> Error {
    Error::failed(format!(
        "{size} ranks need about {needed} {what} and the limit is {}: raise it ({ulimit}), or start fewer ranks",
        limit.map_or("lower".to_owned(), |n| n.to_string())
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_connections_name_the_limit() {
        assert!(allow_connections(2).is_ok());
        let most = getrlimit(Resource::Nofile).maximum;
        if let Some(most) = most.filter(|&n| n < 1 << 40) {
            let error = allow_connections(most as usize).unwrap_err().to_string();
            assert!(error.contains(&format!("the limit is {most}")), "{error}");
            assert!(
                error.contains("open files") && error.contains("ulimit -n"),
                "{error}"
            );
        }
    }
}
