//! The host as one more partner of every product: what the plan leaves outside the GPU is streamed over the link ahead of its
//! use, or multiplied by the cores where it lies, while the GPU multiplies what it holds.
//!
//! ```text
//!   a matrix's rows:   [ on the GPU | streamed | multiplied by the cores | in the files, streamed ]
//! ```
//!
//! [`Ring`] brings what is streamed, [`HostShare`] has the cores' part multiplied, `Files` reads what is not even in host
//! memory. HeteGen (Zhao et al., arXiv 2403.01164) shows the cut between cores and link on one GPU.

mod files;
mod ring;
mod share;

pub use files::FileSource;
pub use ring::Ring;
pub use share::{Cores, HostShare, TIMEOUT_MS};

use super::driver::{Driver, Stream};
use super::memory::LockedMemory;
use super::regions::{Region, is_gated};
use crate::layout::{RING_SLOT_BYTES, SHARE_ROWS};
use crate::weights::LocalMatrix;
use crate::{Error, Result};
use files::Files;
use std::sync::Arc;

/// The rows of one matrix that are not on the GPU. A unit is a row, or a feature of `gate_up` with its two rows.
pub struct HostPart {
    /// Local name of the matrix.
    pub name: String,
    /// Whether a unit is a feature.
    pub gated: bool,
    /// Units on the GPU.
    pub resident: usize,
    /// Units in host memory.
    pub pinned: usize,
    /// Where they begin there.
    pub offset: usize,
    /// Input features.
    pub k: usize,
    /// The rest, in the files.
    pub file: Region,
}

impl HostPart {
    /// The part of `matrix` that is in host memory from `offset` on and in the files, behind `resident` units.
    pub fn new(
        matrix: &LocalMatrix,
        resident: usize,
        pinned: &Region,
        offset: usize,
        file: Region,
    ) -> HostPart {
        let gated = is_gated(&matrix.name);
        HostPart {
            name: matrix.name.clone(),
            gated,
            resident,
            pinned: pinned.rows() / rows_per_unit(gated),
            offset,
            k: pinned.row_bytes() / 2,
            file,
        }
    }

    /// Bytes of a unit.
    pub fn unit_bytes(&self) -> usize {
        self.k * 2 * rows_per_unit(self.gated)
    }

    fn units_in_files(&self) -> usize {
        self.file.rows() / rows_per_unit(self.gated)
    }

    /// How many of the units in host memory are streamed where the cores take `share` of them.
    fn streamed(&self, share: f64) -> usize {
        let all = self.pinned as f64;
        ((all * (1.0 - share) / UNITS as f64).round() as usize * UNITS).min(self.pinned)
    }
}

/// Rows of weights behind a unit.
pub fn rows_per_unit(gated: bool) -> usize {
    if gated { 2 } else { 1 }
}

/// Parts are cut at multiples of this many units, as the kernels' tiles are.
const UNITS: usize = 16;

/// Some units on their way to the GPU.
#[derive(Debug, Clone, PartialEq)]
pub struct Transfer {
    /// Which part.
    pub part: usize,
    /// The first unit's place among all of the matrix.
    pub unit: usize,
    /// How many.
    pub units: usize,
    /// Where they are.
    pub from: From,
    /// Their bytes.
    pub bytes: usize,
}

/// Where a transfer begins.
#[derive(Debug, Clone, PartialEq)]
pub enum From {
    /// Offset in locked host memory.
    Host(usize),
    /// Row of the part's [`Region`] in the files.
    File(usize),
}

/// What a step takes from where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Everything is streamed: prefill.
    Stream,
    /// The cores multiply their share: few tokens.
    Share,
}

/// Everything outside the GPU of one rank.
pub struct Offload {
    parts: Vec<HostPart>,
    memory: Arc<LockedMemory>,
    ring: Ring,
    share: Option<HostShare>,
    files: Option<Files>,
    mode: Mode,
}

impl Offload {
    /// `parts` come in the order in which a step needs them. `cores` multiply a share where there are any;
    /// `source` is read in every step for what lies in the files.
    ///
    /// # Errors
    /// Memory, threads or files that cannot be had.
    pub fn new(
        driver: &Arc<dyn Driver>,
        stream: Stream,
        memory: LockedMemory,
        parts: Vec<HostPart>,
        cores: Option<Cores>,
        source: Option<FileSource>,
    ) -> Result<Offload> {
        let memory = Arc::new(memory);
        let in_files = parts.iter().any(|p| p.units_in_files() > 0);
        let files = match (in_files, source) {
            (false, _) => None,
            (true, Some(source)) => Some(Files::new(driver, source, &parts)?),
            (true, None) => {
                return Err(Error::failed(
                    "some weights fit neither GPU nor host memory, and random weights have no files to read them from: \
                     raise --host-memory, or use more ranks",
                ));
            }
        };
        let share = cores
            .map(|cores| HostShare::start(driver, &parts, memory.clone(), cores, stream))
            .transpose()?;
        let mut offload = Offload {
            ring: Ring::new(driver, stream)?,
            parts,
            memory,
            share,
            files,
            mode: Mode::Stream,
        };
        offload.set_share(0.0)?;
        Ok(offload)
    }

    /// Gives the cores this part of what is in host memory, in steps of few tokens.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn set_share(&mut self, share: f64) -> Result<()> {
        let share = if self.share.is_some() { share } else { 0.0 };
        let streamed: Vec<usize> = self.parts.iter().map(|p| p.streamed(share)).collect();
        if let Some(host) = &self.share {
            host.set_streamed(&streamed);
        }
        let all: Vec<usize> = self.parts.iter().map(|p| p.pinned).collect();
        let (shared, streamed) = (
            transfers(&self.parts, &streamed),
            transfers(&self.parts, &all),
        );
        self.ring.set_transfers(streamed, shared)
    }

    /// Measures how fast link and cores are while both are at work, with all threads and with fewer, takes what is best, and
    /// cuts accordingly; the two rates in GB/s.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn balance(&mut self) -> Result<Option<(f64, f64)>> {
        let Some(share) = self.share.as_ref().filter(|_| self.is_shareable()) else {
            return Ok(None);
        };
        let all = share.threads();
        let mut best = (0, 0.0, 0.0);
        for quarters in (1..=4).rev() {
            let threads = (all * quarters).div_ceil(4);
            share.set_threads(threads);
            let cores = share.begin_measuring()?;
            let link = self.ring.measure(&self.memory, &|| share.is_measuring())?;
            let cores = cores.recv().unwrap_or(0.0);
            if link + cores > best.1 + best.2 {
                best = (threads, link, cores);
            }
        }
        let (threads, link, cores) = best;
        share.set_threads(threads);
        // A coarse grid, so that a plan is cut alike in nearly all of its runs.
        let part = (cores / (cores + link) * 50.0).round() / 50.0;
        tracing::info!(
            "offload: the link brings {link:.1} GB/s while {threads} of {all} threads multiply {cores:.1} GB/s: they take {:.0}%",
            100.0 * part
        );
        self.set_share(part)?;
        Ok(Some((link, cores)))
    }

    fn is_shareable(&self) -> bool {
        self.parts.iter().any(|p| p.pinned > 0)
    }

    /// Bytes of the weights in host memory and in the files.
    pub fn bytes(&self) -> (usize, usize) {
        let in_files = self.parts.iter().map(|p| p.file.bytes()).sum();
        (self.memory.as_slice().len(), in_files)
    }

    /// Whether steps may be recorded: reads of files are the host's own work.
    pub fn can_record(&self) -> bool {
        self.files.is_none()
    }

    /// Begins a step of `n_tokens`; `whole` where the step is to be launched as one piece of recorded work.
    ///
    /// # Errors
    /// Those of the driver, and of files that cannot be read.
    pub fn begin(&mut self, n_tokens: usize, whole: bool) -> Result<()> {
        let few = n_tokens <= SHARE_ROWS && self.share.is_some();
        self.mode = if few { Mode::Share } else { Mode::Stream };
        self.ring.begin(
            self.mode,
            whole,
            &self.memory,
            self.files.as_mut(),
            &self.parts,
        )
    }

    /// The step's operations are being recorded from here on.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn begin_recording(&mut self) -> Result<()> {
        self.ring.begin_recording()
    }

    /// The recording is about to end.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn end_recording(&mut self) -> Result<()> {
        self.ring.end_recording()
    }

    /// The part at hand.
    pub fn part(&self, index: usize) -> &HostPart {
        &self.parts[index]
    }

    /// The host's share in this step, and the first unit and the number of units of `part` that it multiplies.
    pub fn share_of(&self, part: usize) -> Option<(&HostShare, usize, usize)> {
        let share = self.share.as_ref().filter(|_| self.mode == Mode::Share)?;
        let p = &self.parts[part];
        let streamed = share.streamed(part);
        (streamed < p.pinned).then_some((share, p.resident + streamed, p.pinned - streamed))
    }

    /// The next transfer of `part`, arrived on the device for all that is enqueued behind; `None` when all have.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn arrive(&mut self, part: usize) -> Result<Option<(Transfer, super::driver::DevicePtr)>> {
        self.ring.arrive(part)
    }

    /// What arrived last is used by what was enqueued until here; its place is filled anew.
    ///
    /// # Errors
    /// Those of the driver, and of files that cannot be read.
    pub fn used(&mut self) -> Result<()> {
        self.ring.used(&self.memory, self.files.as_mut())
    }

    /// An error of the host's own work since the last call.
    ///
    /// # Errors
    /// The host's share was not multiplied.
    pub fn check(&self) -> Result<()> {
        self.share.as_ref().map_or(Ok(()), HostShare::check)
    }
}

/// What a step streams, in order, where `streamed` units of each part in host memory are.
fn transfers(parts: &[HostPart], streamed: &[usize]) -> Vec<Transfer> {
    let mut all = Vec::new();
    for (index, (p, &streamed)) in parts.iter().zip(streamed).enumerate() {
        let unit_bytes = p.unit_bytes().max(1);
        let most = (RING_SLOT_BYTES / unit_bytes / UNITS * UNITS).max(1);
        let mut cut = |first: usize, n: usize, from: &dyn Fn(usize) -> From| {
            for at in (0..n).step_by(most) {
                let units = most.min(n - at);
                all.push(Transfer {
                    part: index,
                    unit: first + at,
                    units,
                    from: from(at),
                    bytes: units * unit_bytes,
                });
            }
        };
        cut(p.resident, streamed, &|at| {
            From::Host(p.offset + at * unit_bytes)
        });
        let per_unit = rows_per_unit(p.gated);
        cut(p.resident + p.pinned, p.units_in_files(), &|at| {
            From::File(at * per_unit)
        });
    }
    all
}
