//! Runs of this program, one after the other, each in processes of its own.
//!
//! Started by hand, a run is `tandem … --ranks N` on this machine. Started by a launcher, the launcher's ranks meet once
//! for the whole bench; for each run rank 0 tells the others what to start, the first N start their rank of it as a child
//! (with torchrun's variables, which lead the children to each other) and the rest have nothing to do.

use crate::world::{
    Group, Hello, MeetOptions, World, WorldFlags, ends_with_this_thread, watch_signals,
};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What the launchers set; a child's place comes from its bench rank instead.
const LAUNCHERS: [&str; 6] = [
    "SLURM_",
    "PMI",
    "OMPI_",
    "MPI_LOCAL",
    "TORCHELASTIC_",
    "PALS_",
];

/// One run, as rank 0 tells it to the other ranks; `None` instead is the end.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    args: Vec<String>,
    ranks: usize,
    /// Where the children meet.
    host: String,
    port: u16,
    limit_s: u64,
}

/// Starts runs on the ranks that there are.
pub struct Runs<'a> {
    group: Option<&'a Group>,
    limit: Duration,
}

/// Calls `lead` on rank 0, with `limit_s` for each run; the other ranks of a launcher serve it until it returns.
///
/// # Errors
/// Those of `lead`, or ranks that do not meet.
pub fn with_runs(limit_s: u64, lead: impl FnOnce(&Runs<'_>) -> Result<()>) -> Result<()> {
    let world = World::detect(&WorldFlags::default(), &|name| std::env::var(name).ok())?;
    crate::logging::set_rank(world.rank, world.size);
    // Beyond a year it is none; the clock must not overflow.
    let limit = Duration::from_secs(limit_s.min(366 * 86_400));
    if world.size == 1 {
        watch_signals()?;
        return lead(&Runs { group: None, limit });
    }
    let group = Group::meet(&world, Hello::new(world.rank), &MeetOptions::default())?;
    let outcome = if group.rank() == 0 {
        let runs = Runs {
            group: Some(&group),
            limit,
        };
        lead(&runs).and_then(|()| tell(&group, None))
    } else {
        serve(&group)
    };
    match outcome {
        Ok(()) => group.finish(),
        Err(e) => Err(group.fail(e)),
    }
}

impl Runs<'_> {
    /// How many ranks the launcher has started; `None` where the bench starts them itself.
    pub fn launched(&self) -> Option<usize> {
        self.group.map(Group::size)
    }

    /// Runs `tandem ARGS` on `ranks` ranks and returns what it prints.
    ///
    /// # Errors
    /// The run's own last line, or how it ended.
    pub fn run(&self, args: &[String], ranks: usize) -> Result<String> {
        let deadline = Instant::now() + self.limit;
        let Some(group) = self.group else {
            let mut command = tandem(args);
            command.args(["--ranks", &ranks.to_string()]);
            return outcome(start(command)?, deadline);
        };
        if ranks > group.size() {
            return Err(Error::failed(format!(
                "{ranks} ranks: the launcher started {}",
                group.size()
            )));
        }
        let order = Order {
            args: args.to_vec(),
            ranks,
            host: meeting_host(group, ranks),
            port: free_port()?,
            limit_s: self.limit.as_secs(),
        };
        tell(group, Some(&order))?;
        outcome(start(rank_command(&order, group))?, deadline)
    }
}

fn tell(group: &Group, order: Option<&Order>) -> Result<()> {
    let message = postcard::to_stdvec(&order).map_err(|e| Error::failed(format!("order: {e}")))?;
    group.broadcast(&message)
}

/// The side of every other rank: starts its part of each run and sees it end.
fn serve(group: &Group) -> Result<()> {
    loop {
        let message = group.receive()?;
        let order: Option<Order> =
            postcard::from_bytes(&message).map_err(|e| Error::failed(format!("order: {e}")))?;
        let Some(order) = order else { return Ok(()) };
        if group.rank() < order.ranks {
            let deadline = Instant::now() + Duration::from_secs(order.limit_s);
            // What is wrong with a run is rank 0's to show.
            if let Err(e) =
                start(rank_command(&order, group)).and_then(|child| outcome(child, deadline))
            {
                tracing::debug!("this rank's part of a run: {e}");
            }
        }
    }
}

fn tandem(args: &[String]) -> Command {
    // Not `current_exe`: this name still leads to the program when its file has been replaced.
    let mut command = Command::new("/proc/self/exe");
    command.args(args);
    if let Some(name) = std::env::args_os().next() {
        std::os::unix::process::CommandExt::arg0(&mut command, name);
    }
    command
}

/// This rank's part of `order`.
fn rank_command(order: &Order, group: &Group) -> Command {
    let mut command = tandem(&order.args);
    for (name, _) in std::env::vars_os() {
        if LAUNCHERS
            .iter()
            .any(|prefix| name.to_string_lossy().starts_with(prefix))
        {
            command.env_remove(name);
        }
    }
    let rank = group.rank();
    let hosts: Vec<&str> = group.hellos().iter().map(|h| h.host.as_str()).collect();
    let here = |ranks: usize| hosts[..ranks].iter().filter(|h| **h == hosts[rank]).count();
    for (name, value) in [
        ("RANK", rank.to_string()),
        ("WORLD_SIZE", order.ranks.to_string()),
        ("LOCAL_RANK", here(rank).to_string()),
        ("LOCAL_WORLD_SIZE", here(order.ranks).to_string()),
        ("MASTER_ADDR", order.host.clone()),
        ("MASTER_PORT", order.port.to_string()),
    ] {
        command.env(name, value);
    }
    command
}

/// Where the first `ranks` ranks reach rank 0.
fn meeting_host(group: &Group, ranks: usize) -> String {
    let hosts = &group.hellos()[..ranks];
    match hosts.iter().all(|h| h.host == hosts[0].host) {
        true => "127.0.0.1".to_owned(),
        false => hosts[0].host.clone(),
    }
}

/// A port that is free now; the children try those that follow it as well.
fn free_port() -> Result<u16> {
    std::net::TcpListener::bind(("0.0.0.0", 0))
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(|e| Error::failed(format!("no free port: {e}")))
}

fn start(mut command: Command) -> Result<Child> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    ends_with_this_thread(&mut command);
    command
        .spawn()
        .map_err(|e| Error::failed(format!("the run cannot be started: {e}")))
}

/// What `child` prints on stdout; a failure is its last line on stderr.
fn outcome(mut child: Child, deadline: Instant) -> Result<String> {
    let failed = |e: std::io::Error| Error::failed(format!("the run is lost: {e}"));
    let out = reader(child.stdout.take()).map_err(failed)?;
    let err = reader(child.stderr.take()).map_err(failed)?;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            break Some(status);
        }
        if Instant::now() >= deadline {
            child.kill().map_err(failed)?;
            child.wait().map_err(failed)?;
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let text = |thread: std::thread::JoinHandle<Vec<u8>>| {
        String::from_utf8_lossy(&thread.join().unwrap_or_default()).into_owned()
    };
    let (out, err) = (text(out), text(err));
    for line in err.lines() {
        tracing::debug!("{line}");
    }
    match status {
        Some(status) if status.success() => Ok(out),
        Some(status) => Err(Error::failed(last_word(&err).unwrap_or(status.to_string()))),
        None => Err(Error::failed(
            "the run took longer than --time-limit allows",
        )),
    }
}

/// The error line of a run, without the program's name.
fn last_word(stderr: &str) -> Option<String> {
    let lines = || stderr.lines().map(str::trim).filter(|l| !l.is_empty());
    let said = lines().rev().find_map(|l| l.strip_prefix("tandem: "));
    said.or_else(|| lines().next_back()).map(str::to_owned)
}

fn reader(
    pipe: Option<impl Read + Send + 'static>,
) -> std::io::Result<std::thread::JoinHandle<Vec<u8>>> {
    std::thread::Builder::new().spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe
            && let Err(e) = pipe.read_to_end(&mut bytes)
        {
            tracing::debug!("a run's output: {e}");
        }
        bytes
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_run_is_its_error_line() {
        let text = "loading\ntandem: rank 1 needs 5 GiB\n\n";
        assert_eq!(last_word(text).unwrap(), "rank 1 needs 5 GiB");
        assert_eq!(
            last_word("a\nkilled by the system").unwrap(),
            "killed by the system"
        );
        assert_eq!(last_word("\n"), None);
    }

    #[test]
    fn a_run_that_never_ends_is_killed() {
        let mut command = Command::new("sleep");
        command.arg("600");
        let begin = Instant::now();
        let child = start(command).unwrap();
        let e = outcome(child, begin + Duration::from_millis(50)).unwrap_err();
        assert!(e.to_string().contains("--time-limit"), "{e}");
        assert!(begin.elapsed() < Duration::from_secs(10));
    }
}
