//! One end for all, with ranks as threads.

use super::*;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use crate::world::monitor::SETTLE;

/// Three ranks as threads; what their `end` was called with arrives in the channel, by rank.
fn three_ranks(settle: Duration) -> (Vec<Group>, Receiver<(usize, Error)>) {
    let (sender, ends) = channel();
    let worlds = worlds(3);
    let groups = std::thread::scope(|scope| {
        let threads: Vec<_> = worlds
            .iter()
            .map(|world| {
                let sender = Mutex::new(sender.clone());
                scope.spawn(move || {
                    let rank = world.rank;
                    let end: End = Arc::new(move |e: &Error| {
                        let _ = sender.lock().unwrap().send((rank, e.clone()));
                    });
                    let options = MeetOptions {
                        end,
                        settle,
                        ..options(60.0)
                    };
                    Group::meet(world, Hello::new(rank), &options).unwrap()
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    (groups, ends)
}

/// A time that only a run that hangs reaches, on the most loaded machine too.
const LONG: Duration = Duration::from_secs(60);

#[test]
fn a_failing_rank_ends_all_with_its_error() {
    let (groups, ends) = three_ranks(SETTLE);
    let host = Hello::new(0).host;
    let mine = groups[2].fail(Error::failed("out of memory"));
    assert!(matches!(mine, Error::Told(1)), "{mine:?}");
    let mut heard: Vec<(usize, Error)> = (0..2).map(|_| ends.recv_timeout(LONG).unwrap()).collect();
    heard.sort_by_key(|(rank, _)| *rank);
    assert_eq!(
        heard[0].1.to_string(),
        format!("rank 2 ({host}): out of memory")
    );
    assert!(matches!(heard[1], (1, Error::Told(1))));
}

#[test]
fn the_same_failure_everywhere_is_shown_as_it_is() {
    // Rank 0's own word may come first, last, or in between, and be awaited for as long as it takes.
    for order in [[0, 1, 2], [1, 0, 2], [2, 1, 0]] {
        let (groups, ends) = three_ranks(LONG);
        let said: Vec<(usize, Error)> = std::thread::scope(|scope| {
            let fail = |rank: usize| {
                let group = &groups[rank];
                scope.spawn(move || (rank, group.fail(Error::usage("prompt: empty"))))
            };
            let threads = order.map(fail);
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        // Rank 0 shows it where it has failed, or on the thread that has heard of it first.
        let quiet = |(_, e): &(usize, Error)| matches!(e, Error::Told(2));
        let mut shown: Vec<(usize, Error)> = said.into_iter().filter(|e| !quiet(e)).collect();
        while shown.is_empty() {
            let end = ends.recv_timeout(LONG).expect("nobody has shown the error");
            shown.extend(Some(end).filter(|e| !quiet(e)));
        }
        let [(0, shown)] = &shown[..] else {
            panic!("{shown:?}");
        };
        assert_eq!(shown.to_string(), "prompt: empty");
        assert_eq!(shown.exit_code(), 2);
    }
}

#[test]
fn rank_0_leaving_quietly_takes_the_others_along() {
    let (groups, ends) = three_ranks(SETTLE);
    assert!(matches!(groups[0].fail(Error::Told(0)), Error::Told(0)));
    for _ in 0..2 {
        let (_, end) = ends.recv_timeout(LONG).unwrap();
        assert!(matches!(end, Error::Told(0)));
    }
}
