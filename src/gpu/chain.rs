//! The time of work too short to be timed alone: a recorded chain of it.

use super::backend::wait_for;
use super::collective::DeviceCollective;
use super::driver::{Driver, Graph, Stream};
use super::memory::OwnedEvent;
use crate::Result;
use std::sync::Arc;

/// How often the work is recorded in a row.
const LENGTH: usize = 20;

/// Microseconds of one of a recorded chain of `enqueue`, the best of `runs`; `None` where that says that it does nothing.
/// Every rank measures the same at the same time.
///
/// # Errors
/// Those of `enqueue` and the driver; a lost rank.
pub fn chain_us(
    driver: &Arc<dyn Driver>,
    comm: &mut dyn DeviceCollective,
    stream: Stream,
    runs: usize,
    enqueue: impl FnMut(&mut dyn DeviceCollective) -> Result<bool>,
) -> Result<Option<f64>> {
    let timed = record_and_time(driver, comm, stream, runs, enqueue);
    if timed.is_err() {
        // Whoever waits for the device now must not wait for a rank that is gone.
        comm.abandon();
    }
    timed
}

fn record_and_time(
    driver: &Arc<dyn Driver>,
    comm: &mut dyn DeviceCollective,
    stream: Stream,
    runs: usize,
    mut enqueue: impl FnMut(&mut dyn DeviceCollective) -> Result<bool>,
) -> Result<Option<f64>> {
    // Once as it is, so that libraries can set up what they need.
    if !enqueue(comm)? {
        return Ok(None);
    }
    let ran = OwnedEvent::new(driver, false)?;
    ran.record(stream)?;
    wait_for(&ran, comm)?;
    driver.begin_capture(stream)?;
    let recorded = (0..LENGTH).try_for_each(|_| enqueue(comm).map(|_| ()));
    let graph = driver.end_capture(stream)?;
    let timed = recorded.and_then(|()| best_us(driver, comm, stream, graph, runs));
    if timed.is_err() {
        comm.abandon();
    }
    driver.synchronize(stream)?;
    driver.destroy_graph(graph)?;
    timed.map(|us| Some(us / LENGTH as f64))
}

fn best_us(
    driver: &Arc<dyn Driver>,
    comm: &mut dyn DeviceCollective,
    stream: Stream,
    graph: Graph,
    runs: usize,
) -> Result<f64> {
    let before = OwnedEvent::new(driver, true)?;
    let after = OwnedEvent::new(driver, true)?;
    let mut best = f64::INFINITY;
    for _ in 0..runs {
        // The first launch brings the ranks in line, so that the second is not charged with a late one.
        // SAFETY: what was recorded uses buffers that the caller keeps until the device has done.
        unsafe { driver.launch_graph(graph, stream) }?;
        before.record(stream)?;
        // SAFETY: as above.
        unsafe { driver.launch_graph(graph, stream) }?;
        after.record(stream)?;
        wait_for(&after, comm)?;
        best = best.min(1e3 * f64::from(after.ms_since(&before)?));
    }
    // A clock that has not moved would make a rate without end.
    Ok(best.max(1e-3))
}
