//! Which CPUs this process may use, and how the ranks of one host share them.

use crate::{Error, Result};
use std::collections::HashSet;

/// Bits of the affinity masks exchanged with the kernel; a mask larger than the kernel's own is accepted.
const MASK_BITS: usize = 8192;
type Mask = [u64; MASK_BITS / 64];

/// The CPUs in the calling thread's affinity mask, ascending; all online CPUs' count if the mask cannot be read.
pub fn affinity_cpus() -> Vec<usize> {
    read_mask().unwrap_or_else(|| {
        let n = std::thread::available_parallelism().map_or(1, usize::from);
        (0..n).collect()
    })
}

fn read_mask() -> Option<Vec<usize>> {
    let mut mask: Mask = [0; MASK_BITS / 64];
    // SAFETY: the pointer and the size describe `mask`; pid 0 is the calling thread.
    let rc = unsafe { libc::sched_getaffinity(0, size_of::<Mask>(), mask.as_mut_ptr().cast()) };
    let cpus: Vec<usize> = (0..MASK_BITS)
        .filter(|&cpu| mask[cpu / 64] >> (cpu % 64) & 1 == 1)
        .collect();
    (rc == 0 && !cpus.is_empty()).then_some(cpus)
}

/// Binds the calling thread to `cpus`.
pub(super) fn pin_current_thread(cpus: &[usize]) -> Result<()> {
    let mut mask: Mask = [0; MASK_BITS / 64];
    for &cpu in cpus {
        let word = mask.get_mut(cpu / 64).ok_or_else(|| {
            Error::failed(format!(
                "CPU {cpu}: CPUs from {MASK_BITS} on are not supported"
            ))
        })?;
        *word |= 1 << (cpu % 64);
    }
    // SAFETY: the pointer and the size describe `mask`; pid 0 is the calling thread.
    let rc = unsafe { libc::sched_setaffinity(0, size_of::<Mask>(), mask.as_ptr().cast()) };
    if rc != 0 {
        let cause = std::io::Error::last_os_error();
        return Err(Error::failed(format!(
            "cannot bind a thread to CPU {cpus:?}: {cause}"
        )));
    }
    Ok(())
}

/// Of `cpus`, one per physical core (the first listed), in order. SMT siblings share the units that kernels saturate.
pub fn physical_cores(cpus: &[usize]) -> Vec<usize> {
    one_per_core(cpus, |cpu| {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        std::fs::read_to_string(path).ok()
    })
}

fn one_per_core(cpus: &[usize], siblings: impl Fn(usize) -> Option<String>) -> Vec<usize> {
    let mut seen = HashSet::new();
    cpus.iter()
        .copied()
        .filter(|&cpu| {
            let core = siblings(cpu).map_or_else(|| cpu.to_string(), |s| s.trim().to_owned());
            seen.insert(core)
        })
        .collect()
}

/// The CPUs of the `index`-th of `of` ranks on one host whose affinity masks are all `mask`.
///
/// They divide the mask into contiguous pieces as even as they come. With more ranks than CPUs, every rank gets one
/// CPU and ranks share it: [`oversubscribed`] tells, and then the pool should be [`super::Pool::sharing`].
pub fn share_of_cpus(mask: &[usize], index: usize, of: usize) -> Vec<usize> {
    let n = mask.len();
    if n == 0 || of == 0 {
        return mask.to_vec();
    }
    let index = index.min(of - 1);
    if of > n {
        return vec![mask[index % n]];
    }
    mask[index * n / of..(index + 1) * n / of].to_vec()
}

/// Whether `of` ranks on a host with this `mask` must share CPUs.
pub fn oversubscribed(mask: &[usize], of: usize) -> bool {
    of > mask.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_is_what_the_thread_was_bound_to() {
        std::thread::spawn(|| {
            let all = affinity_cpus();
            assert!(!all.is_empty());
            pin_current_thread(&all[..1]).unwrap();
            assert_eq!(affinity_cpus(), all[..1]);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn binding_to_a_cpu_that_is_not_there_is_an_error() {
        assert!(pin_current_thread(&[MASK_BITS - 1]).is_err());
        assert!(pin_current_thread(&[MASK_BITS]).is_err());
    }

    #[test]
    fn one_cpu_is_kept_per_core() {
        let siblings = |cpu: usize| (cpu < 8).then(|| format!("{},{}\n", cpu % 4, cpu % 4 + 4));
        assert_eq!(one_per_core(&[0, 1, 4, 5, 6, 9], siblings), [0, 1, 6, 9]);
    }

    #[test]
    fn shares_cover_the_mask_once_or_are_single_cpus() {
        let mask = [2, 3, 5, 7, 11];
        for of in 1..=5 {
            let all: Vec<usize> = (0..of).flat_map(|i| share_of_cpus(&mask, i, of)).collect();
            assert_eq!(all, mask);
            assert!((0..of).all(|i| !share_of_cpus(&mask, i, of).is_empty()));
        }
        assert_eq!(share_of_cpus(&mask, 6, 7), [3]);
        assert!(oversubscribed(&mask, 6) && !oversubscribed(&mask, 5));
    }
}
