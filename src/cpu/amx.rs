//! AMX bf16: a 16 × 16 tile of sums in one instruction for 32 steps. Inline assembly, since the intrinsics are not stable.
//!
//! The operands are those of [`super::tile::PairProduct`]: 16 weight rows as they lie are the first factor, and 16 columns
//! of packed activation pairs already are the layout that the second factor needs.

use super::tile::PairProduct;
use std::arch::asm;
use std::sync::OnceLock;

/// Rows of weights in one tile, and columns of activations.
const TILE: usize = 16;
/// Steps of the inner dimension that one tile product covers.
const STEPS: usize = 32;

/// Whether the CPU has AMX bf16 and the kernel lets this process use it.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        let leaf = std::arch::x86_64::__cpuid_count(7, 0);
        leaf.edx & (AMX_BF16 | AMX_TILE) == AMX_BF16 | AMX_TILE && request_permission()
    })
}

/// Asks the kernel for the tile state (8 KiB a thread), which it saves only for processes that asked.
fn request_permission() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: this request takes two integers and touches no memory.
    unsafe {
        libc::syscall(
            libc::SYS_arch_prctl,
            ARCH_REQ_XCOMP_PERM,
            XFEATURE_XTILEDATA,
        ) == 0
    }
}

/// The `ldtilecfg` operand: palette 1, eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

/// Loaded tile registers; dropping it puts them back to their initial state, which makes context switches cheap again.
pub(super) struct Tiles(());

impl Tiles {
    /// Configures the calling thread's tile registers.
    ///
    /// # Safety
    /// [`available`] holds.
    pub(super) unsafe fn configure() -> Self {
        let mut config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            bytes_per_row: [0; 16],
            rows: [0; 16],
        };
        config.bytes_per_row[..8].fill(64);
        config.rows[..8].fill(TILE as u8);
        // SAFETY: AMX is there, by the caller's promise; `config` is the 64 bytes that the instruction reads.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
        Tiles(())
    }

    /// 32 rows of weights by 32 columns, all of `p`'s steps (a multiple of [`STEPS`]).
    ///
    /// # Safety
    /// As [`PairProduct::rows`] for 32 rows, `wide`, with 16 lanes.
    pub(super) unsafe fn block_32x32(&self, p: &PairProduct) {
        // SAFETY: the loads and stores are those of the product described by `p`. tmm0-3 hold the sums, 4 and 5 the
        // weights, 6 and 7 the activations: first both `hi` columns, then both `lo`.
        unsafe {
            asm!(
                "test {acc:e}, {acc:e}",
                "jz 2f",
                "tileloadd tmm0, [{c} + {c_row}*1]",
                "tileloadd tmm1, [{c} + {c_row} + 64]",
                "tileloadd tmm2, [{c2} + {c_row}]",
                "tileloadd tmm3, [{c2} + {c_row} + 64]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "3:",
                "tileloadd tmm4, [{w} + {w_row}]",
                "tileloadd tmm5, [{w2} + {w_row}]",
                "tileloadd tmm6, [{x} + {x_row}]",
                "tileloadd tmm7, [{x} + {x_row} + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm6, [{x} + {x_row} + 128]",
                "tileloadd tmm7, [{x} + {x_row} + 192]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {w}, 64",
                "add {w2}, 64",
                "add {x}, 4096",
                "dec {n}",
                "jnz 3b",
                "tilestored [{c} + {c_row}*1], tmm0",
                "tilestored [{c} + {c_row} + 64], tmm1",
                "tilestored [{c2} + {c_row}], tmm2",
                "tilestored [{c2} + {c_row} + 64], tmm3",
                acc = in(reg) i32::from(p.accumulate),
                c = in(reg) p.c,
                c2 = in(reg) p.c.add(TILE * p.c_stride),
                c_row = in(reg) p.c_stride * 4,
                w = inout(reg) p.w => _,
                w2 = inout(reg) p.w.add(TILE * p.w_row) => _,
                w_row = in(reg) p.w_row * 2,
                x = inout(reg) p.x => _,
                x_row = in(reg) 256usize,
                n = inout(reg) p.pairs * 2 / STEPS => _,
                options(nostack),
            );
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: AMX is there: `configure` has run.
        unsafe { asm!("tilerelease", options(nomem, nostack)) };
    }
}
