//! Who am I among the ranks, how do we meet, and how do we end together.
//!
//! [`World::detect`] reads rank and size from whoever started this process, [`Group::meet`] brings the ranks
//! together over TCP and compares what they found, and from then on the [`Group`] carries rank 0's decisions to
//! the others and sees to it that when one rank ends, all end, with one error shown.
//!
//! Rank 0 is the mouth: it alone prints an error that concerns the run. The others leave with the same exit code
//! and [`Error::Told`]. Only where rank 0 cannot be reached does each rank speak for itself.

mod door;
mod group;
mod handshake;
mod hello;
mod host;
mod hostlist;
mod launcher;
mod limits;
mod link;
mod meet;
mod monitor;
#[cfg(feature = "mpi")]
mod mpi;
mod owner;
mod secret;
mod signals;
mod spawn;
#[cfg(test)]
mod tests;
mod wire;
mod wishes;

#[cfg(test)]
pub(crate) use tests::as_another_user;

use std::net::{IpAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

pub use group::{End, Group, MeetOptions};
pub use hello::Hello;
pub use secret::Secret;
pub use spawn::{Children, ends_with_this_thread};
pub use wishes::last_wish;

use crate::{Error, Result};

/// How long the ranks wait for each other when `--rendezvous-timeout` does not say otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// More ranks than any tensor-parallel run has use for; a larger number is a mistake.
pub const MAX_RANKS: usize = 1024;

/// This machine, by whichever of its own addresses it has.
const LOCALHOST: &str = "localhost";

/// What the command line says about the world; every field is optional.
#[derive(Debug, Clone, Default)]
pub struct WorldFlags {
    /// `--ranks N`: start N processes on this machine.
    pub ranks: Option<usize>,
    /// `--rank R` (hidden): this process's rank, where no launcher says it.
    pub rank: Option<usize>,
    /// `--world-size N` (hidden): the number of ranks, where no launcher says it.
    pub world_size: Option<usize>,
    /// `--rendezvous HOST:PORT` (hidden): where rank 0 listens, instead of what the launcher's variables lead to.
    pub rendezvous: Option<String>,
}

/// Who told this process its rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Nobody: one process.
    Alone,
    /// `--rank` and `--world-size`.
    Flags,
    /// `--ranks N`: rank 0 on a workstation, or one of the copies it started.
    Local,
    /// A Slurm step (`srun`).
    Slurm,
    /// Open MPI's `mpirun`.
    OpenMpi,
    /// Another launcher that speaks PMI (MPICH's `mpiexec`, PALS).
    Pmi,
    /// `torchrun`, or its variables `RANK` and `WORLD_SIZE`.
    Torchrun,
}

/// Where the ranks find rank 0.
#[derive(Debug, Clone)]
pub enum Rendezvous {
    /// One rank: nowhere.
    None,
    /// Rank 0 of a local run holds its sockets already.
    Listening(Arc<Vec<TcpListener>>),
    /// At the first of these ports, on this host, where rank 0 can listen.
    At {
        /// Host name or address of rank 0.
        host: String,
        /// Candidate ports, in the order in which both sides try them.
        ports: Vec<u16>,
    },
    /// The launcher does not say; the text says what would.
    Unknown(String),
}

/// This process's place among the ranks.
#[derive(Debug, Clone)]
pub struct World {
    /// This rank, `0..size`.
    pub rank: usize,
    /// Number of ranks.
    pub size: usize,
    /// Rank among those on this machine, where the launcher says it.
    pub local_rank: Option<usize>,
    /// Number of ranks on this machine, where the launcher says it.
    pub local_size: Option<usize>,
    /// Who said so.
    pub source: Source,
    /// Where rank 0 is to be found.
    pub rendezvous: Rendezvous,
    /// Names this run, so that another run's ranks on the same machines are told from ours. Not a secret.
    pub token: u64,
    /// What ranks on several machines know each other by.
    pub secret: Secret,
    /// The processes that rank 0 of a local run started.
    pub children: Option<Arc<Children>>,
}

impl World {
    /// One process.
    pub fn alone() -> Self {
        World {
            rank: 0,
            size: 1,
            local_rank: Some(0),
            local_size: Some(1),
            source: Source::Alone,
            rendezvous: Rendezvous::None,
            token: 0,
            secret: Secret::none("there is one rank"),
            children: None,
        }
    }

    /// Rank and size from the flags or from whoever started this process (`env` looks a variable up).
    ///
    /// Starts nothing: with `--ranks N` and no launcher it answers as for one process, and [`World::start`] does
    /// the rest.
    ///
    /// # Errors
    /// Malformed or contradictory numbers, named with their variable; a `TANDEM_SECRET` that is too short.
    pub fn detect(flags: &WorldFlags, env: &dyn Fn(&str) -> Option<String>) -> Result<World> {
        match flags.ranks {
            Some(0) => return Err(Error::usage("--ranks 0: at least 1")),
            Some(n) if n > MAX_RANKS => {
                return Err(Error::usage(format!("--ranks {n}: at most {MAX_RANKS}")));
            }
            _ => {}
        }
        let mut world = launcher::detect(flags, env)?;
        if world.size > MAX_RANKS {
            return Err(Error::usage(format!(
                "{} ranks: tandem runs on {MAX_RANKS} at most",
                world.size
            )));
        }
        if let Some(address) = &flags.rendezvous {
            let (host, port) = launcher::host_and_port(address)?;
            world.token = launcher::hash(&["rendezvous", &port.to_string()]);
            if world.size > 1 {
                world.rendezvous = Rendezvous::At {
                    host,
                    ports: vec![port],
                };
            }
        }
        if world.size > 1 && world.source != Source::Local {
            world.secret = Secret::find(env)?;
            if flags.rendezvous.is_none() {
                world.add_unforeseeable_ports();
            }
        }
        match flags.ranks {
            Some(n) if world.size > 1 && n != world.size => Err(Error::usage(format!(
                "--ranks {n} starts processes on one machine, but this is already rank {} of {} ({}): leave --ranks out",
                world.rank,
                world.size,
                world.source.name(),
            ))),
            _ => Ok(world),
        }
    }

    /// Further ports that nobody can hold beforehand, for when all of those that follow from the job are taken.
    fn add_unforeseeable_ports(&mut self) {
        let numbers = self.secret.numbers(b"tandem: ports", self.token);
        if let (Rendezvous::At { ports, .. }, Some(numbers)) = (&mut self.rendezvous, numbers) {
            ports.extend(
                numbers
                    .iter()
                    .take(8)
                    .map(|n| launcher::port_of(u64::from(*n))),
            );
        }
    }

    /// Whether all ranks are on this machine, where the launcher says it.
    fn one_machine(&self) -> Option<bool> {
        self.local_size.map(|here| here == self.size)
    }

    /// Whether no rank can be on another machine, so that this one alone need reach its data connections.
    fn stays_here(&self) -> bool {
        let literal = match &self.rendezvous {
            Rendezvous::At { host, .. } => host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback()),
            _ => false,
        };
        self.one_machine().unwrap_or(literal)
    }

    /// [`World::detect`] with this process's environment, and for `--ranks N` the start of the other N - 1.
    ///
    /// Call it from the main thread: the started processes end when the thread that started them does.
    pub fn start(flags: &WorldFlags) -> Result<World> {
        let world = World::detect(flags, &|name| std::env::var(name).ok())?;
        match flags.ranks {
            Some(n) if n > 1 && world.size == 1 => spawn::spawn_ranks(n),
            _ => Ok(world),
        }
    }
}

/// Has a signal that ends this process carry out its last wishes first; a [`Group`] does so by itself.
///
/// # Errors
/// No thread or pipe can be had.
pub fn watch_signals() -> Result<()> {
    signals::watch(|_| {}).map_err(|e| Error::failed(format!("cannot watch for signals: {e}")))
}

/// This process's rank where a launcher says it: for a mistake in the command line, which one rank should show.
pub fn launched_rank() -> Option<usize> {
    let env = |name: &str| std::env::var(name).ok();
    let world = World::detect(&WorldFlags::default(), &env).ok()?;
    (world.source != Source::Alone).then_some(world.rank)
}

impl Source {
    /// What started the ranks, in words.
    pub fn name(self) -> &'static str {
        match self {
            Source::Alone => "one process",
            Source::Flags => "flags",
            Source::Local => "--ranks",
            Source::Slurm => "a Slurm step",
            Source::OpenMpi => "Open MPI",
            Source::Pmi => "PMI",
            Source::Torchrun => "torchrun's variables",
        }
    }
}
