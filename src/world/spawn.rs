//! `--ranks N` on one machine: this process becomes rank 0 and starts the others as copies of itself.

use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{LOCALHOST, Rendezvous, Secret, Source, World, door, limits, secret};
use crate::{Error, Result};

/// Set for the started ranks alone: `rank size port token secret`. Other users cannot read a process's environment.
const VARIABLE: &str = "TANDEM_LOCAL_RANK";

/// The processes of the other ranks, seen from rank 0.
#[derive(Debug)]
pub struct Children(Mutex<Vec<(usize, Child)>>);

/// Starts ranks `1..size` with this process's own command line.
///
/// They read nothing, print nothing on stdout, and are killed when this thread ends, however it ends.
pub(super) fn spawn_ranks(size: usize) -> Result<World> {
    limits::allow_ranks_here(size)?;
    let failed = |e: io::Error| Error::failed(format!("cannot listen on this machine: {e}"));
    let listener = door::listen_here(0).map_err(failed)?;
    let port = listener.local_addr().map_err(failed)?.port();
    let token = u64::from_le_bytes(secret::random()?);
    let secret = Secret::random()?;
    let hex = secret.to_hex();
    let children = Children(Mutex::new(Vec::new()));
    for rank in 1..size {
        let child = start(&format!("{rank} {size} {port} {token} {hex}"))
            .map_err(|e| Error::failed(format!("cannot start rank {rank} of {size}: {e}")))?;
        children.lock().push((rank, child));
    }
    Ok(World {
        rendezvous: Rendezvous::Listening(Arc::new(vec![listener])),
        children: Some(Arc::new(children)),
        ..local_world(0, size, token, secret)
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
    // Its value holds a secret: it is not shown.
    let malformed = || {
        Error::failed(format!(
            "{VARIABLE} is malformed: it is set by --ranks alone"
        ))
    };
    let (numbers, secret) = text.rsplit_once(' ').ok_or_else(malformed)?;
    let secret = Secret::of_hex(secret).ok_or_else(malformed)?;
    let numbers: Vec<u64> = numbers
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
            host: LOCALHOST.into(),
            ports: vec![port],
        },
        ..local_world(rank as usize, size as usize, token, secret)
    }))
}

fn local_world(rank: usize, size: usize, token: u64, secret: Secret) -> World {
    World {
        rank,
        size,
        local_rank: Some(rank),
        local_size: Some(size),
        source: Source::Local,
        token,
        secret,
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

/// How long a process may be stopped before the ranks have met.
const STANDSTILL: Duration = Duration::from_secs(10);
/// Looks that this takes at least: this process may have been stopped itself.
const LOOKS: u32 = 8;

/// A rank's process of a local run, and for how long it has not moved.
pub(super) struct Stopped {
    rank: usize,
    pid: u32,
    since: Option<Instant>,
    looks: u32,
}

impl Stopped {
    /// Rank 0's process, for a rank that it has started.
    pub fn parent_of(world: &World) -> Option<Self> {
        let is_child = world.source == Source::Local && world.rank > 0;
        is_child.then(|| Stopped::new(0, std::os::unix::process::parent_id()))
    }

    pub fn children_of(world: &World) -> Vec<Self> {
        let Some(children) = &world.children else {
            return Vec::new();
        };
        let children = children.lock();
        let each = children.iter();
        each.map(|(rank, child)| Stopped::new(*rank, child.id()))
            .collect()
    }

    fn new(rank: usize, pid: u32) -> Self {
        Stopped {
            rank,
            pid,
            since: None,
            looks: 0,
        }
    }

    /// An error once the process has been stopped for too long. A stopped rank 0 is sent on: it shows the error.
    pub fn check(&mut self) -> Result<()> {
        if !is_stopped(self.pid) {
            (self.since, self.looks) = (None, 0);
            return Ok(());
        }
        self.looks += 1;
        let since = *self.since.get_or_insert_with(Instant::now);
        if self.looks < LOOKS || since.elapsed() < STANDSTILL {
            return Ok(());
        }
        if self.rank == 0 {
            // Its own waiting for the ranks ends when it sees this one end.
            resume_parent();
            return Err(Error::Told(1));
        }
        Err(Error::failed(format!(
            "rank {} was stopped for {} s before the ranks had met",
            self.rank,
            STANDSTILL.as_secs()
        )))
    }
}

/// Lets a stopped rank 0 go on, so that it sees that the run has ended, and says so.
pub(super) fn resume_parent() {
    if let Some(parent) = rustix::process::getppid() {
        let sent = rustix::process::kill_process(parent, rustix::process::Signal::CONT);
        tracing::debug!("rank 0 is sent on: {sent:?}");
    }
}

fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name before it may hold anything, a bracket too.
    let state = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    state.starts_with('T') || state.starts_with('t')
}

fn describe(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("was killed by signal {signal}"),
        (None, Some(code)) => format!("ended with exit code {code}"),
        (None, None) => "ended".to_owned(),
    }
}
