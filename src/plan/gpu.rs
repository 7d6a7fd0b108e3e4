//! Exact bytes of a GPU rank, counted by the shapes and lists that the device's own code allocates by.

use super::{RankBytes, Request, Tiers};
use crate::config::ModelConfig;
use crate::layout::{
    Cut, Geometry, KINDS, Limits, Placement, RING_BYTES, SHARE_ROWS, STAGING, Shard, StepBuffers,
    WORKSPACE, batch_words, inbox_bytes, kind_of, kv_bytes,
};
use crate::{Error, Result};

/// Device memory that the driver and the libraries take for themselves on one rank: the CUDA context, kernels, graphs,
/// cublasLt.
pub const GPU_RUNTIME_BYTES: u64 = 640 << 20;
/// What they take more where ranks talk to each other (NCCL): with the above, 1.1% more than the driver showed for the 7B
/// shape on two H100s.
pub const GPU_RANKS_RUNTIME_BYTES: u64 = 768 << 20;
/// Of each so many bytes of weights that may leave the GPU, one goes to the recorded copies and products of a decode step:
/// some 250 MiB were seen for the 100 GiB of the 72B shape in pieces of [`RING_SLOT_BYTES`].
const WEIGHTS_PER_RECORDED_BYTE: u64 = 256;
/// The part of [`GPU_RUNTIME_BYTES`] that is taken as soon as the context exists.
pub const GPU_CONTEXT_BYTES: u64 = 384 << 20;
/// The driver gives device memory in pages of this.
pub const DEVICE_PAGE: u64 = 2 << 20;
/// A matrix's part on the device begins at a multiple of this.
const DEVICE_ALIGN: u64 = 256;
/// A matrix's part in pinned memory begins at a multiple of this.
const HOST_ALIGN: u64 = 64;
/// More is a typing error, and below it no count can overflow, paddings included.
const MAX_BYTES: u64 = 1 << 50;

/// Rows of each kind of matrix, in the order of [`KINDS`].
pub(super) type Rows = [usize; KINDS.len()];

/// A kind of matrix: what is cut alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Kind {
    /// Rows on the device; features of `gate_up`.
    pub rows: usize,
    /// Bytes of one.
    pub row_bytes: u64,
    /// Such matrices: one a layer, or one.
    pub copies: u64,
}

impl Kind {
    fn bytes(&self, rows: usize, align: u64) -> u64 {
        (rows as u64 * self.row_bytes).next_multiple_of(align) * self.copies
    }

    /// Bytes on the device of the first `rows` rows of every copy.
    pub fn on_device(&self, rows: usize) -> u64 {
        self.bytes(rows, DEVICE_ALIGN)
    }

    /// Bytes of `rows` rows of every copy in pinned memory.
    pub fn pinned(&self, rows: usize) -> u64 {
        self.bytes(rows, HOST_ALIGN)
    }
}

/// All that a GPU rank needs before it is known what lies where.
#[derive(Debug, Clone)]
pub(super) struct GpuNeed {
    pub kinds: [Kind; KINDS.len()],
    /// The embedding is the head as well: every step reads it whole.
    pub tied: bool,
    /// Norms and biases.
    pub vectors: u64,
    pub kv: u64,
    pub buffers: u64,
    pub peer: u64,
    pub runtime: u64,
    /// Pinned memory of any run, file ring left out.
    pub staging: u64,
    /// Pinned memory through which the cores get their share and give it back.
    pub hand_over: u64,
}

impl GpuNeed {
    /// Counts a rank's bytes.
    ///
    /// # Errors
    /// Shapes that the GPU's kernels do not take, or sizes that no machine has.
    pub fn new(
        config: &ModelConfig,
        request: &Request,
        shard: &Shard,
        limits: &Limits,
    ) -> Result<GpuNeed> {
        let g = Geometry::new(config, shard)?;
        refuse_absurd(config, request, shard, limits)?;
        let (kinds, vectors) = kinds(config, request, shard, &g);
        let buffers = StepBuffers::new(&g, limits, request.sm_count, WORKSPACE).bytes() as u64;
        let several = request.tp_size > 1;
        // The rotation table and the tables of the all-reduce are small enough to share a page.
        let inbox = if several {
            inbox_bytes(request.tp_size, config.hidden_size) as u64
        } else {
            0
        };
        let ranks_runtime = if several { GPU_RANKS_RUNTIME_BYTES } else { 0 };
        let weights: u64 = kinds.iter().map(|k| k.on_device(k.rows)).sum();
        let load_slots = (STAGING as u64).min(weights);
        let logits = 4 * (limits.max_logit_rows * config.vocab_size) as u64;
        let batch = 4 * batch_words(limits) as u64;
        Ok(GpuNeed {
            kinds,
            tied: config.tie_word_embeddings,
            vectors,
            kv: paged(kv_bytes(&g, limits.n_kv_blocks) as u64),
            buffers: paged(buffers),
            peer: inbox + DEVICE_PAGE,
            runtime: GPU_RUNTIME_BYTES + ranks_runtime,
            // Logits joined from several ranks are copied once more, for sampling.
            staging: load_slots + batch + logits * if several { 2 } else { 1 },
            hand_over: hand_over_bytes(&kinds),
        })
    }

    /// All rows.
    pub fn rows(&self) -> Rows {
        self.kinds.map(|k| k.rows)
    }

    /// Bytes of all weights but norms and biases, wherever they lie.
    pub fn pinned(&self, rows: &Rows) -> u64 {
        self.kinds.iter().zip(rows).map(|(k, &n)| k.pinned(n)).sum()
    }

    /// Bytes of the weights on the device.
    pub fn weights_on_device(&self, resident: &Rows) -> u64 {
        let matrices = self.kinds.iter().zip(resident);
        paged(self.vectors + matrices.map(|(k, &n)| k.on_device(n)).sum::<u64>())
    }

    fn runtime(&self, offloaded: bool) -> u64 {
        let weights: u64 = self.kinds.iter().map(|k| k.on_device(k.rows)).sum();
        let recorded = if offloaded {
            weights / WEIGHTS_PER_RECORDED_BYTE
        } else {
            0
        };
        self.runtime + recorded
    }

    fn ring(offloaded: bool) -> u64 {
        if offloaded { RING_BYTES } else { 0 }
    }

    /// Device bytes of everything but weights.
    pub fn besides_weights(&self, offloaded: bool) -> u64 {
        self.kv + self.buffers + self.peer + self.runtime(offloaded) + GpuNeed::ring(offloaded)
    }

    /// The least that the device must hold: what never leaves it.
    pub fn least_on_device(&self) -> u64 {
        self.besides_weights(true) + paged(self.vectors)
    }

    /// Bytes by purpose and by place for `resident` rows on the device, `pinned` on the host, and the others in files.
    pub fn bytes(&self, resident: &Rows, pinned: &Rows) -> (Placement, RankBytes, Tiers) {
        let cuts: [Cut; KINDS.len()] = std::array::from_fn(|i| Cut {
            resident: resident[i],
            pinned: pinned[i],
            file: self.kinds[i].rows - resident[i] - pinned[i],
        });
        let placement = Placement::from_cuts(cuts);
        let in_files = |(k, cut): (&Kind, &Cut)| cut.file as u64 * k.row_bytes * k.copies;
        let file: u64 = self.kinds.iter().zip(&cuts).map(in_files).sum();
        let file_ring = if cuts.iter().any(|cut| cut.file > 0) {
            RING_BYTES
        } else {
            0
        };
        let hand_over = if cuts.iter().any(|cut| cut.pinned > 0) {
            self.hand_over
        } else {
            0
        };
        let weights_on_device = self.weights_on_device(resident);
        let weights_pinned = self.pinned(pinned);
        let offloaded = placement.is_offloaded();
        let bytes = RankBytes {
            weights: weights_on_device + weights_pinned + file,
            kv: self.kv,
            activations: self.buffers,
            ring: GpuNeed::ring(offloaded),
            peer: self.peer,
            runtime: self.runtime(offloaded),
            staging: self.staging + file_ring + hand_over,
            total: 0,
        };
        let tiers = Tiers {
            device: weights_on_device + self.besides_weights(offloaded),
            host: weights_pinned + bytes.staging,
            file,
            weights_on_device,
            weights_pinned,
        };
        (placement, bytes.summed(), tiers)
    }
}

/// Input and output of the widest product in f32, for as many tokens as the cores take a share of.
fn hand_over_bytes(kinds: &[Kind; KINDS.len()]) -> u64 {
    let widest = |of: fn(&Kind) -> u64| kinds.iter().map(of).max().unwrap_or(0);
    // Two bytes an element, and a feature of gate and up has two rows.
    let inputs = widest(|k| k.row_bytes / 2);
    let outputs = widest(|k| 2 * k.rows as u64);
    4 * SHARE_ROWS as u64 * (inputs + outputs)
}

/// Rounded up to whole pages, as the driver allocates.
pub(super) fn paged(bytes: u64) -> u64 {
    bytes.next_multiple_of(DEVICE_PAGE)
}

/// The matrices by kind, and the bytes of all vectors; layers are alike, so one is counted for all.
fn kinds(
    config: &ModelConfig,
    request: &Request,
    shard: &Shard,
    g: &Geometry,
) -> ([Kind; KINDS.len()], u64) {
    let one_layer = ModelConfig {
        n_layers: 1,
        ..config.clone()
    };
    let (mut kinds, mut vectors) = ([Kind::default(); KINDS.len()], 0);
    for m in shard.matrices(&one_layer, request.dtype) {
        let copies = if m.name.starts_with("layers.") {
            config.n_layers as u64
        } else {
            1
        };
        let layout = g.layout(&m.name, m.rows, m.cols);
        let kind = Kind {
            rows: layout.device_rows(),
            row_bytes: 2 * layout.device_cols() as u64,
            copies,
        };
        match kind_of(&m.name) {
            None => vectors += kind.on_device(kind.rows),
            Some(i) if KINDS[i] == "gate_up" => {
                // A feature is a gate row and an up row.
                kinds[i] = Kind {
                    rows: kind.rows / 2,
                    row_bytes: 2 * kind.row_bytes,
                    copies,
                };
            }
            Some(i) => kinds[i] = kind,
        }
    }
    (kinds, vectors)
}

/// A rough count that cannot overflow comes before the exact one that could.
fn refuse_absurd(
    config: &ModelConfig,
    request: &Request,
    shard: &Shard,
    limits: &Limits,
) -> Result<()> {
    let device = request.device;
    let kv = super::kv_bytes_per_block(config, shard, device);
    let buffers = super::step_buffers(
        config,
        shard,
        device,
        limits.max_step_tokens,
        limits.max_logit_rows,
    );
    let rough = buffers.iter().fold(
        kv.saturating_mul(limits.n_kv_blocks as u64),
        |sum, buffer| sum.saturating_add(buffer.bytes()),
    );
    if rough < MAX_BYTES && request.sm_count <= 1 << 16 {
        return Ok(());
    }
    Err(Error::usage(format!(
        "rank {} would need 1 PiB or more: lower the context, the sequences or the tokens of a step",
        shard.tp_rank
    )))
}

#[cfg(test)]
mod tests {
    use super::super::DeviceKind;
    use super::*;
    use crate::config::{SHAPES, named_shape};

    fn need(name: &str, tp_size: usize, rank: usize) -> (GpuNeed, u64) {
        let config = named_shape(name).unwrap();
        let request = Request::new(name, &config, DeviceKind::Cuda, tp_size);
        let shard = Shard::new(&config, tp_size, rank);
        let limits = Limits {
            max_step_tokens: 512,
            max_logit_rows: 1,
            n_kv_blocks: 256,
        };
        let g = Geometry::new(&config, &shard).unwrap();
        let allocated = crate::gpu::load::device_bytes(
            &shard.matrices(&config, request.dtype),
            &g,
            &Placement::default(),
        )
        .unwrap() as u64;
        let need = GpuNeed::new(&config, &request, &shard, &limits).unwrap();
        (need, allocated)
    }

    #[test]
    fn resident_weights_are_what_the_loader_allocates() {
        for name in SHAPES {
            for tp_size in [1, 2, 3, 8] {
                let (need, allocated) = need(name, tp_size, tp_size - 1);
                assert_eq!(
                    need.weights_on_device(&need.rows()),
                    paged(allocated),
                    "{name}"
                );
            }
        }
    }

    #[test]
    fn what_is_counted_of_the_7b_model() {
        let (need, _) = need("qwen2.5-7b", 1, 0);
        // 28 layers × 2 × 4 heads × 128 × 2 bytes × 4096 tokens, in whole pages as it is.
        assert_eq!(need.kv, 224 << 20);
        assert_eq!(need.runtime, GPU_RUNTIME_BYTES);
        assert_eq!(need.kinds[3].rows, 18944);
        assert_eq!(need.kinds[3].row_bytes, 2 * 3584 * 2);
        let resident = need.rows();
        let (placement, bytes, tiers) = need.bytes(&resident, &[0; 6]);
        assert!(!placement.is_offloaded());
        assert_eq!((bytes.ring, tiers.file, tiers.weights_pinned), (0, 0, 0));
        assert_eq!(tiers.device + tiers.host, bytes.total);
        // One row fewer on the device of the head, in the files: both rings appear.
        let mut fewer = resident;
        fewer[5] -= 16;
        let (placement, bytes, tiers) = need.bytes(&fewer, &[0; 6]);
        assert_eq!(placement.head.file, 16);
        assert_eq!(tiers.file, 16 * 3584 * 2);
        assert_eq!(bytes.ring, 128 << 20);
        assert_eq!(bytes.staging, need.staging + (128 << 20));
        assert_eq!(tiers.device + tiers.host + tiers.file, bytes.total);
    }
}
