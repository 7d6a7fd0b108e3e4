//! Who am I: the variables of every launcher, alone, nested and broken.

use super::*;

#[test]
fn every_launcher_s_variables_are_understood() {
    let step = [
        ("SLURM_JOB_ID", "7"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_PROCID", "5"),
        ("SLURM_NTASKS", "7"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_NODEID", "2"),
        ("SLURM_STEP_TASKS_PER_NODE", "2(x3),1"),
        ("SLURM_STEP_NODELIST", "n[01-03],gpu1"),
    ];
    let world = detect(&step).unwrap();
    assert_eq!(
        (world.rank, world.size, world.source),
        (5, 7, Source::Slurm)
    );
    assert_eq!((world.local_rank, world.local_size), (Some(1), Some(2)));
    assert!(matches!(&world.rendezvous, Rendezvous::At { host, .. } if host == "n01"));

    let mpirun = [
        ("OMPI_COMM_WORLD_RANK", "1"),
        ("OMPI_COMM_WORLD_SIZE", "2"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ("PMIX_NAMESPACE", "1114898433"),
        ("PMIX_RANK", "1"),
    ];
    let world = detect(&mpirun).unwrap();
    assert_eq!(
        (world.rank, world.size, world.source),
        (1, 2, Source::OpenMpi)
    );
    assert!(matches!(&world.rendezvous, Rendezvous::At { host, .. } if host == LOCALHOST));

    let mpiexec = [
        ("PMI_RANK", "1"),
        ("PMI_SIZE", "2"),
        ("MPI_LOCALRANKID", "1"),
        ("MPI_LOCALNRANKS", "2"),
    ];
    let world = detect(&mpiexec).unwrap();
    assert_eq!((world.rank, world.size, world.source), (1, 2, Source::Pmi));

    let torchrun = [
        ("RANK", "3"),
        ("WORLD_SIZE", "4"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("MASTER_ADDR", "head"),
        ("MASTER_PORT", "29500"),
    ];
    let world = detect(&torchrun).unwrap();
    assert_eq!(
        (world.rank, world.size, world.source),
        (3, 4, Source::Torchrun)
    );
    assert!(matches!(&world.rendezvous, Rendezvous::At { host, .. } if host == "head"));
    assert_eq!(ports(&world)[..2], [29500, 29501]);

    let world = detect(&[]).unwrap();
    assert_eq!(
        (world.rank, world.size, world.source),
        (0, 1, Source::Alone)
    );
}

#[test]
fn flags_come_first() {
    let flags = WorldFlags {
        rank: Some(1),
        world_size: Some(3),
        rendezvous: Some("[::1]:4000".into()),
        ..WorldFlags::default()
    };
    let world = detect_with(&flags, &[("RANK", "0"), ("WORLD_SIZE", "8")]).unwrap();
    assert_eq!(
        (world.rank, world.size, world.source),
        (1, 3, Source::Flags)
    );
    assert!(
        matches!(&world.rendezvous, Rendezvous::At { host, ports } if host == "::1" && ports == &[4000])
    );
}

#[test]
fn the_inner_launcher_wins() {
    // mpirun's daemon on the second node is task 0 of 1 of a step; the rank beneath it is Open MPI's.
    let beneath_a_daemon = [
        ("SLURM_JOB_ID", "7"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_PROCID", "0"),
        ("SLURM_NTASKS", "1"),
        ("SLURM_JOB_NODELIST", "n[1-2]"),
        ("SLURM_STEP_NODELIST", "n2"),
        ("OMPI_COMM_WORLD_RANK", "3"),
        ("OMPI_COMM_WORLD_SIZE", "4"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ("PMIX_NAMESPACE", "99"),
    ];
    let world = detect(&beneath_a_daemon).unwrap();
    assert_eq!(
        (world.rank, world.size, world.source),
        (3, 4, Source::OpenMpi)
    );
    assert!(matches!(&world.rendezvous, Rendezvous::At { host, .. } if host == "n1"));
    // ... and meets rank 0, which mpirun starts on the first node, outside any step.
    let rank_0 = [
        ("SLURM_JOB_ID", "7"),
        ("SLURM_JOB_NODELIST", "n[1-2]"),
        ("SLURM_NTASKS", "4"),
        ("OMPI_COMM_WORLD_RANK", "0"),
        ("OMPI_COMM_WORLD_SIZE", "4"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ("PMIX_NAMESPACE", "99"),
    ];
    let first = detect(&rank_0).unwrap();
    assert_eq!((ports(&first), first.token), (ports(&world), world.token));

    // srun --mpi=pmix inside a shell that mpirun started.
    let srun_within = [
        ("OMPI_COMM_WORLD_RANK", "0"),
        ("OMPI_COMM_WORLD_SIZE", "1"),
        ("PMIX_NAMESPACE", "slurm.pmix.7.1"),
        ("PMIX_RANK", "1"),
        ("SLURM_JOB_ID", "7"),
        ("SLURM_STEP_ID", "1"),
        ("SLURM_PROCID", "1"),
        ("SLURM_NTASKS", "2"),
        ("SLURM_STEP_NODELIST", "n1"),
    ];
    let world = detect(&srun_within).unwrap();
    assert_eq!(
        (world.rank, world.size, world.source),
        (1, 2, Source::Slurm)
    );

    // torchrun as the one task of each node.
    let torchrun = [
        ("SLURM_STEP_ID", "0"),
        ("SLURM_PROCID", "1"),
        ("SLURM_NTASKS", "2"),
        ("RANK", "9"),
        ("WORLD_SIZE", "16"),
        ("MASTER_ADDR", "n1"),
        ("MASTER_PORT", "29400"),
        ("TORCHELASTIC_RUN_ID", "none"),
        ("TORCHELASTIC_USE_AGENT_STORE", "True"),
    ];
    let world = detect(&torchrun).unwrap();
    assert_eq!(
        (world.rank, world.size, world.source),
        (9, 16, Source::Torchrun)
    );
    assert_eq!(ports(&world)[0], 29401);
    // The same words exported by a job script do not override the step.
    let exported = detect(&torchrun[..7]).unwrap();
    assert_eq!((exported.rank, exported.source), (1, Source::Slurm));
}

#[test]
fn without_srun_it_is_one_process() {
    let sbatch = [
        ("SLURM_JOB_ID", "7"),
        ("SLURM_NTASKS", "3"),
        ("SLURM_PROCID", "0"),
        ("SLURM_LOCALID", "0"),
    ];
    assert_eq!(detect(&sbatch).unwrap().size, 1);
    // The shell of `salloc` may be a step of its own kind, number 0xfffffffa.
    let interactive = [&sbatch[..], &[("SLURM_STEP_ID", "4294967290")]].concat();
    assert_eq!(detect(&interactive).unwrap().size, 1);
    let shell = [
        ("SLURM_STEP_ID", "0"),
        ("SLURM_NTASKS", "1"),
        ("SLURM_PROCID", "0"),
    ];
    assert_eq!(detect(&shell).unwrap().size, 1);
}

#[test]
fn malformed_and_contradictory_variables_are_one_clear_error() {
    let step = ("SLURM_STEP_ID", "0");
    for (variables, message) in [
        (
            vec![step, ("SLURM_PROCID", "x"), ("SLURM_NTASKS", "2")],
            "SLURM_PROCID is \"x\": expected a whole number",
        ),
        (
            vec![step, ("SLURM_PROCID", "2"), ("SLURM_NTASKS", "2")],
            "SLURM_PROCID is 2 and SLURM_NTASKS is 2: the rank must be below the size",
        ),
        (
            vec![step, ("SLURM_NTASKS", "2")],
            "SLURM_PROCID is not set, though SLURM_NTASKS is",
        ),
        (
            vec![
                step,
                ("SLURM_PROCID", "0"),
                ("SLURM_NTASKS", "2"),
                ("SLURM_STEP_NODELIST", "n[2-1]"),
            ],
            "SLURM_STEP_NODELIST: the node list \"n[2-1]\" has a malformed range",
        ),
        (
            vec![("RANK", "-1"), ("WORLD_SIZE", "2")],
            "RANK is \"-1\": expected a whole number",
        ),
        (
            vec![("PMI_RANK", "0"), ("PMI_SIZE", "99999")],
            "PMI_RANK is 0 and PMI_SIZE is 99999",
        ),
        (
            vec![("PMIX_RANK", "1")],
            "PMIX_RANK is 1 but no variable says how many ranks there are",
        ),
        (
            vec![("TANDEM_LOCAL_RANK", "3 2 1 0")],
            "TANDEM_LOCAL_RANK is malformed",
        ),
        (
            vec![
                step,
                ("SLURM_PROCID", "0"),
                ("SLURM_NTASKS", "2"),
                ("TANDEM_SECRET", "short"),
            ],
            "TANDEM_SECRET has 5 characters",
        ),
    ] {
        let error = detect(&variables).unwrap_err().to_string();
        assert!(error.starts_with(message), "{error}");
    }
    let flags = |ranks, rank, world_size, rendezvous: Option<&str>| WorldFlags {
        ranks,
        rank,
        world_size,
        rendezvous: rendezvous.map(str::to_owned),
    };
    for (flags, message) in [
        (flags(Some(0), None, None, None), "--ranks 0"),
        (
            flags(Some(20_000), None, None, None),
            "--ranks 20000: at most 1024",
        ),
        (
            flags(None, Some(0), None, None),
            "--rank and --world-size go together",
        ),
        (flags(None, Some(2), Some(2), None), "--rank 2"),
        (
            flags(None, Some(0), Some(2), None),
            "--rank and --world-size need",
        ),
        (flags(None, Some(0), Some(9999), Some("h:1")), "9999 ranks"),
        (
            flags(None, None, None, Some("nowhere")),
            "--rendezvous nowhere",
        ),
        (
            flags(None, None, None, Some("h:70000")),
            "--rendezvous h:70000",
        ),
    ] {
        let error = detect_with(&flags, &[]).unwrap_err();
        assert!(error.to_string().starts_with(message), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
    let many = [step, ("SLURM_PROCID", "1"), ("SLURM_NTASKS", "2")];
    let error = detect_with(&flags(Some(4), None, None, None), &many).unwrap_err();
    assert_eq!(
        error.to_string(),
        "--ranks 4 starts processes on one machine, but this is already rank 1 of 2 (a Slurm step): leave --ranks out"
    );
    assert!(detect_with(&flags(Some(2), None, None, None), &many).is_ok());
}

#[test]
fn a_step_that_does_not_name_its_nodes_meets_at_master_addr() {
    let step = |more: &[(&'static str, &'static str)]| {
        let step = [
            ("SLURM_JOB_ID", "7"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_PROCID", "1"),
            ("SLURM_NTASKS", "2"),
        ];
        detect(&[&step[..], more].concat()).unwrap()
    };
    let at = |world: &World| match &world.rendezvous {
        Rendezvous::At { host, .. } => host.clone(),
        other => format!("{other:?}"),
    };
    assert_eq!(at(&step(&[("MASTER_ADDR", "head")])), "head");
    // What the step itself says comes first.
    let listed = [("MASTER_ADDR", "head"), ("SLURM_STEP_NODELIST", "n[1-2]")];
    assert_eq!(at(&step(&listed)), "n1");
    let here = [("SLURM_NODEID", "0"), ("SLURM_STEP_TASKS_PER_NODE", "2")];
    assert_eq!(at(&step(&here)), LOCALHOST);
    let nothing = step(&[]);
    assert!(matches!(&nothing.rendezvous, Rendezvous::Unknown(why) if why.contains("MASTER_ADDR")));
}

#[test]
fn a_secret_gives_ports_that_do_not_follow_from_the_job() {
    let step = [
        ("SLURM_JOB_ID", "7"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_PROCID", "1"),
        ("SLURM_NTASKS", "2"),
        ("SLURM_STEP_NODELIST", "n1"),
    ];
    let with =
        |secret| ports(&detect(&[&step[..], &[("TANDEM_SECRET", secret)]].concat()).unwrap());
    let (plain, one, two) = (
        ports(&detect(&step).unwrap()),
        with("one secret that is long"),
        with("two secrets that are long"),
    );
    assert_eq!(
        (&one[..8], &two[..8], plain.len()),
        (&plain[..], &plain[..], 8)
    );
    assert_ne!(one[8..], two[8..]);
    assert!(one.len() == 16 && one.iter().all(|p| (20_000..32_000).contains(p)));
}
