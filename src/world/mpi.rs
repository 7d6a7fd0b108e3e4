//! Start-up over MPI (feature `mpi`): rank 0's address goes out by one `MPI_Bcast`, all the rest is TCP.
//!
//! It serves where the launcher's variables do not lead to rank 0: several nodes under `mpirun`.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use mpi::traits::{Communicator, Root};
use serde::{Deserialize, Serialize};

use super::secret::{self, Secret};
use super::{LOCALHOST, Rendezvous, Source, World, door, hello};
use crate::{Error, Result};

/// Room for the encoded [`Address`]; host names have 64 bytes at most.
const ROOM: usize = 256;

#[derive(Serialize, Deserialize)]
struct Address {
    host: String,
    port: u16,
    token: u64,
    /// MPI's own connections are as private as its launcher makes them; the ranks need no other secret.
    key: [u8; secret::SIZE],
}

/// `world` with rank 0's address from MPI, where a process manager that MPI can talk to has started this process.
///
/// # Errors
/// When MPI does not start, or starts with another number of ranks than the launcher's variables say.
pub(super) fn exchange_address(world: &World, timeout: Duration) -> Result<World> {
    let has_process_manager = match world.source {
        Source::OpenMpi | Source::Pmi => true,
        Source::Slurm => step_has_pmix(),
        _ => false,
    };
    if !has_process_manager {
        return Ok(world.clone());
    }
    // A rank that never starts keeps MPI waiting for good: a second thread looks at the clock.
    let (done, clock) = channel::<()>();
    let rank = world.rank;
    let clock = move || {
        if clock.recv_timeout(timeout) == Err(RecvTimeoutError::Timeout) {
            crate::logging::say(format_args!(
                "tandem: rank {rank}: MPI did not bring the ranks together within {} s",
                timeout.as_secs_f64()
            ));
            std::process::exit(1);
        }
    };
    std::thread::Builder::new()
        .spawn(clock)
        .map_err(|e| Error::failed(format!("cannot watch MPI's start: {e}")))?;
    let exchanged = broadcast_address(world);
    drop(done);
    exchanged
}

/// Whether this very step was started with `srun --mpi=pmix`; the variables of an outer one mean nothing.
fn step_has_pmix() -> bool {
    let [namespace, job, step] = ["PMIX_NAMESPACE", "SLURM_JOB_ID", "SLURM_STEP_ID"]
        .map(|name| std::env::var(name).unwrap_or_default());
    namespace.ends_with(&format!(".{job}.{step}"))
}

fn broadcast_address(world: &World) -> Result<World> {
    let universe = mpi::initialize().ok_or_else(|| {
        Error::failed(
            "MPI does not start: start with mpirun or srun --mpi=pmix, or use a build without mpi",
        )
    })?;
    let comm = universe.world();
    let (rank, size) = (comm.rank() as usize, comm.size() as usize);
    if (rank, size) != (world.rank, world.size) {
        return Err(Error::failed(format!(
            "this is rank {} of {} ({}), but MPI says rank {rank} of {size}: \
             the MPI that tandem was built with is not the one that started it",
            world.rank,
            world.size,
            world.source.name()
        )));
    }
    let mut bytes = [0; ROOM];
    let mut listener = None;
    if rank == 0 {
        let failed = |e| Error::failed(format!("cannot listen: {e}"));
        let bound = door::listen_everywhere(0).map_err(failed)?;
        let address = Address {
            host: hello::host_name(),
            port: bound.local_addr().map_err(failed)?.port(),
            token: u64::from_le_bytes(secret::random()?),
            key: secret::random()?,
        };
        postcard::to_slice(&address, &mut bytes)
            .map_err(|_| Error::failed("this machine's host name is too long"))?;
        listener = Some(Arc::new(vec![bound]));
    }
    comm.process_at_rank(0).broadcast_into(&mut bytes[..]);
    let address: Address = postcard::from_bytes(&bytes)
        .map_err(|_| Error::failed("rank 0's address did not come through MPI"))?;
    // MPI has done its part; ending it now, together, keeps it out of a rank's failure later on.
    drop(universe);
    Ok(World {
        token: address.token,
        secret: Secret::of_key(address.key),
        rendezvous: match listener {
            Some(listener) => Rendezvous::Listening(listener),
            None => Rendezvous::At {
                host: if address.host == hello::host_name() {
                    LOCALHOST.to_owned()
                } else {
                    address.host
                },
                ports: vec![address.port],
            },
        },
        ..world.clone()
    })
}
