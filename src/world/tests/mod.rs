//! Whole meetings: ranks as threads of this process, and, where one has to be killed, as processes of their own
//! (this very test binary, called for `as_a_rank`). Every test has a bound on its time.

mod detect;
mod ends;
mod meeting;
mod processes;
mod strangers;

pub(crate) use strangers::as_another_user;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::*;
use crate::{Error, Result};

type Variables = Vec<(&'static str, String)>;

fn detect(variables: &[(&str, &str)]) -> Result<World> {
    detect_with(&WorldFlags::default(), variables)
}

fn detect_with(flags: &WorldFlags, variables: &[(&str, &str)]) -> Result<World> {
    let map: HashMap<_, _> = variables.iter().copied().collect();
    World::detect(flags, &|name| map.get(name).map(|v| (*v).to_owned()))
}

/// A job of its own for each test, so that tests at the same time do not share ports.
fn job() -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{}{n:02}", std::process::id())
}

fn slurm(job: &str, rank: usize, size: usize) -> Variables {
    vec![
        ("SLURM_JOB_ID", job.to_owned()),
        ("SLURM_STEP_ID", "0".into()),
        ("SLURM_PROCID", rank.to_string()),
        ("SLURM_NTASKS", size.to_string()),
        ("SLURM_STEP_NUM_TASKS", size.to_string()),
        ("SLURM_LOCALID", rank.to_string()),
        ("SLURM_NODEID", "0".into()),
        ("SLURM_STEP_TASKS_PER_NODE", size.to_string()),
        ("SLURM_STEP_NODELIST", "node01".into()),
    ]
}

fn worlds(size: usize) -> Vec<World> {
    let job = job();
    let world = |rank| {
        let variables = slurm(&job, rank, size);
        let map: HashMap<_, _> = variables.into_iter().collect();
        World::detect(&WorldFlags::default(), &|name| map.get(name).cloned()).unwrap()
    };
    (0..size).map(world).collect()
}

fn ports(world: &World) -> Vec<u16> {
    match &world.rendezvous {
        Rendezvous::At { ports, .. } => ports.clone(),
        other => panic!("{other:?}"),
    }
}

fn options(seconds: f64) -> MeetOptions {
    MeetOptions {
        timeout: Duration::from_secs_f64(seconds),
        end: Arc::new(|_| {}),
        signals: false,
        ..MeetOptions::default()
    }
}

/// Lets each world meet on a thread of its own; `hello` adjusts what a rank says.
fn meet_all(
    worlds: &[World],
    seconds: f64,
    hello: impl Fn(&mut Hello) + Sync,
) -> Vec<Result<Group>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = worlds
            .iter()
            .map(|world| {
                let hello = &hello;
                scope.spawn(move || {
                    let mut mine = Hello::new(world.rank);
                    hello(&mut mine);
                    Group::meet(world, mine, &options(seconds))
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// Rank 0's error; all others must have been told to be quiet, with the same exit code.
fn one_error(results: Vec<Result<Group>>) -> String {
    let errors: Vec<Error> = results.into_iter().map(|r| r.err().unwrap()).collect();
    for other in &errors[1..] {
        assert!(
            matches!(other, Error::Told(code) if *code == errors[0].exit_code()),
            "{other:?}"
        );
    }
    errors[0].to_string()
}

fn finish_all(groups: Vec<Result<Group>>) {
    std::thread::scope(|scope| {
        for group in groups {
            let group = group.unwrap();
            scope.spawn(move || group.finish().unwrap());
        }
    });
}
