//! `--ranks N` on one machine: this process becomes rank 0 and starts the others as copies of itself.

use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Rendezvous, Source, World, door, meet};
use crate::{Error, Result};

/// Set for the started ranks alone: `rank size port token`.
const VARIABLE: &str = "TANDEM_LOCAL_RANK";

/// The processes of the other ranks, seen from rank 0.
#[derive(Debug)]
pub struct Children(Mutex<Vec<(usize, Child)>>);

/// Starts ranks `1..size` with this process's own command line.
///
/// They read nothing, print nothing on stdout, and are killed when this thread ends, however it ends.
pub(super) fn spawn_ranks(size: usize) -> Result<World> {
    let failed = |e: io::Error| Error::failed(format!("cannot listen on 127.0.0.1: {e}"));
    let listener = door::listen(true, 0).map_err(failed)?;
    let port = listener.local_addr().map_err(failed)?.port();
    let token = meet::random();
    let children = Children(Mutex::new(Vec::new()));
    for rank in 1..size {
        let child = start(&format!("{rank} {size} {port} {token}"))
            .map_err(|e| Error::failed(format!("cannot start rank {rank} of {size}: {e}")))?;
        children.lock().push((rank, child));
    }
    Ok(World {
        rendezvous: Rendezvous::Listening(Arc::new(listener)),
        children: Some(Arc::new(children)),
        ..local_world(0, size, token)
    })
}

fn start(place: &str) -> io::Result<Child> {
    // Not `current_exe`: this name still leads to the program when its file has been replaced.
    let mut command = Command::new("/proc/self/exe");
    command
        .args(std::env::args_os().skip(1))
        .env(VARIABLE, place)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    if let Some(name) = std::env::args_os().next() {
        command.arg0(name);
    }
    ends_with_this_thread(&mut command);
    command.spawn()
}

/// The process of `command` is killed when the thread that starts it ends, however it ends.
pub fn ends_with_this_thread(command: &mut Command) {
    let parent = std::process::id();
    let with_parent = move || {
        // SAFETY: both calls take and return plain integers and are safe between fork and exec.
        let (set, now) = unsafe {
            (
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL),
                libc::getppid(),
            )
        };
        // The parent may have ended before the wish was heard.
        if set != 0 || now as u32 != parent {
            return Err(io::Error::other("the process that starts this one is gone"));
        }
        Ok(())
    };
    // SAFETY: the closure neither allocates on its way to success nor takes a lock.
    unsafe { command.pre_exec(with_parent) };
}

/// The place that rank 0 gave this process, if it was started that way.
pub(super) fn from_parent(env: &dyn Fn(&str) -> Option<String>) -> Result<Option<World>> {
    let Some(text) = env(VARIABLE) else {
        return Ok(None);
    };
    let malformed = || {
        Error::failed(format!(
            "{VARIABLE} is \"{text}\": it is set by --ranks alone"
        ))
    };
    let numbers: Vec<u64> = text
        .split(' ')
        .map(str::parse)
        .collect::<Result<_, _>>()
        .map_err(|_| malformed())?;
    let [rank, size, port, token] = numbers[..] else {
        return Err(malformed());
    };
    let port = u16::try_from(port).map_err(|_| malformed())?;
    if rank == 0 || rank >= size || port == 0 {
        return Err(malformed());
    }
    Ok(Some(World {
        rendezvous: Rendezvous::At {
            host: "127.0.0.1".into(),
            ports: vec![port],
        },
        ..local_world(rank as usize, size as usize, token)
    }))
}

fn local_world(rank: usize, size: usize, token: u64) -> World {
    World {
        rank,
        size,
        local_rank: Some(rank),
        local_size: Some(size),
        source: Source::Local,
        token,
        ..World::alone()
    }
}

impl Children {
    fn lock(&self) -> MutexGuard<'_, Vec<(usize, Child)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first rank whose process has ended, and how: `(2, "was killed by signal 9")`.
    pub fn ended(&self) -> Option<(usize, String)> {
        let mut children = self.lock();
        children.iter_mut().find_map(|(rank, child)| {
            let status = child.try_wait().ok()??;
            Some((*rank, describe(status)))
        })
    }

    /// How the process of `rank` ended, if it does within `patience`.
    pub fn end_of(&self, rank: usize, patience: Duration) -> Option<String> {
        self.wait(rank, patience).map(describe)
    }

    /// Waits for all after an orderly end; the first that ended otherwise is an error.
    pub(super) fn join(&self, patience: Duration) -> Result<()> {
        let until = Instant::now() + patience;
        let ranks: Vec<usize> = self.lock().iter().map(|(rank, _)| *rank).collect();
        for rank in ranks {
            let left = until.saturating_duration_since(Instant::now());
            match self.wait(rank, left) {
                Some(status) if status.success() => {}
                Some(status) => {
                    return Err(Error::failed(format!(
                        "rank {rank} {} at the end",
                        describe(status)
                    )));
                }
                // It is killed when this process ends.
                None => tracing::debug!("rank {rank} takes its time to end"),
            }
        }
        Ok(())
    }

    fn wait(&self, rank: usize, patience: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + patience;
        loop {
            let status = self
                .lock()
                .iter_mut()
                .find(|(r, _)| *r == rank)
                .and_then(|(_, child)| child.try_wait().ok().flatten());
            if status.is_some() || Instant::now() >= until {
                return status;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("was killed by signal {signal}"),
        (None, Some(code)) => format!("ended with exit code {code}"),
        (None, None) => "ended".to_owned(),
    }
}
