//! What a device can do at best: the ceilings that figures are held against.
//!
//! Everything goes through [`Parts`], so that it is the same way that the forward pass takes: our stream, our events, the
//! product library, the collectives between the ranks.

use super::backend::wait_for;
use super::chain::chain_us;
use super::collective::{DeviceCollective, FusedNorm};
use super::driver::{DevicePtr, Driver, Launch, Pinned, Stream, args};
use super::gemm::{Out, Product};
use super::kernels;
use super::memory::{DeviceBuffer, OwnedEvent, PinnedBuffer};
use super::rank::Parts;
use super::ways::Way;
use crate::{Error, Result};
use std::sync::Arc;

/// Threads of a block of `read.cu`.
const READ_BLOCK: u32 = 512;
/// Blocks for each multiprocessor that are tried.
const READ_BLOCKS: [usize; 3] = [1, 2, 4];

/// How much is moved and multiplied.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Bytes of device memory that are read, if that much is free.
    pub read_bytes: usize,
    /// Bytes of pinned memory that are copied.
    pub link_bytes: usize,
    /// Rows and columns of the matrices that are multiplied.
    pub gemm: usize,
    /// Times that each measurement is repeated; the best counts.
    pub runs: usize,
    /// Seconds for which link and cores work at the same time.
    pub beside_s: f64,
}

impl Sizes {
    /// For figures.
    pub const FULL: Sizes = Sizes {
        read_bytes: 4 << 30,
        link_bytes: 512 << 20,
        gemm: 8192,
        runs: 5,
        beside_s: 0.5,
    };
}

/// Buffers of one measurement; the device has done with them before they go.
struct Room {
    driver: Arc<dyn Driver>,
    device: Vec<DeviceBuffer>,
    host: Vec<PinnedBuffer>,
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Err(e) = self.driver.synchronize_device() {
            tracing::debug!("{e}");
        }
    }
}

/// A rank's device, ready to be measured.
pub struct Probe {
    parts: Parts,
    sizes: Sizes,
}

impl Probe {
    /// A probe of the device in `parts`.
    pub fn new(parts: Parts, sizes: Sizes) -> Probe {
        Probe { parts, sizes }
    }

    /// The way that sums over ranks take.
    pub fn collective_name(&self) -> &'static str {
        self.parts.comm.name()
    }

    fn room(&self, device: &[usize], host: &[usize]) -> Result<Room> {
        let driver = &self.parts.driver;
        let on_device = |&bytes: &usize| DeviceBuffer::new(driver, bytes, "measuring");
        let pinned = |&bytes: &usize| PinnedBuffer::new(driver, bytes, Pinned::Cached, "measuring");
        Ok(Room {
            driver: driver.clone(),
            device: device.iter().map(on_device).collect::<Result<_>>()?,
            host: host.iter().map(pinned).collect::<Result<_>>()?,
        })
    }

    /// Waits for everything on the stream; a rank that is lost meanwhile ends the wait.
    fn synchronize(&mut self) -> Result<()> {
        let done = OwnedEvent::new(&self.parts.driver, false)?;
        done.record(self.parts.stream)?;
        wait_for(&done, &mut *self.parts.comm)
    }

    /// Seconds on the device of what `enqueue` puts on the stream.
    fn time(&mut self, enqueue: impl FnOnce(&mut Parts, Stream) -> Result<()>) -> Result<f64> {
        let stream = self.parts.stream;
        let before = OwnedEvent::new(&self.parts.driver, true)?;
        let after = OwnedEvent::new(&self.parts.driver, true)?;
        before.record(stream)?;
        enqueue(&mut self.parts, stream)?;
        after.record(stream)?;
        self.synchronize()?;
        // A clock that has not moved would make a rate without end.
        Ok((f64::from(after.ms_since(&before)?) / 1e3).max(1e-9))
    }

    /// Rate at which the device reads its own memory, in GB/s (10⁹ bytes): the best of several runs and grids.
    ///
    /// # Errors
    /// No memory, a lost device, or a sum that is not that of the memory.
    pub fn read_gbs(&mut self) -> Result<f64> {
        const BYTE: u8 = 0x11;
        let free = self.parts.driver.memory()?.free as usize;
        let n = self.sizes.read_bytes.min(free / 2) / 16;
        let mut room = self.room(&[n * 16, 4], &[4])?;
        let (data, sum) = (room.device[0].ptr(), room.device[1].ptr());
        let kernel = self.parts.driver.function(&kernels::READ, "read_sum")?;
        let sm_count = self.parts.driver.properties().sm_count as usize;
        let stream = self.parts.stream;
        // SAFETY: inside the buffer, which the room keeps until the device has done.
        unsafe { self.parts.driver.fill(data, BYTE, n * 16, stream) }?;
        let want = (4 * n as u64 * u64::from(u32::from_le_bytes([BYTE; 4]))) as u32;
        let mut best = f64::INFINITY;
        for _ in 0..self.sizes.runs {
            for blocks in READ_BLOCKS {
                // SAFETY: as above.
                unsafe { self.parts.driver.fill(sum, 0, 4, stream) }?;
                let launch = Launch::linear(sm_count * blocks, READ_BLOCK);
                let seconds = self.time(|parts, stream| {
                    // SAFETY: the parameters of read.cu; the room keeps the buffers.
                    unsafe {
                        let args = args![data, sum, n];
                        parts.driver.launch(kernel, &launch, &args, stream)
                    }
                })?;
                best = best.min(seconds);
                let Room { device, host, .. } = &mut room;
                host[0].download(0..4, &device[1], 0, stream)?;
                self.parts.driver.synchronize(stream)?;
                let got = host[0].as_slice();
                if got != want.to_le_bytes() {
                    return Err(Error::failed(
                        "the device does not read what is in its memory",
                    ));
                }
            }
        }
        Ok(n as f64 * 16.0 / best / 1e9)
    }

    /// Rate of copies from pinned host memory to the device, in GB/s.
    ///
    /// # Errors
    /// No memory, on the device or to be pinned; a lost device.
    pub fn link_gbs(&mut self) -> Result<f64> {
        let bytes = self.sizes.link_bytes;
        let room = self.room(&[bytes], &[bytes])?;
        let mut best = f64::INFINITY;
        for _ in 0..self.sizes.runs {
            best =
                best.min(self.time(|_, s| room.host[0].upload(0..bytes, &room.device[0], 0, s))?);
        }
        Ok(bytes as f64 / best / 1e9)
    }

    /// Rates, in GB/s, of the link and of what `read` reads of host memory at the same time; `link_gbs` is the link's alone.
    ///
    /// `read` reads once and returns how many bytes that were; it is called for as long as copies are under way.
    ///
    /// # Errors
    /// Those of [`Probe::link_gbs`].
    pub fn link_beside(
        &mut self,
        link_gbs: f64,
        mut read: impl FnMut() -> usize,
    ) -> Result<(f64, f64)> {
        let bytes = self.sizes.link_bytes;
        let copies = (link_gbs * 1e9 * self.sizes.beside_s / bytes as f64).ceil() as usize;
        let copies = copies.clamp(1, 1000);
        let room = self.room(&[bytes], &[bytes])?;
        let (mut bytes_read, mut reading_s) = (0, 0.0);
        let seconds = self.time(|parts, stream| {
            for _ in 0..copies {
                room.host[0].upload(0..bytes, &room.device[0], 0, stream)?;
            }
            let start = std::time::Instant::now();
            loop {
                let (n, now) = (read(), start.elapsed().as_secs_f64());
                // A pass that outlasts the copies counts only when it is the only one.
                let over = parts.driver.is_idle(stream)?;
                if !over || bytes_read == 0 {
                    (bytes_read, reading_s) = (bytes_read + n, now);
                }
                if over {
                    return Ok(());
                }
            }
        })?;
        let link = (copies * bytes) as f64 / seconds / 1e9;
        Ok((link, bytes_read as f64 / reading_s.max(1e-9) / 1e9))
    }

    /// Rate of large bf16 products on random numbers, in TFLOP/s.
    ///
    /// # Errors
    /// No memory, or those of the library.
    pub fn gemm_tflops(&mut self) -> Result<f64> {
        const PRODUCTS: usize = 4;
        let d = self.sizes.gemm;
        let matrix = 2 * d * d;
        let workspace = self.parts.gemm.workspace_bytes();
        let block = matrix.min(16 << 20);
        let mut room = self.room(&[matrix, matrix, matrix, workspace], &[block])?;
        fill_random(room.host[0].as_mut_slice());
        let stream = self.parts.stream;
        for buffer in &room.device[..2] {
            for at in (0..matrix).step_by(block) {
                room.host[0].upload(0..block.min(matrix - at), buffer, at, stream)?;
            }
        }
        let product = Product {
            x: room.device[0].ptr(),
            w: room.device[1].ptr(),
            y: room.device[2].ptr(),
            m: d,
            n: d,
            k: d,
            ldy: d,
            out: Out::Bf16,
        };
        let workspace = room.device[3].ptr();
        let mut best = f64::INFINITY;
        // The first run is the library's time to choose its kernel, which the best leaves out.
        for _ in 0..=self.sizes.runs {
            let seconds = self.time(|parts, stream| {
                (0..PRODUCTS).try_for_each(|_| {
                    // SAFETY: the room keeps the matrices and the workspace until the device has done.
                    unsafe { parts.gemm.matmul(&product, workspace, stream) }
                })
            })?;
            best = best.min(seconds);
        }
        Ok((PRODUCTS * 2 * d * d) as f64 * d as f64 / best / 1e12)
    }

    /// Microseconds of an all-reduce of `bytes` of bf16 by the library, in a graph.
    ///
    /// # Errors
    /// A lost rank, or those of the library.
    pub fn all_reduce_us(&mut self, bytes: usize) -> Result<f64> {
        let room = self.room(&[bytes], &[])?;
        let x = room.device[0].ptr();
        // SAFETY: inside the buffer, which the room keeps until the device has done.
        unsafe { self.parts.driver.fill(x, 0, bytes, self.parts.stream) }?;
        let stream = self.parts.stream;
        self.chain_us(|comm| {
            // SAFETY: as above.
            unsafe { comm.all_reduce(x, bytes / 2, stream) }.map(|()| true)
        })
        .map(|us| us.unwrap_or(0.0))
    }

    /// Microseconds of the sum fused with the residual and the norm, in a graph; `None` where the ranks have no such way.
    ///
    /// # Errors
    /// A lost rank or device.
    pub fn fused_all_reduce_us(&mut self, rows: usize, hidden: usize) -> Result<Option<f64>> {
        let n = rows * hidden;
        let room = self.room(&[2 * n, 4 * n, 2 * hidden, 2 * n], &[])?;
        for buffer in &room.device {
            // SAFETY: inside the buffer, which the room keeps until the device has done.
            unsafe {
                self.parts
                    .driver
                    .fill(buffer.ptr(), 0, buffer.bytes(), self.parts.stream)
            }?;
        }
        let fused = FusedNorm {
            partial: room.device[0].ptr(),
            x: room.device[1].ptr(),
            weight: room.device[2].ptr(),
            h: room.device[3].ptr(),
            rows,
            hidden,
            eps: 1e-6,
        };
        let stream = self.parts.stream;
        self.chain_us(|comm| {
            // SAFETY: as above.
            unsafe { comm.all_reduce_add_norm(&fused, stream) }
        })
    }

    fn chain_us(
        &mut self,
        enqueue: impl FnMut(&mut dyn DeviceCollective) -> Result<bool>,
    ) -> Result<Option<f64>> {
        let (
            Parts {
                driver,
                comm,
                stream,
                ..
            },
            runs,
        ) = (&mut self.parts, self.sizes.runs);
        chain_us(driver, &mut **comm, *stream, runs, enqueue)
    }

    /// What was measured at the start about sums of `rows` rows.
    pub fn way(&self, rows: usize) -> Option<Way> {
        self.parts
            .comm
            .ways()
            .iter()
            .find(|w| w.rows == rows)
            .copied()
    }

    /// Every rank's `local` in rank order; `counts[r]` numbers from rank `r`. Returns when all ranks are here.
    ///
    /// # Errors
    /// A lost rank.
    pub fn gather(&mut self, local: &[f32], counts: &[usize]) -> Result<Vec<f32>> {
        let total: usize = counts.iter().sum();
        let (mine, all) = (local.len() * 4, total * 4);
        let mut room = self.room(&[mine, all], &[mine, all])?;
        let stream = self.parts.stream;
        let Room { device, host, .. } = &mut room;
        host[0]
            .as_mut_slice()
            .copy_from_slice(bytemuck::cast_slice(local));
        host[0].upload(0..mine, &device[0], 0, stream)?;
        let (from, to): (DevicePtr, DevicePtr) = (device[0].ptr(), device[1].ptr());
        // SAFETY: the room keeps both buffers, which hold what the counts say, until the device has done.
        unsafe { self.parts.comm.all_gather(from, counts, to, stream) }?;
        host[1].download(0..all, &device[1], 0, stream)?;
        self.synchronize()?;
        Ok(host[1]
            .as_slice()
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_ne_bytes(*b))
            .collect())
    }
}

/// bf16 numbers between -1 and 1, spread evenly: zeros would let the device run faster than real data does.
fn fill_random(bytes: &mut [u8]) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for pair in bytes.as_chunks_mut::<2>().0 {
        state = state
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        let unit = (state >> 40) as f32 / (1 << 24) as f32;
        *pair = half::bf16::from_f32(2.0 * unit - 1.0).to_le_bytes();
    }
}
