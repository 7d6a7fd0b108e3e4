//! What the ranks say to each other in a forward pass.

mod shm;
mod tcp;
#[cfg(test)]
mod tests;

pub use shm::{Segment, ShmCollective};
pub use tcp::TcpCollective;

use crate::{Error, Result};

/// The collectives of a forward pass over host memory; every rank calls the same ones in the same order.
///
/// Results are identical bit for bit on every rank and from run to run: contributions are added in rank order.
pub trait HostCollective: Send {
    /// This rank, `0..size`.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn size(&self) -> usize;
    /// The way the data takes, in a word or two.
    fn name(&self) -> &'static str {
        "host memory"
    }
    /// `x[i] = Σ over ranks of x[i]`, in place.
    fn all_reduce(&mut self, x: &mut [f32]) -> Result<()>;
    /// `out` is every rank's `local` in rank order; `counts[r]` elements from rank `r` (`counts[rank] == local.len()`).
    fn all_gather(&mut self, local: &[f32], counts: &[usize], out: &mut [f32]) -> Result<()>;
}

/// One rank alone: nothing to exchange.
pub struct Solo;

impl HostCollective for Solo {
    fn rank(&self) -> usize {
        0
    }
    fn size(&self) -> usize {
        1
    }
    fn name(&self) -> &'static str {
        "one rank"
    }
    fn all_reduce(&mut self, _: &mut [f32]) -> Result<()> {
        Ok(())
    }
    fn all_gather(&mut self, local: &[f32], _: &[usize], out: &mut [f32]) -> Result<()> {
        out.copy_from_slice(local);
        Ok(())
    }
}

/// Whether the buffers of an [`HostCollective::all_gather`] are those of its counts.
fn check_counts(
    comm: &impl HostCollective,
    local: &[f32],
    counts: &[usize],
    out: &[f32],
) -> Result<()> {
    let total: usize = counts.iter().sum();
    if counts.len() == comm.size() && counts[comm.rank()] == local.len() && total == out.len() {
        return Ok(());
    }
    Err(Error::failed(format!(
        "all_gather of {} elements into {}: the counts are {counts:?}",
        local.len(),
        out.len()
    )))
}
