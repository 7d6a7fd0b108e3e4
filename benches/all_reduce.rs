//! Time of one all-reduce over host memory, by message size.
//!
//! `cargo bench --bench all_reduce -- 2` starts two ranks on this machine; under a launcher, its ranks are used
//! (`srun -n 2 target/release/deps/all_reduce-…`).

use std::time::Instant;

use tandem::world::{Group, Hello, MeetOptions, World, WorldFlags};
use tandem::{Error, Result};

/// Floats: one row of Qwen2.5-0.5B, 7B and 72B, and a prefill of 512 rows of 0.5B and 7B.
const SIZES: [usize; 5] = [896, 3584, 8192, 512 * 896, 512 * 3584];
const WARM_UP: usize = 50;

fn main() {
    if let Err(error) = run() {
        if !matches!(error, Error::Told(_)) {
            eprintln!("tandem: {error}");
        }
        std::process::exit(error.exit_code().into());
    }
}

fn run() -> Result<()> {
    let ranks = std::env::args().skip(1).find_map(|arg| arg.parse().ok());
    let world = World::start(&WorldFlags {
        ranks,
        ..WorldFlags::default()
    })?;
    let group = Group::meet(&world, Hello::new(world.rank), &MeetOptions::default())?;
    let mut collective = group.take_collective();
    if group.rank() == 0 {
        println!("{} ranks, {}", group.size(), collective.name());
        println!(
            "{:>10}  {:>10}  {:>10}  {:>10}",
            "KiB", "median us", "best us", "p90 us"
        );
    }
    for n in SIZES {
        let mut x = vec![0f32; n];
        let rounds = (1 << 25) / n.max(1 << 14);
        let mut times = Vec::with_capacity(rounds);
        for round in 0..WARM_UP + rounds {
            let start = Instant::now();
            collective.all_reduce(&mut x).map_err(|e| group.fail(e))?;
            if round >= WARM_UP {
                times.push(start.elapsed().as_secs_f64() * 1e6);
            }
        }
        times.sort_by(f64::total_cmp);
        if group.rank() == 0 {
            let at = |share: usize| times[times.len() * share / 100];
            println!(
                "{:>10.1}  {:>10.1}  {:>10.1}  {:>10.1}",
                n as f64 * 4.0 / 1024.0,
                at(50),
                at(0),
                at(90)
            );
        }
    }
    group.finish()
}
