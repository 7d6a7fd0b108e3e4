//! The shapes of one rank as the kernels take them: head widths and MLP features padded with zeros where a model's own do
//! not fit.
//!
//! Published models need no padding. Where it is needed, each half of a head is padded on its own, so that rotation
//! still pairs the same elements, and the zeros contribute nothing to any product.

use super::Shard;
use crate::config::ModelConfig;
use crate::{Error, Result};

/// Head widths that the attention kernels are compiled for.
pub const HEAD_DIMS: [usize; 4] = [64, 80, 96, 128];
/// All widths are multiples of this: 16-byte accesses of bf16.
pub const ALIGN: usize = 8;

/// Shapes of one rank's buffers and weights on the device.
#[derive(Debug, Clone, PartialEq)]
pub struct Geometry {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads on this rank.
    pub n_heads: usize,
    /// KV heads on this rank.
    pub n_kv_heads: usize,
    /// Width of a head in the model.
    pub head_dim: usize,
    /// Width of a head on the device.
    pub padded_head_dim: usize,
    /// MLP features of this rank.
    pub inter: usize,
    /// MLP features on the device.
    pub padded_inter: usize,
    /// Decoder layers.
    pub n_layers: usize,
    /// Vocabulary rows of each rank.
    pub vocab: Vec<usize>,
    /// First vocabulary row of this rank.
    pub first_row: usize,
    /// This rank.
    pub tp_rank: usize,
}

impl Geometry {
    /// The shapes of `shard`.
    ///
    /// # Errors
    /// A width that the kernels do not take.
    pub fn new(config: &ModelConfig, shard: &Shard) -> Result<Geometry> {
        let (hidden, head_dim) = (config.hidden_size, config.head_dim);
        if !hidden.is_multiple_of(ALIGN) || hidden > 16384 {
            return Err(Error::failed(format_args!(
                "hidden_size {hidden}: the GPU kernels take multiples of {ALIGN} up to 16384; use --device cpu"
            )));
        }
        let wide_enough = HEAD_DIMS.into_iter().find(|&d| d >= head_dim);
        let padded_head_dim = wide_enough.ok_or_else(|| {
            Error::failed(format_args!(
                "head_dim {head_dim}: the GPU kernels go up to 128; use --device cpu"
            ))
        })?;
        let inter = shard.intermediate.len();
        let rows_of = |rank| Shard::new(config, shard.tp_size, rank).vocab.len();
        Ok(Geometry {
            hidden,
            n_heads: shard.n_heads_local(),
            n_kv_heads: shard.n_kv_heads_local(),
            head_dim,
            padded_head_dim,
            inter,
            padded_inter: inter.next_multiple_of(ALIGN),
            n_layers: config.n_layers,
            vocab: (0..shard.tp_size).map(rows_of).collect(),
            first_row: shard.vocab.start,
            tp_rank: shard.tp_rank,
        })
    }

    /// Width of q and of the attention's output.
    pub fn q_width(&self) -> usize {
        self.n_heads * self.padded_head_dim
    }

    /// Width of q, k and v together.
    pub fn qkv_width(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.padded_head_dim
    }

    /// Vocabulary rows of this rank.
    pub fn vocab_local(&self) -> usize {
        self.vocab[self.tp_rank]
    }

    /// How the rows and columns of the local matrix `name` (`layers.0.qkv`) lie on the device.
    pub fn layout(&self, name: &str, rows: usize, cols: usize) -> Layout {
        let heads = Spread {
            unit: self.head_dim / 2,
            padded: self.padded_head_dim / 2,
        };
        let inter = Spread {
            unit: self.inter,
            padded: self.padded_inter,
        };
        let plain = Spread { unit: 1, padded: 1 };
        let (row, col, scale) = match name.rsplit('.').next().unwrap_or(name) {
            "qkv" | "qkv_bias" => (heads, plain, 1.0),
            // The kernel divides the sum of squares by the padded width: see `head_norm_eps`.
            "q_norm" | "k_norm" => (
                heads,
                plain,
                (self.head_dim as f32 / self.padded_head_dim as f32).sqrt(),
            ),
            "o" => (plain, heads, 1.0),
            "gate_up" => (inter, plain, 1.0),
            "down" => (plain, inter, 1.0),
            _ => (plain, plain, 1.0),
        };
        Layout {
            rows,
            cols,
            row,
            col,
            scale,
        }
    }

    /// The epsilon that makes a norm over the padded head equal the norm over the head, up to the weight's scale:
    /// x / √(s/d + ε) = √(d/D) · x / √(s/D + ε·d/D).
    pub fn head_norm_eps(&self, eps: f32) -> f32 {
        eps * self.head_dim as f32 / self.padded_head_dim as f32
    }
}

/// Runs of `unit` elements, each followed by zeros up to `padded`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spread {
    unit: usize,
    padded: usize,
}

impl Spread {
    /// Where element `i` lies.
    pub fn place(self, i: usize) -> usize {
        i / self.unit * self.padded + i % self.unit
    }

    /// The element that lies at `at`; `None` for padding.
    pub fn element(self, at: usize) -> Option<usize> {
        let inside = at.checked_rem(self.padded)?;
        (inside < self.unit).then(|| at / self.padded * self.unit + inside)
    }

    /// Elements on the device for `n` of the model.
    pub fn len(self, n: usize) -> usize {
        n.checked_div(self.unit)
            .map_or(0, |runs| runs * self.padded)
    }
}

/// A matrix of the model and how it lies on the device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Layout {
    rows: usize,
    cols: usize,
    row: Spread,
    col: Spread,
    /// Factor on every element.
    pub scale: f32,
}

impl Layout {
    /// Rows on the device.
    pub fn device_rows(&self) -> usize {
        self.row.len(self.rows)
    }

    /// Columns on the device.
    pub fn device_cols(&self) -> usize {
        self.col.len(self.cols)
    }

    /// Column on the device of the model's column `i`.
    pub fn col(&self, i: usize) -> usize {
        self.col.place(i)
    }

    /// The model's row that lies in a row on the device; `None` for padding.
    pub fn model_row(&self, device_row: usize) -> Option<usize> {
        self.row.element(device_row).filter(|&row| row < self.rows)
    }

    /// Whether a row lies on the device as it is.
    pub fn has_plain_columns(&self) -> bool {
        self.scale == 1.0 && self.device_cols() == self.cols
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{SHAPES, named_shape};

    #[test]
    fn published_shapes_need_no_padding_on_any_split() {
        for shape in SHAPES {
            let config = named_shape(shape).unwrap();
            for tp_size in [1, 2, 3, 4, 8] {
                for rank in 0..tp_size {
                    let g = Geometry::new(&config, &Shard::new(&config, tp_size, rank)).unwrap();
                    assert_eq!(
                        (g.padded_head_dim, g.padded_inter),
                        (g.head_dim, g.inter),
                        "{shape}"
                    );
                }
            }
        }
    }

    #[test]
    fn halves_of_a_head_are_padded_on_their_own() {
        let heads = Spread {
            unit: 4,
            padded: 32,
        };
        assert_eq!(
            (0..9).map(|i| heads.place(i)).collect::<Vec<_>>(),
            [0, 1, 2, 3, 32, 33, 34, 35, 64]
        );
        assert_eq!(heads.len(16), 128);
        assert!((0..40).all(|i| heads.element(heads.place(i)) == Some(i)));
        assert_eq!(heads.element(4), None);
    }

    #[test]
    fn widths_that_do_not_fit_are_refused_by_name() {
        let config = ModelConfig {
            head_dim: 256,
            ..named_shape("qwen3-0.6b").unwrap()
        };
        let e = Geometry::new(&config, &Shard::new(&config, 1, 0)).unwrap_err();
        assert!(e.to_string().starts_with("head_dim 256"), "{e}");
        let config = ModelConfig {
            hidden_size: 20,
            ..named_shape("qwen3-0.6b").unwrap()
        };
        let e = Geometry::new(&config, &Shard::new(&config, 1, 0)).unwrap_err();
        assert!(e.to_string().starts_with("hidden_size 20"), "{e}");
    }
}
