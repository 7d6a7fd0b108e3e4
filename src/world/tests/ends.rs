//! One end for all, with ranks as threads.

use super::*;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

/// Three ranks as threads; what their `end` was called with arrives in the channel, by rank.
fn three_ranks() -> (Vec<Group>, Receiver<(usize, Error)>) {
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
                        ..options(10.0)
                    };
                    Group::meet(world, Hello::new(rank), &options).unwrap()
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    (groups, ends)
}

#[test]
fn a_failing_rank_ends_all_with_its_error() {
    let (groups, ends) = three_ranks();
    let host = Hello::new(0).host;
    let start = Instant::now();
    let mine = groups[2].fail(Error::failed("out of memory"));
    assert!(matches!(mine, Error::Told(1)), "{mine:?}");
    let mut heard: Vec<(usize, Error)> = (0..2)
        .map(|_| ends.recv_timeout(Duration::from_secs(5)).unwrap())
        .collect();
    heard.sort_by_key(|(rank, _)| *rank);
    assert_eq!(
        heard[0].1.to_string(),
        format!("rank 2 ({host}): out of memory")
    );
    assert!(matches!(heard[1], (1, Error::Told(1))));
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn the_same_failure_everywhere_is_shown_as_it_is() {
    let (groups, _ends) = three_ranks();
    let errors: Vec<Error> = std::thread::scope(|scope| {
        let threads: Vec<_> = groups
            .iter()
            .map(|g| scope.spawn(|| g.fail(Error::usage("prompt: empty"))))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(errors[0].to_string(), "prompt: empty");
    assert!(matches!(errors[1], Error::Told(2)) && matches!(errors[2], Error::Told(2)));
}

#[test]
fn rank_0_leaving_quietly_takes_the_others_along() {
    let (groups, ends) = three_ranks();
    assert!(matches!(groups[0].fail(Error::Told(0)), Error::Told(0)));
    for _ in 0..2 {
        let (_, end) = ends.recv_timeout(Duration::from_secs(5)).unwrap();
        assert!(matches!(end, Error::Told(0)));
    }
}
