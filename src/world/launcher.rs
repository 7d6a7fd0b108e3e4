//! Rank and size from the variables of the launchers.
//!
//! Launchers nest: `mpirun` inside a Slurm job starts its daemons with `srun`, `torchrun` may itself be a Slurm
//! task, and variables of the outer one stay visible. So the launchers that leave marks of their own
//! (`OMPI_COMM_WORLD_SIZE`, Hydra's `MPI_LOCALNRANKS`, `TORCHELASTIC_RUN_ID`) come before the Slurm step, which
//! would describe their daemons, and the bare `PMI_RANK` and `RANK`, which a job script may have exported for
//! other ends, come after it.

use super::{LOCALHOST, MAX_RANKS, Rendezvous, Source, World, WorldFlags, hostlist, spawn};
use crate::{Error, Result};

/// Ports derived from a job's name lie here: above the services, below the kernel's range for outgoing connections.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// How many ports both sides try before giving up.
const CANDIDATES: u64 = 8;

/// Slurm's step numbers from here on are no `srun`: interactive shell, batch script, external.
const FIRST_SPECIAL_STEP: usize = 0xffff_fff0;

type Env<'a> = &'a dyn Fn(&str) -> Option<String>;
type Launcher = fn(Env) -> Result<Option<World>>;

pub(super) fn detect(flags: &WorldFlags, env: Env) -> Result<World> {
    let launchers: [Launcher; 8] = [
        spawn::from_parent,
        torchrun_agent,
        open_mpi,
        hydra,
        slurm_step,
        pmi,
        pmix_without_size,
        torchrun,
    ];
    if let Some(world) = from_flags(flags)? {
        return Ok(world);
    }
    for launcher in launchers {
        if let Some(world) = launcher(env)? {
            return Ok(world);
        }
    }
    warn_of_tasks_without_srun(flags, env);
    Ok(World::alone())
}

fn from_flags(flags: &WorldFlags) -> Result<Option<World>> {
    let (rank, size) = match (flags.rank, flags.world_size) {
        (None, None) => return Ok(None),
        (Some(rank), Some(size)) => (rank, size),
        _ => return Err(Error::usage("--rank and --world-size go together")),
    };
    if rank >= size {
        return Err(Error::usage(format!(
            "--rank {rank}: ranks run from 0 to --world-size minus 1, and --world-size is {size}"
        )));
    }
    if size > 1 && flags.rendezvous.is_none() {
        return Err(Error::usage(
            "--rank and --world-size need --rendezvous HOST:PORT, where rank 0 listens",
        ));
    }
    Ok(Some(World {
        rank,
        size,
        local_rank: None,
        local_size: None,
        source: Source::Flags,
        ..World::alone()
    }))
}

fn slurm_step(env: Env) -> Result<Option<World>> {
    let Some(step) = number(env, "SLURM_STEP_ID")? else {
        return Ok(None);
    };
    if step >= FIRST_SPECIAL_STEP {
        return Ok(None);
    }
    let mut world = place(
        env,
        Source::Slurm,
        "SLURM_PROCID",
        if env("SLURM_STEP_NUM_TASKS").is_some() {
            "SLURM_STEP_NUM_TASKS"
        } else {
            "SLURM_NTASKS"
        },
    )?;
    world.local_rank = number(env, "SLURM_LOCALID")?;
    world.local_size = number(env, "SLURM_NODEID")?
        .zip(env("SLURM_STEP_TASKS_PER_NODE"))
        .and_then(|(node, counts)| hostlist::tasks_on_node(&counts, node));
    let job = env("SLURM_JOB_ID").unwrap_or_default();
    let name = ["slurm", &job, &step.to_string()];
    let node = first_node(env, &["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"])?;
    if matches!(node, Some((_, 1))) {
        world.local_size = Some(world.size);
    }
    let host = if world.one_machine() == Some(true) {
        Some(LOCALHOST.to_owned())
    } else {
        node.map(|(first, _)| first).or_else(|| env("MASTER_ADDR"))
    };
    world.meet_at(host, &name);
    Ok(Some(world))
}

fn open_mpi(env: Env) -> Result<Option<World>> {
    // A Slurm step's own PMIx server is the inner one: the variables of an `mpirun` around it are leftovers.
    let slurm_pmix = env("PMIX_NAMESPACE").is_some_and(|name| name.starts_with("slurm."));
    if slurm_pmix || env("OMPI_COMM_WORLD_SIZE").is_none() {
        return Ok(None);
    }
    let mut world = place(
        env,
        Source::OpenMpi,
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
    )?;
    world.local_rank = number(env, "OMPI_COMM_WORLD_LOCAL_RANK")?;
    world.local_size = number(env, "OMPI_COMM_WORLD_LOCAL_SIZE")?;
    let job = env("PMIX_NAMESPACE").or_else(|| env("OMPI_MCA_ess_base_jobid"));
    world.meet_where_mpi_starts(env, job)?;
    Ok(Some(world))
}

fn hydra(env: Env) -> Result<Option<World>> {
    if env("MPI_LOCALNRANKS").is_none() || env("PMI_SIZE").is_none() {
        return Ok(None);
    }
    pmi(env)
}

fn pmi(env: Env) -> Result<Option<World>> {
    if env("PMI_RANK").is_none() || env("PMI_SIZE").is_none() {
        return Ok(None);
    }
    let mut world = place(env, Source::Pmi, "PMI_RANK", "PMI_SIZE")?;
    world.local_rank = match number(env, "MPI_LOCALRANKID")? {
        Some(local) => Some(local),
        None => number(env, "PMI_LOCAL_RANK")?,
    };
    world.local_size = match number(env, "MPI_LOCALNRANKS")? {
        Some(local) => Some(local),
        None => number(env, "PMI_LOCAL_SIZE")?,
    };
    // Hydra gives the job no name that all ranks see, but on one machine all ranks have the same parent.
    let job = env("PALS_APID")
        .or_else(|| env("PMI_JOBID"))
        .or_else(|| Some(std::os::unix::process::parent_id().to_string()));
    world.meet_where_mpi_starts(env, job)?;
    Ok(Some(world))
}

/// PMIx keeps the number of ranks in its server, out of reach of the variables.
fn pmix_without_size(env: Env) -> Result<Option<World>> {
    match env("PMIX_RANK") {
        Some(rank) => Err(Error::failed(format!(
            "PMIX_RANK is {rank} but no variable says how many ranks there are: \
             start with srun, mpirun or torchrun, or give --rank, --world-size and --rendezvous HOST:PORT"
        ))),
        None => Ok(None),
    }
}

fn torchrun_agent(env: Env) -> Result<Option<World>> {
    if env("TORCHELASTIC_RUN_ID").is_none() {
        return Ok(None);
    }
    torchrun(env)
}

fn torchrun(env: Env) -> Result<Option<World>> {
    match (env("RANK"), env("WORLD_SIZE")) {
        (Some(_), Some(_)) => {}
        (None, None) => return Ok(None),
        // Batch systems and scripts use these words for other ends; one without the other says nothing.
        _ => {
            tracing::warn!("only one of RANK and WORLD_SIZE is set: both are ignored");
            return Ok(None);
        }
    }
    let mut world = place(env, Source::Torchrun, "RANK", "WORLD_SIZE")?;
    world.local_rank = number(env, "LOCAL_RANK")?;
    world.local_size = number(env, "LOCAL_WORLD_SIZE")?;
    if world.size == 1 {
        return Ok(Some(world));
    }
    let (Some(host), Some(port)) = (env("MASTER_ADDR"), number(env, "MASTER_PORT")?) else {
        world.rendezvous = Rendezvous::Unknown(
            "RANK and WORLD_SIZE are set, but not MASTER_ADDR and MASTER_PORT: set them to where rank 0 can listen"
                .into(),
        );
        return Ok(Some(world));
    };
    // torchrun's own store may listen at MASTER_PORT, and does not take kindly to strangers.
    let first = if env("TORCHELASTIC_USE_AGENT_STORE").as_deref() == Some("True") {
        port + 1
    } else {
        port
    };
    let ports: Vec<u16> = (first..first + CANDIDATES as usize)
        .filter_map(|p| u16::try_from(p).ok().filter(|&p| p != 0))
        .collect();
    if ports.is_empty() {
        return Err(Error::failed(format!("MASTER_PORT is {port}: not a port")));
    }
    let run = env("TORCHELASTIC_RUN_ID").unwrap_or_default();
    world.token = hash(&["torchrun", &run, &port.to_string()]);
    world.rendezvous = Rendezvous::At { host, ports };
    Ok(Some(world))
}

/// `sbatch` and `salloc` without `srun`: one process, whatever the allocation has.
fn warn_of_tasks_without_srun(flags: &WorldFlags, env: Env) {
    let tasks = number(env, "SLURM_NTASKS").ok().flatten().unwrap_or(1);
    if tasks > 1 && flags.ranks.is_none() {
        tracing::warn!(
            "the Slurm allocation has {tasks} tasks, but this is one process: start tandem with srun to use them"
        );
    }
}

impl World {
    fn meet_at(&mut self, host: Option<String>, name: &[&str]) {
        self.token = hash(name);
        if self.size > 1 {
            self.rendezvous = match host {
                Some(host) => Rendezvous::At {
                    host,
                    ports: candidate_ports(name),
                },
                None => Rendezvous::Unknown(format!(
                    "{} does not say where rank 0 is: give --rendezvous HOST:PORT, or set MASTER_ADDR",
                    self.source.name()
                )),
            };
        }
    }

    /// Under `mpirun`: this machine when all ranks are here, `MASTER_ADDR`, or the first node of a Slurm job.
    fn meet_where_mpi_starts(&mut self, env: Env, job: Option<String>) -> Result<()> {
        let job = job.unwrap_or_default();
        let slurm_job = env("SLURM_JOB_ID").unwrap_or_default();
        let here = self.local_size == Some(self.size);
        let host = if here {
            Some(LOCALHOST.to_owned())
        } else if let Some(host) = env("MASTER_ADDR") {
            Some(host)
        } else {
            first_node(env, &["SLURM_JOB_NODELIST"])?.map(|(first, _)| first)
        };
        if host.is_none() && self.size > 1 {
            self.rendezvous = Rendezvous::Unknown(format!(
                "the {} ranks are on several machines and {} does not say where rank 0 is: \
                 give --rendezvous HOST:PORT, set MASTER_ADDR, or use a build with the feature mpi",
                self.size,
                self.source.name()
            ));
            self.token = hash(&["mpi", &slurm_job, &job]);
            return Ok(());
        }
        self.meet_at(host, &["mpi", &slurm_job, &job]);
        Ok(())
    }
}

fn place(env: Env, source: Source, rank_name: &str, size_name: &str) -> Result<World> {
    let required = |name: &str| {
        number(env, name)?.ok_or_else(|| {
            Error::failed(format!("{name} is not set, though {} is", {
                if name == rank_name {
                    size_name
                } else {
                    rank_name
                }
            }))
        })
    };
    let (rank, size) = (required(rank_name)?, required(size_name)?);
    if rank >= size || size > MAX_RANKS {
        return Err(Error::failed(format!(
            "{rank_name} is {rank} and {size_name} is {size}: \
             the rank must be below the size, and the size {MAX_RANKS} at most"
        )));
    }
    Ok(World {
        rank,
        size,
        local_rank: None,
        local_size: None,
        source,
        ..World::alone()
    })
}

fn number(env: Env, name: &str) -> Result<Option<usize>> {
    let Some(text) = env(name) else {
        return Ok(None);
    };
    match text.trim().parse::<u32>() {
        Ok(n) => Ok(Some(n as usize)),
        Err(_) => Err(Error::failed(format!(
            "{name} is \"{text}\": expected a whole number"
        ))),
    }
}

fn first_node(env: Env, names: &[&str]) -> Result<Option<(String, usize)>> {
    let Some((name, list)) = names.iter().find_map(|n| env(n).map(|list| (n, list))) else {
        return Ok(None);
    };
    let hosts = hostlist::expand(&list).map_err(|e| Error::failed(format!("{name}: {e}")))?;
    Ok(hosts.first().map(|first| (first.clone(), hosts.len())))
}

/// `HOST:PORT`, `[IPv6]:PORT`.
pub(super) fn host_and_port(address: &str) -> Result<(String, u16)> {
    let split = address.rsplit_once(':').and_then(|(host, port)| {
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let port = port.parse::<u16>().ok().filter(|&p| p != 0)?;
        (!host.is_empty()).then(|| (host.to_owned(), port))
    });
    split.ok_or_else(|| {
        Error::usage(format!(
            "--rendezvous {address}: expected HOST:PORT with a port from 1 to 65535"
        ))
    })
}

fn candidate_ports(name: &[&str]) -> Vec<u16> {
    let span = u64::from(PORTS.end - PORTS.start);
    let first = hash(name) % span;
    (0..CANDIDATES).map(|i| port_of(first + i * 97)).collect()
}

/// One of [`PORTS`].
pub(super) fn port_of(number: u64) -> u16 {
    PORTS.start + (number % u64::from(PORTS.end - PORTS.start)) as u16
}

/// FNV-1a: the same in every build, so that ranks of different builds still meet and can say so.
pub(super) fn hash(parts: &[&str]) -> u64 {
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
