//! Golden files, and ranks as threads.

use std::collections::HashMap;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tandem::comm::{HostCollective, Solo, TcpCollective};
use tandem::config::ModelConfig;
use tandem::cpu::{CpuBackend, Pool, affinity_cpus};
use tandem::engine::Replica;
use tandem::layout::{Limits, Shard};
use tandem::model::check_tensors;
use tandem::session::{Place, load_rank};
use tandem::weights::{Checkpoint, Source, header};

pub type Ranked = Replica<CpuBackend>;

/// `tests/golden/NAME`.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

/// A folder of the test assets, which are too large to be committed.
pub fn assets(name: &str) -> PathBuf {
    let folder = std::env::var_os("TANDEM_TEST_ASSETS")
        .expect("TANDEM_TEST_ASSETS names the assets' folder");
    Path::new(&folder).join(name)
}

/// The program, in an environment without a launcher.
pub fn tandem() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    let launcher = ["SLURM_", "PMI_", "PMIX_", "OMPI_"];
    for (name, _) in
        std::env::vars().filter(|(name, _)| launcher.iter().any(|p| name.starts_with(p)))
    {
        command.env_remove(name);
    }
    for name in [
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TANDEM_LOG",
    ] {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

/// Sends a signal to a process.
pub fn signal(pid: u32, signal: i32) {
    // SAFETY: takes and returns plain integers.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}

/// The tiny models, by folder name.
pub fn tiny_models() -> Vec<String> {
    let entries = std::fs::read_dir(golden("models")).unwrap();
    let folders = entries
        .map(|e| e.unwrap().path())
        .filter(|p| p.join("golden.safetensors").exists());
    let mut names: Vec<_> = folders
        .map(|p| p.file_name().unwrap().to_str().unwrap().to_string())
        .collect();
    names.sort();
    assert!(names.len() >= 10, "the golden models are gone: {names:?}");
    names
}

/// The tensors of a golden file, as f32 or i64.
pub struct Golden {
    data: Vec<u8>,
    entries: HashMap<String, (usize, usize)>,
}

impl Golden {
    pub fn read(path: &Path) -> Golden {
        let bytes = std::fs::read(path).unwrap();
        let entries = header::parse(&bytes, bytes.len() as u64).unwrap();
        let at = |e: &header::Entry| (e.bytes.start as usize, e.bytes.end as usize);
        let entries = entries
            .iter()
            .map(|(name, e)| (name.clone(), at(e)))
            .collect();
        Golden {
            data: bytes,
            entries,
        }
    }

    fn bytes(&self, name: &str) -> &[u8] {
        let (begin, end) = self.entries[name];
        &self.data[begin..end]
    }

    pub fn f32(&self, name: &str) -> Vec<f32> {
        self.bytes(name)
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect()
    }

    pub fn ids(&self, name: &str) -> Vec<u32> {
        let id = |b: &[u8]| i64::from_le_bytes(b.try_into().unwrap()) as u32;
        self.bytes(name).chunks_exact(8).map(id).collect()
    }
}

/// ‖a − b‖ / ‖b‖.
pub fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |it: &mut dyn Iterator<Item = f64>| it.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(&a, &b)| (a - b) as f64));
    difference / norm(&mut b.iter().map(|&b| b as f64))
}

/// Loads the model in `dir` on `tp_size` ranks, one thread each, connected over TCP, and runs `work` on every rank;
/// the results come back in rank order.
pub fn on_ranks<T: Send>(
    dir: &Path,
    tp_size: usize,
    limits: Limits,
    work: impl Fn(&mut Ranked) -> T + Sync,
) -> Vec<T> {
    let mut connections = mesh(tp_size);
    std::thread::scope(|scope| {
        let work = &work;
        let ranks: Vec<_> = (connections.drain(..).enumerate())
            .map(|(rank, comm)| {
                scope.spawn(move || {
                    let mut config = ModelConfig::from_dir(dir).unwrap();
                    let mut checkpoint = Checkpoint::open(dir).unwrap();
                    let dtype = check_tensors(&mut config, &mut checkpoint).unwrap();
                    let shard = Shard::new(&config, tp_size, rank);
                    let pool = Pool::sharing(&affinity_cpus()).unwrap();
                    let place = Place {
                        shard: &shard,
                        limits,
                        pool,
                        comm,
                    };
                    let vocab = config.vocab_size;
                    work(
                        &mut load_rank(
                            &config,
                            Source::Checkpoint(&checkpoint),
                            dtype,
                            place,
                            vocab,
                        )
                        .unwrap(),
                    )
                })
            })
            .collect();
        ranks.into_iter().map(|r| r.join().unwrap()).collect()
    })
}

// A connection fills two cells of the table: the indices are the point.
#[allow(clippy::needless_range_loop)]
fn mesh(size: usize) -> Vec<Box<dyn HostCollective>> {
    if size == 1 {
        return vec![Box::new(Solo)];
    }
    let mut streams: Vec<Vec<Option<TcpStream>>> = (0..size)
        .map(|_| (0..size).map(|_| None).collect())
        .collect();
    for a in 0..size {
        for b in a + 1..size {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (far, _) = listener.accept().unwrap();
            for stream in [&near, &far] {
                stream.set_nodelay(true).unwrap();
            }
            streams[a][b] = Some(near);
            streams[b][a] = Some(far);
        }
    }
    let hosts = vec!["localhost".to_string(); size];
    let connect = |(rank, streams)| {
        let collective = TcpCollective::new(rank, streams, &hosts, false).unwrap();
        Box::new(collective) as Box<dyn HostCollective>
    };
    streams.into_iter().enumerate().map(connect).collect()
}
