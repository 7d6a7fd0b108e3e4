//! The measurements, on the stand-in: not how fast it is, but that they measure what they say.

use super::super::probe::{Probe, Sizes};
use super::*;
use crate::gpu::standin::Edit;

const SMALL: Sizes = Sizes {
    // An odd end, so that the last loads of the kernel are not those of its main loop.
    read_bytes: (1 << 20) + 16 * 5,
    link_bytes: 10_000,
    gemm: 24,
    runs: 2,
    beside_s: 1e-3,
};

fn probe(options: Options) -> Probe {
    let parts = Parts::standin(&Arc::new(Standin::new(options)), None, 64).unwrap();
    Probe::new(parts, SMALL)
}

#[test]
fn one_device_is_measured() {
    let mut probe = probe(Options::default());
    for rate in [probe.read_gbs(), probe.gemm_tflops(), probe.link_gbs()] {
        let rate = rate.unwrap();
        assert!(rate > 0.0 && rate.is_finite(), "{rate}");
    }
    let mut reads = 0;
    let count = || {
        reads += 1;
        1000
    };
    // A hundred copies at the rate that is claimed.
    let (link, cores) = probe.link_beside(1.0, count).unwrap();
    assert!(link > 0.0 && link.is_finite() && cores > 0.0 && cores.is_finite());
    assert!(
        reads >= 20,
        "{reads} reads while a hundred copies were under way"
    );
    assert_eq!(probe.gather(&[3.0, 4.0], &[2]).unwrap(), [3.0, 4.0]);
    assert_eq!(probe.fused_all_reduce_us(1, 64).unwrap(), None);
}

#[test]
fn a_kernel_that_leaves_memory_out_gives_no_rate() {
    let edit = Edit {
        file: "read.cu",
        old: "i < end; i += stride",
        new: "i + 1 < end; i += stride",
    };
    let mut probe = probe(Options {
        edit: Some(edit),
        ..Options::default()
    });
    let e = probe.read_gbs().unwrap_err().to_string();
    assert!(e.contains("does not read"), "{e}");
}

#[test]
fn more_than_is_free_is_not_read() {
    let mut probe = probe(Options {
        total_memory: 1 << 19,
        ..Options::default()
    });
    assert!(probe.read_gbs().unwrap() > 0.0);
}

/// What the ranks agree on is served that way: each of them takes the fused sums or the library's, and all alike.
#[test]
fn the_way_of_sums_is_measured_and_the_same_on_every_rank() {
    let run = |comm: ThreadRanks| {
        move || -> Result<_> {
            let options = Options {
                ordinal: comm.rank as u32,
                ..Options::default()
            };
            let standin = Arc::new(Standin::new(options));
            let mut parts = Parts::standin(&standin, Some(Box::new(comm)), 64)?;
            let unmeasured = [1, 8, 9, 32].map(|rows| parts.comm.is_fused(rows));
            assert_eq!(unmeasured, [true, true, false, false]);
            parts.comm.measure(parts.stream)?;
            let measured = (1..40)
                .map(|rows| parts.comm.is_fused(rows))
                .collect::<Vec<_>>();
            Ok((parts.comm.ways().to_vec(), measured))
        }
    };
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let ranks = ThreadRanks::all(3).into_iter();
        let threads: Vec<_> = ranks.map(|comm| scope.spawn(run(comm))).collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap().unwrap())
            .collect()
    });
    assert!(outcomes.iter().all(|o| *o == outcomes[0]));
    let (ways, measured) = &outcomes[0];
    let rows: Vec<_> = ways.iter().map(|w| w.rows).collect();
    assert_eq!(rows, crate::layout::SUM_ROWS);
    assert!(ways.iter().all(|w| w.fused_us > 0.0 && w.library_us > 0.0));
    assert_eq!(measured[10], ways[4].is_fused());
    assert!(!measured[32], "no inbox has room for 33 rows");
}

#[test]
fn sums_over_two_ranks_are_timed_both_ways() {
    let run = |comm: ThreadRanks| {
        move || {
            let rank = comm.rank;
            let options = Options {
                seed: rank as u64 + 1,
                ordinal: rank as u32,
                ..Options::default()
            };
            let standin = Arc::new(Standin::new(options));
            let parts = Parts::standin(&standin, Some(Box::new(comm)), 64)?;
            let mut probe = Probe::new(parts, SMALL);
            assert_eq!(probe.collective_name(), "peer memory");
            let fused = probe.fused_all_reduce_us(2, 64)?;
            let other_width = probe.fused_all_reduce_us(1, 72)?;
            let library = probe.all_reduce_us(1 << 10)?;
            let all = probe.gather(&[rank as f32], &[1, 1])?;
            Ok((fused, other_width, library, all))
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = ThreadRanks::all(2)
            .into_iter()
            .map(|comm| scope.spawn(run(comm)))
            .collect();
        for thread in threads {
            let outcome: Result<_> = thread.join().unwrap();
            let (fused, other_width, library, all) = outcome.unwrap();
            assert!(fused.unwrap() > 0.0 && library > 0.0);
            // Peer memory serves one width alone.
            assert_eq!(other_width, None);
            assert_eq!(all, [0.0, 1.0]);
        }
    });
}
