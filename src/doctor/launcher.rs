//! Who started this process, by the variables that launchers leave.

use crate::world::{Source, World, WorldFlags};
use serde::Serialize;
use std::collections::BTreeMap;

/// Looks a variable of the environment up.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The variables that say something about ranks and GPUs.
const VARIABLES: &[&str] = &[
    "SLURM_JOB_ID",
    "SLURM_JOB_NODELIST",
    "SLURM_NTASKS",
    "SLURM_CPUS_PER_TASK",
    "SLURM_MEM_PER_NODE",
    "SLURM_MEM_PER_CPU",
    "SLURM_GPUS_ON_NODE",
    "SLURM_STEP_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_STEP_GPUS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_MPI_TYPE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "PMIX_NAMESPACE",
    "PMIX_RANK",
    "PMI_RANK",
    "PMI_SIZE",
    "MPI_LOCALRANKID",
    "MPI_LOCALNRANKS",
    "TORCHELASTIC_RUN_ID",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES",
];

/// Who started this process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Launcher {
    /// In words: `a Slurm step`, `one process`.
    pub kind: String,
    /// This process's rank, where it could be told.
    pub rank: Option<usize>,
    /// The number of ranks, where it could be told.
    pub size: Option<usize>,
    /// What keeps a run from starting as the launcher meant it, one line.
    pub problem: Option<String>,
    /// The launchers' variables that are set, and `CUDA_VISIBLE_DEVICES`.
    pub variables: BTreeMap<&'static str, String>,
}

/// Reads the variables as a run would.
pub fn inspect(env: Env) -> Launcher {
    let detected = World::detect(&WorldFlags::default(), env);
    let in_slurm_job = env("SLURM_JOB_ID").is_some();
    let (world, mut problem) = match detected {
        Ok(world) => (Some(world), None),
        Err(error) => (None, Some(error.to_string())),
    };
    let kind = match &world {
        None => "unclear".to_owned(),
        Some(world) if world.source == Source::Alone && in_slurm_job => {
            problem = tasks_without_step(env);
            "a Slurm allocation, outside any step".to_owned()
        }
        Some(world) => world.source.name().to_owned(),
    };
    Launcher {
        kind,
        rank: world.as_ref().map(|w| w.rank),
        size: world.as_ref().map(|w| w.size),
        problem,
        variables: VARIABLES
            .iter()
            .filter_map(|name| Some((*name, env(name)?)))
            .collect(),
    }
}

fn tasks_without_step(env: Env) -> Option<String> {
    let tasks: usize = env("SLURM_NTASKS")?.trim().parse().ok()?;
    (tasks > 1).then(|| {
        format!("the Slurm allocation has {tasks} tasks, but this is one process: start with srun to use them")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inspect_with(variables: &[(&str, &str)]) -> Launcher {
        inspect(&|name| {
            variables
                .iter()
                .find(|(n, _)| *n == name)
                .map(|(_, v)| (*v).to_owned())
        })
    }

    #[test]
    fn a_slurm_step_and_a_bare_allocation_are_told_apart() {
        let job = [
            ("SLURM_JOB_ID", "7"),
            ("SLURM_NTASKS", "4"),
            ("SLURM_JOB_NODELIST", "n[1-2]"),
        ];
        let bare = inspect_with(&job);
        assert_eq!(
            (bare.kind.as_str(), bare.rank, bare.size),
            ("a Slurm allocation, outside any step", Some(0), Some(1))
        );
        assert!(bare.problem.unwrap().contains("4 tasks"));
        assert_eq!(bare.variables["SLURM_JOB_NODELIST"], "n[1-2]");
        let step: Vec<_> = job
            .into_iter()
            .chain([("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "3")])
            .collect();
        let step = inspect_with(&step);
        assert_eq!(
            (step.kind.as_str(), step.rank, step.size, step.problem),
            ("a Slurm step", Some(3), Some(4), None)
        );
    }

    #[test]
    fn no_launcher_is_one_process_and_a_broken_one_says_how() {
        let alone = inspect_with(&[("HOME", "/home/x")]);
        assert_eq!(
            (alone.kind.as_str(), alone.size, alone.variables.len()),
            ("one process", Some(1), 0)
        );
        let torchrun = inspect_with(&[
            ("RANK", "x"),
            ("WORLD_SIZE", "2"),
            ("MASTER_ADDR", "h"),
            ("MASTER_PORT", "1"),
        ]);
        assert_eq!((torchrun.kind.as_str(), torchrun.rank), ("unclear", None));
        assert!(torchrun.problem.unwrap().contains("RANK is \"x\""));
    }
}
