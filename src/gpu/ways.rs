//! Which way the sums over ranks of a decode step take, measured at the start: fused with the residual add and the norm over
//! peer memory, or the library's and then a kernel for the rest.

use super::backend::wait_for;
use super::chain::chain_us;
use super::collective::{DeviceCollective, FusedNorm};
use super::driver::{Driver, Function, Launch, Stream, args};
use super::kernels;
use super::memory::{DeviceBuffer, OwnedEvent};
use crate::Result;
use crate::layout::SUM_ROWS;
use std::sync::Arc;

/// Of the norm; any will do.
const EPS: f32 = 1e-6;
/// Times that each is measured; the best counts.
const RUNS: usize = 3;
/// The library has won where it takes less than this part of the fused sum's time: the two round differently, and noise must
/// not decide which tokens a plan gives.
const CLEARLY: f64 = 0.93;

/// One sum of `rows` rows with the residual add and the norm behind it, in microseconds, on the slowest rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Way {
    /// Rows of the residual stream.
    pub rows: usize,
    /// Fused, over peer memory.
    pub fused_us: f64,
    /// The library's sum, then a kernel for the rest.
    pub library_us: f64,
}

impl Way {
    /// Whether the fused sum is taken.
    pub fn is_fused(&self) -> bool {
        self.library_us >= CLEARLY * self.fused_us
    }
}

/// Whether a sum of `rows` rows is to be fused by what was measured; `None` where nothing speaks for that many.
pub fn is_fused(ways: &[Way], rows: usize) -> Option<bool> {
    ways.iter().find(|w| w.rows >= rows).map(Way::is_fused)
}

/// The ways in words, for the log.
pub fn text(ways: &[Way], library: &str) -> String {
    let one = |w: &Way| {
        let taken = if w.is_fused() { "peer memory" } else { library };
        let (rows, fused, other) = (w.rows, w.fused_us, w.library_us);
        format!("{rows}: {fused:.1} against {other:.1}, {taken}")
    };
    let all: Vec<String> = ways.iter().map(one).collect();
    format!(
        "µs of a sum over ranks with its norm, peer memory against {library}, by rows: {}",
        all.join("; ")
    )
}

/// What is summed while it is measured: zeros.
pub struct Trial {
    driver: Arc<dyn Driver>,
    add_norm: Function,
    partial: DeviceBuffer,
    x: DeviceBuffer,
    weight: DeviceBuffer,
    h: DeviceBuffer,
    hidden: usize,
    stream: Stream,
}

impl Trial {
    /// Buffers for the longest sum; they are returned when this is dropped, by when the stream must have done with them.
    ///
    /// # Errors
    /// Too little memory, or a kernel that cannot be compiled.
    pub fn new(driver: &Arc<dyn Driver>, hidden: usize, stream: Stream) -> Result<Trial> {
        let n = SUM_ROWS[SUM_ROWS.len() - 1] * hidden;
        let zeros = |bytes: usize| {
            let buffer = DeviceBuffer::new(driver, bytes, "measuring")?;
            // SAFETY: inside the buffer, which outlives the stream's work.
            unsafe { driver.fill(buffer.ptr(), 0, bytes, stream) }?;
            Ok::<_, crate::Error>(buffer)
        };
        Ok(Trial {
            driver: driver.clone(),
            add_norm: driver.function(&kernels::NORM, "add_rms_norm")?,
            partial: zeros(2 * n)?,
            x: zeros(4 * n)?,
            weight: zeros(2 * hidden)?,
            h: zeros(2 * n)?,
            hidden,
            stream,
        })
    }

    /// This rank's own time of both ways; `None` where `comm` has but one.
    ///
    /// # Errors
    /// Those of the driver and the library; a lost rank.
    pub fn measure(&self, comm: &mut dyn DeviceCollective, rows: usize) -> Result<Option<Way>> {
        let (driver, stream) = (&self.driver, self.stream);
        let fused = FusedNorm {
            partial: self.partial.ptr(),
            x: self.x.ptr(),
            weight: self.weight.ptr(),
            h: self.h.ptr(),
            rows,
            hidden: self.hidden,
            eps: EPS,
        };
        // SAFETY: the buffers outlive the stream's work (see the type).
        let fused_us = chain_us(driver, comm, stream, RUNS, |comm| unsafe {
            comm.all_reduce_add_norm(&fused, stream)
        })?;
        let Some(fused_us) = fused_us else {
            return Ok(None);
        };
        let library_us = chain_us(driver, comm, stream, RUNS, |comm| {
            self.by_library(comm, rows).map(|()| true)
        })?;
        Ok(library_us.map(|library_us| Way {
            rows,
            fused_us,
            library_us,
        }))
    }

    /// The first sum by the library, which connects the ranks: no part of what a sum takes.
    ///
    /// # Errors
    /// Those of the driver and the library; a lost rank.
    pub fn connect(&self, comm: &mut dyn DeviceCollective) -> Result<()> {
        let connected = self.by_library(comm, SUM_ROWS[0]).and_then(|()| {
            let done = OwnedEvent::new(&self.driver, false)?;
            done.record(self.stream)?;
            wait_for(&done, comm)
        });
        if connected.is_err() {
            comm.abandon();
        }
        connected
    }

    fn by_library(&self, comm: &mut dyn DeviceCollective, rows: usize) -> Result<()> {
        let (partial, n) = (self.partial.ptr(), rows * self.hidden);
        let (x, weight, h) = (self.x.ptr(), self.weight.ptr(), self.h.ptr());
        let args = args![partial, x, weight, h, self.hidden, EPS];
        let launch = Launch::norm(rows, self.hidden);
        // SAFETY: the parameters of norm.cu; the buffers outlive the stream's work (see the type).
        unsafe {
            comm.all_reduce(partial, n, self.stream)?;
            self.driver
                .launch(self.add_norm, &launch, &args, self.stream)
        }
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        if let Err(e) = self.driver.synchronize(self.stream) {
            tracing::debug!("{e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_goes_the_way_of_the_next_count_up_and_a_draw_stays_fused() {
        let way = |rows, fused_us, library_us| Way {
            rows,
            fused_us,
            library_us,
        };
        let ways = [way(1, 6.0, 9.0), way(8, 9.0, 8.8), way(16, 12.0, 9.0)];
        let fused = |rows| is_fused(&ways, rows);
        assert_eq!([1, 2, 8].map(fused), [Some(true); 3]);
        assert_eq!([9, 16].map(fused), [Some(false); 2]);
        assert_eq!((fused(17), is_fused(&[], 1)), (None, None));
        let text = text(&ways, "NCCL");
        assert!(text.contains("8: 9.0 against 8.8, peer memory; 16: 12.0 against 9.0, NCCL"));
    }
}
