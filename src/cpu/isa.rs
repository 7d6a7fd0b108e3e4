//! Which instruction set runs, and the one place that enters it.

#[cfg(target_arch = "x86_64")]
use super::{amx, simd_avx2, simd_avx512};
use super::{simd::Simd, simd_portable};
use crate::{Error, Result};

/// An instruction set that kernels are compiled for, from the least to the most capable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// What every target has; the compiler vectorises as it can.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same with AVX512_BF16 dot products in GEMM.
    Avx512Bf16,
    /// The same with AMX bf16 tiles in GEMM.
    Amx,
}

impl Isa {
    const ALL: [(Isa, &'static str); 5] = [
        (Isa::Portable, "portable"),
        (Isa::Avx2, "avx2"),
        (Isa::Avx512, "avx512"),
        (Isa::Avx512Bf16, "avx512-bf16"),
        (Isa::Amx, "amx"),
    ];

    /// The fastest instruction set of this machine.
    ///
    /// That is not [`Isa::Avx512Bf16`]: activations in two parts make two dot products where one multiply-add pair would do,
    /// at no more than twice the rate (on Zen 4, GEMM runs at 96 GFLOP/s a core with them and 104 without).
    pub fn detect() -> Isa {
        let mut available = Isa::available();
        available.retain(|&isa| isa != Isa::Avx512Bf16);
        available.pop().unwrap_or(Isa::Portable)
    }

    /// Every instruction set of this machine, ascending.
    pub fn available() -> Vec<Isa> {
        let all = Isa::ALL.iter().map(|&(isa, _)| isa);
        all.filter(|isa| isa.is_available()).collect()
    }

    #[cfg(target_arch = "x86_64")]
    fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            Isa::Avx2 => simd_avx2::available(),
            Isa::Avx512 => Isa::Avx2.is_available() && simd_avx512::available(),
            Isa::Avx512Bf16 => {
                Isa::Avx512.is_available() && std::is_x86_feature_detected!("avx512bf16")
            }
            Isa::Amx => Isa::Avx512Bf16.is_available() && amx::available(),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_available(self) -> bool {
        self == Isa::Portable
    }

    /// Runs `kernel` compiled for this instruction set.
    ///
    /// The caller holds an `Isa` that [`Isa::available`] lists; [`super::Pool`] sees to that.
    #[inline]
    pub(super) fn dispatch<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            // SAFETY (all arms): a pool carries only an `Isa` found on this machine.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { simd_avx2::enter(kernel) },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 | Isa::Amx if K::USES_BF16_DOT => unsafe {
                simd_avx512::enter_bf16(kernel)
            },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe { simd_avx512::enter(kernel) },
            _ => kernel.run(simd_portable::Portable),
        }
    }
}

/// A piece of work written once over [`Simd`].
///
/// `run` and all that it calls on the way to a vector operation must be `#[inline(always)]`: they become part of the
/// one function per instruction set that the compiler may use those instructions in.
pub(super) trait Kernel {
    type Output;
    /// Whether the kernel differs where bf16 dot products are.
    const USES_BF16_DOT: bool = false;
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(Isa::ALL[*self as usize].1)
    }
}

impl std::str::FromStr for Isa {
    type Err = Error;

    fn from_str(s: &str) -> Result<Isa> {
        let found = Isa::ALL.iter().find(|(_, name)| *name == s);
        found.map(|&(isa, _)| isa).ok_or_else(|| {
            let names: Vec<&str> = Isa::ALL.iter().map(|&(_, name)| name).collect();
            Error::usage(format!(
                "unknown instruction set '{s}': one of {}",
                names.join(", ")
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways_and_the_best_is_listed() {
        for (isa, name) in Isa::ALL {
            assert_eq!(isa.to_string(), name);
            assert_eq!(name.parse::<Isa>().unwrap(), isa);
        }
        assert!("avx1024".parse::<Isa>().is_err());
        assert_eq!(Isa::available()[0], Isa::Portable);
        assert!(Isa::available().contains(&Isa::detect()));
    }
}
