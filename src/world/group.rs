//! The ranks after they have met: rank 0's word to all, the collectives, and one end for all.

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::hello::{self, Hello};
use super::meet::{self, Met};
use super::monitor::{FAREWELL, HEARING, SETTLE, Shared};
use super::wire::Kind;
use super::{DEFAULT_TIMEOUT, World, limits};
use crate::comm::{HostCollective, ShmCollective, Solo, TcpCollective};
use crate::{Error, Result};

/// The longest time to wait: a sum with it must be a time that the clock can show.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// Shows the error ([`Error::Told`]: nothing) and ends the process.
pub type End = Arc<dyn Fn(&Error) + Send + Sync>;

/// How to meet, and what to do when the run ends while the main thread is elsewhere.
#[derive(Clone)]
pub struct MeetOptions {
    /// How long to wait for the others.
    pub timeout: Duration,
    /// Called on a thread of the group when the run has failed; by default it prints and exits.
    pub end: End,
    /// How long rank 0 listens for what else has gone wrong before it decides which error counts.
    pub settle: Duration,
    /// Told to every rank when Ctrl-C, SIGTERM or SIGHUP ends this one (the handlers are for the whole process).
    pub signals: bool,
}

impl Default for MeetOptions {
    fn default() -> Self {
        MeetOptions {
            timeout: DEFAULT_TIMEOUT,
            end: Arc::new(print_and_exit),
            settle: SETTLE,
            signals: true,
        }
    }
}

fn print_and_exit(error: &Error) {
    let code = i32::from(error.exit_code());
    // Exit handlers of a device driver may hang while the main thread is inside it; the end must not.
    let last_resort = std::thread::Builder::new().spawn(move || {
        std::thread::sleep(FAREWELL);
        // SAFETY: ends the process at once; takes a plain integer.
        unsafe { libc::_exit(code) }
    });
    drop(last_resort);
    super::wishes::grant();
    if !matches!(error, Error::Told(_)) {
        crate::logging::say(format_args!("tandem: {error}"));
    }
    std::process::exit(code)
}

/// All ranks of a run, seen from one of them.
pub struct Group {
    shared: Arc<Shared>,
    hellos: Vec<Hello>,
    inbox: Mutex<Receiver<Vec<u8>>>,
    collective: Mutex<Option<Box<dyn HostCollective>>>,
}

impl Group {
    /// One rank: nobody to meet.
    pub fn alone(hello: Hello) -> Self {
        let shared = Shared::new(
            0,
            vec![hello.host.clone()],
            vec![None],
            &World::alone(),
            &MeetOptions::default(),
        );
        Group {
            shared: Arc::new(shared),
            hellos: vec![hello],
            inbox: Mutex::new(channel().1),
            collective: Mutex::new(Some(Box::new(Solo))),
        }
    }

    /// Meets the other ranks and compares what all have found.
    ///
    /// A rank that has already failed comes too, with its error in `hello`: that is how it is shown once.
    ///
    /// # Errors
    /// On rank 0 the error to show; on the others [`Error::Told`], or their own when rank 0 is out of reach.
    pub fn meet(world: &World, mut hello: Hello, options: &MeetOptions) -> Result<Group> {
        hello.rank = world.rank;
        if world.size <= 1 {
            return match hello.error {
                Some((code, line)) => Err(hello::with_code(code, line)),
                None => Ok(Group::alone(hello)),
            };
        }
        let timeout = options.timeout.min(LONGEST);
        if let (None, Err(e)) = (&hello.error, limits::allow_connections(world.size)) {
            hello = hello.with_error(&e);
        }
        #[cfg(feature = "mpi")]
        let world = &super::mpi::exchange_address(world, timeout)?;
        let mut met = meet::meet(world, hello, timeout)?;
        let hellos = met.hellos();
        let hosts = hellos.iter().map(|h| h.host.clone()).collect();
        let controls = std::mem::take(&mut met.controls);
        let (shared, inbox) = Shared::start(world, hosts, controls, options)?;
        let spin = may_spin(&hellos, world.rank);
        let collective =
            connect(met, world.rank, &shared.hosts, spin).map_err(|e| shared.fail(e))?;
        Ok(Group {
            shared,
            hellos,
            inbox: Mutex::new(inbox),
            collective: Mutex::new(Some(collective)),
        })
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.shared.rank
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.hellos.len()
    }

    /// What every rank said, by rank.
    pub fn hellos(&self) -> &[Hello] {
        &self.hellos
    }

    /// This rank's number among those on its machine, and how many they are.
    pub fn local_rank_and_size(&self) -> (usize, usize) {
        let host = &self.shared.hosts[self.rank()];
        let here = |hosts: &[String]| hosts.iter().filter(|h| *h == host).count();
        (
            here(&self.shared.hosts[..self.rank()]),
            here(&self.shared.hosts),
        )
    }

    /// Rank 0: sends `message` to all others, which [`Group::receive`] it in the order sent.
    pub fn broadcast(&self, message: &[u8]) -> Result<()> {
        for (rank, link) in self.shared.links.iter().enumerate() {
            let Some(link) = link else { continue };
            if let Err(e) = link.send(Kind::Data, message) {
                // The monitor knows better why, and is about to end this process.
                std::thread::sleep(HEARING);
                return Err(Error::failed(format!(
                    "the connection to rank {rank} ({}) is lost: {e}",
                    self.shared.hosts[rank]
                )));
            }
        }
        Ok(())
    }

    /// Other ranks: waits for rank 0's next message.
    ///
    /// # Errors
    /// When rank 0 has said goodbye.
    pub fn receive(&self) -> Result<Vec<u8>> {
        let inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        inbox
            .recv()
            .map_err(|_| Error::failed("rank 0 has nothing more to say"))
    }

    /// The collectives over host memory; the first call gets them, later ones one rank alone.
    pub fn take_collective(&self) -> Box<dyn HostCollective> {
        let mut collective = self
            .collective
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        collective.take().unwrap_or_else(|| Box::new(Solo))
    }

    /// Ends the run on all ranks because of `error`; returns what `main` should end with.
    ///
    /// With [`Error::Told`] all leave quietly (a reader that has closed the pipe, say).
    pub fn fail(&self, error: Error) -> Error {
        self.shared.fail(error)
    }

    /// The orderly end: waits for all, after which a closed connection means nothing.
    ///
    /// # Errors
    /// When a process that rank 0 started ends badly after all.
    pub fn finish(self) -> Result<()> {
        self.shared.finish()
    }
}

/// The data connections, and shared memory instead of them where every rank can have it.
fn connect(
    mut met: Met,
    rank: usize,
    hosts: &[String],
    spin: bool,
) -> Result<Box<dyn HostCollective>> {
    let segment = met.segment(rank);
    let mut tcp = TcpCollective::new(rank, met.mesh(rank)?, hosts, spin)?;
    let Some(segment) = segment else {
        return Ok(Box::new(tcp));
    };
    let mut willing = [f32::from(u8::from(segment.is_ok()))];
    tcp.all_reduce(&mut willing)?;
    match segment {
        Ok(segment) if willing[0] == hosts.len() as f32 => {
            Ok(Box::new(ShmCollective::new(segment, tcp)))
        }
        refused => {
            let why = refused.err().map(|e| e.to_string()).unwrap_or_default();
            tracing::debug!("no shared memory between the ranks, TCP instead {why}");
            Ok(Box::new(tcp))
        }
    }
}

/// Waiting without sleeping only helps where every rank of this machine has a CPU to itself.
fn may_spin(hellos: &[Hello], rank: usize) -> bool {
    let here = hellos.iter().filter(|h| h.host == hellos[rank].host);
    let mut cpus: Vec<usize> = here.clone().flat_map(|h| h.cpus.iter().copied()).collect();
    cpus.sort_unstable();
    cpus.dedup();
    here.count() <= cpus.len()
}
