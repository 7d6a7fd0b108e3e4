//! Both ways of the data against the plain sum in rank order, with ranks as threads.

use super::tcp::{BLOCK, DIRECT};
use super::*;
use proptest::prelude::*;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};

/// One collective a rank, connected within this process.
pub(super) fn tcp(size: usize) -> Vec<TcpCollective> {
    let mut streams: Vec<Vec<Option<TcpStream>>> = (0..size)
        .map(|_| (0..size).map(|_| None).collect())
        .collect();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    for (a, b) in (0..size).flat_map(|a| (a + 1..size).map(move |b| (a, b))) {
        let to = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let from = listener.accept().unwrap().0;
        to.set_nodelay(true).unwrap();
        from.set_nodelay(true).unwrap();
        streams[a][b] = Some(to);
        streams[b][a] = Some(from);
    }
    let hosts = vec!["here".to_owned(); size];
    streams
        .into_iter()
        .enumerate()
        .map(|(rank, s)| TcpCollective::new(rank, s, &hosts, rank % 2 == 0).unwrap())
        .collect()
}

fn shm(size: usize) -> Vec<ShmCollective> {
    static SESSION: AtomicU64 = AtomicU64::new(1);
    let session = SESSION.fetch_add(1, Ordering::Relaxed);
    let first = Segment::create(size, session).unwrap();
    let (pid, descriptor) = (std::process::id(), first.descriptor());
    let others = (1..size).map(|_| Segment::open(pid, descriptor, size, session).unwrap());
    let others: Vec<Segment> = others.collect();
    let segments = std::iter::once(first).chain(others);
    segments
        .zip(tcp(size))
        .map(|(segment, peers)| ShmCollective::new(segment, peers))
        .collect()
}

fn both(size: usize) -> [Vec<Box<dyn HostCollective>>; 2] {
    [
        tcp(size).into_iter().map(|c| Box::new(c) as _).collect(),
        shm(size).into_iter().map(|c| Box::new(c) as _).collect(),
    ]
}

/// Runs `body` once a rank, on threads; the results in rank order.
pub(super) fn on_all<C: HostCollective, T: Send>(
    ranks: Vec<C>,
    body: impl Fn(&mut C) -> T + Sync,
) -> Vec<T> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|mut c| {
                let body = &body;
                scope.spawn(move || body(&mut c))
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

impl HostCollective for Box<dyn HostCollective> {
    fn rank(&self) -> usize {
        (**self).rank()
    }
    fn size(&self) -> usize {
        (**self).size()
    }
    fn all_reduce(&mut self, x: &mut [f32]) -> Result<()> {
        (**self).all_reduce(x)
    }
    fn all_gather(&mut self, local: &[f32], counts: &[usize], out: &mut [f32]) -> Result<()> {
        (**self).all_gather(local, counts, out)
    }
}

/// Values whose sum depends on the order in which they are added.
fn value(rank: usize, i: usize) -> f32 {
    let x = ((rank * 7919 + i) as u32).wrapping_mul(2_654_435_761);
    (x as f32 / 1e3) * if x.is_multiple_of(3) { 1e-6 } else { -1.0 }
}

#[test]
fn sums_are_those_in_rank_order_bit_for_bit() {
    let lengths = [0, 1, 2, 3, 255, 4096, DIRECT + 1, 3 * DIRECT + 7, BLOCK + 5];
    for size in 1..=5 {
        for ranks in both(size) {
            let sums = on_all(ranks, |c| {
                lengths.map(|n| {
                    let mut x: Vec<f32> = (0..n).map(|i| value(c.rank(), i)).collect();
                    c.all_reduce(&mut x).unwrap();
                    x
                })
            });
            for (at, &n) in lengths.iter().enumerate() {
                let sum = |i| (1..size).fold(value(0, i), |sum, r| sum + value(r, i));
                let expected: Vec<u32> = (0..n).map(|i| sum(i).to_bits()).collect();
                for x in &sums {
                    let bits: Vec<u32> = x[at].iter().map(|x| x.to_bits()).collect();
                    assert!(bits == expected, "{size} ranks, {n} elements");
                }
            }
        }
    }
}

#[test]
fn ranks_that_come_late_or_early_do_not_mix_the_rounds() {
    for ranks in both(3) {
        on_all(ranks, |c| {
            for round in 0..400usize {
                // Each rank dawdles at rounds of its own, past the time that the others look before they sleep.
                if (round + 13 * c.rank()).is_multiple_of(50) {
                    std::thread::sleep(std::time::Duration::from_millis(2));
                }
                let mut x = vec![(round * (c.rank() + 1)) as f32; 1 + round % 7];
                c.all_reduce(&mut x).unwrap();
                assert!(x.iter().all(|&x| x == (round * 6) as f32), "round {round}");
            }
        });
    }
}

#[test]
fn messages_larger_than_the_buffers_do_not_block() {
    // 2 Mi elements from everybody to everybody at once: far beyond any socket's or segment's buffer.
    let n = 2 << 20;
    for ranks in both(4) {
        let gathered = on_all(ranks, |c| {
            let local = vec![c.rank() as f32; n];
            let mut out = vec![-1.0; 4 * n];
            c.all_gather(&local, &[n; 4], &mut out).unwrap();
            out
        });
        for out in gathered {
            assert!(out.iter().enumerate().all(|(i, &x)| x == (i / n) as f32));
        }
    }
}

#[test]
fn counts_that_do_not_fit_are_refused() {
    for mut ranks in both(2) {
        let error = ranks[0].all_gather(&[1.0], &[1, 2], &mut [0.0; 4]);
        assert_eq!(
            error.unwrap_err().to_string(),
            "all_gather of 1 elements into 4: the counts are [1, 2]"
        );
    }
}

#[test]
fn a_peer_at_another_point_is_an_error() {
    for mut ranks in both(2) {
        let (mut one, mut zero) = (ranks.pop().unwrap(), ranks.pop().unwrap());
        std::thread::scope(|scope| {
            scope.spawn(|| one.all_reduce(&mut [1.0; 8]).unwrap_err());
            let error = zero.all_reduce(&mut [1.0; 9]).unwrap_err().to_string();
            assert_eq!(
                error,
                "rank 1 (here) is at another point of the forward pass"
            );
        });
    }
}

#[test]
fn a_lost_peer_is_an_error() {
    for mut ranks in both(2) {
        drop(ranks.pop());
        let error = ranks[0].all_reduce(&mut [1.0; 9]).unwrap_err().to_string();
        assert!(
            error.starts_with("the connection to rank 1 (here) is lost"),
            "{error}"
        );
    }
}

#[test]
fn a_segment_of_another_run_is_refused() {
    let segment = Segment::create(2, 17).unwrap();
    let (pid, descriptor) = (std::process::id(), segment.descriptor());
    assert!(Segment::open(pid, descriptor, 2, 17).is_ok());
    assert!(Segment::open(pid, descriptor, 2, 18).is_err());
    assert!(Segment::open(pid, descriptor, 3, 17).is_err());
    assert!(Segment::open(pid, 0, 2, 17).is_err());
}

#[test]
fn another_user_cannot_open_a_segment() {
    let segment = Segment::create(2, 17).unwrap();
    let (pid, descriptor) = (std::process::id(), segment.descriptor());
    let opened = crate::world::as_another_user(|| Segment::open(pid, descriptor, 2, 17).is_ok());
    assert_ne!(opened, Some(true));
    assert!(Segment::open(pid, descriptor, 2, 17).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn gathering_keeps_every_rank_s_part(counts in prop::collection::vec(0usize..300, 1..5)) {
        let total: usize = counts.iter().sum();
        let expected: Vec<f32> = counts
            .iter()
            .enumerate()
            .flat_map(|(r, &n)| (0..n).map(move |i| value(r, i)))
            .collect();
        for ranks in both(counts.len()) {
            let gathered = on_all(ranks, |c| {
                let local: Vec<f32> = (0..counts[c.rank()]).map(|i| value(c.rank(), i)).collect();
                let mut out = vec![0.0; total];
                c.all_gather(&local, &counts, &mut out).unwrap();
                out
            });
            for out in gathered {
                prop_assert_eq!(&out, &expected);
            }
        }
    }
}
