//! Ranks as processes that fail, are killed, and get signals.

use super::*;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

/// Far more than any of these ends takes, on a busy machine too.
const LONG: Duration = Duration::from_secs(30);

/// What the processes of the tests below do; nothing when called as a test.
#[test]
fn as_a_rank() {
    let Ok(task) = std::env::var("TANDEM_TEST_TASK") else {
        return;
    };
    let code = match rank_main(&task) {
        Ok(()) => 0,
        Err(error) => {
            if !matches!(error, Error::Told(_)) {
                eprintln!("tandem: {error}");
            }
            i32::from(error.exit_code())
        }
    };
    std::process::exit(code);
}

fn rank_main(task: &str) -> Result<()> {
    let ranks = std::env::var("TANDEM_TEST_RANKS").ok();
    let flags = WorldFlags {
        ranks: ranks.and_then(|n| n.parse().ok()),
        ..WorldFlags::default()
    };
    let world = World::start(&flags)?;
    let hello = Hello::new(world.rank);
    if task == "die early" && world.rank == 2 {
        std::process::abort();
    }
    let options = MeetOptions {
        timeout: Duration::from_secs(60),
        ..MeetOptions::default()
    };
    let group = Group::meet(&world, hello, &options)?;
    let mut collective = group.take_collective();
    if group.rank() == 0 {
        let pids: Vec<String> = group.hellos().iter().map(|h| h.pid.to_string()).collect();
        eprintln!("pids {}", pids.join(" "));
    }
    let rounds = if task == "sum" { 100 } else { usize::MAX };
    for round in 0..rounds {
        if task == "fail" && round == 10 && group.rank() == 1 {
            return Err(group.fail(Error::failed("the model is gone")));
        }
        if task == "idle" {
            // As inside a driver call: nothing in this thread looks at the others.
            std::thread::sleep(Duration::from_secs(60));
        }
        if task == "sum until told" {
            // Rank 0's word, so that all end after the same round.
            let go_on = match group.rank() {
                0 => {
                    let go_on =
                        !std::path::Path::new(&std::env::var("TANDEM_TEST_END").unwrap()).exists();
                    group.broadcast(&[u8::from(go_on)])?;
                    go_on
                }
                _ => group.receive()? == [1],
            };
            if !go_on {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut x = vec![group.rank() as f32; 5000];
        collective.all_reduce(&mut x).map_err(|e| group.fail(e))?;
        let expected = (group.size() * (group.size() - 1) / 2) as f32;
        assert!(x.iter().all(|&x| x == expected));
    }
    group.finish()
}

fn process(task: &str, variables: &[(&str, String)]) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([
            "--exact",
            "world::tests::processes::as_a_rank",
            "--nocapture",
            "--test-threads=1",
        ])
        .env("TANDEM_TEST_TASK", task)
        // Tests leave nothing in a home.
        .env_remove("XDG_CONFIG_HOME")
        .env("HOME", "/nonexistent")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    for (name, value) in variables {
        command.env(name, value);
    }
    // A shell in the background ignores Ctrl-C, and so would all that it starts.
    // SAFETY: `signal` may be called between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGINT, libc::SIG_DFL);
            Ok(())
        });
    }
    command.spawn().unwrap()
}

/// Runs `size` ranks as a Slurm step would; `act` gets their process ids once they have met.
fn run_ranks(task: &str, size: usize, act: impl FnOnce(&[u32])) -> Vec<(String, Option<i32>)> {
    let job = job();
    let mut ranks: Vec<Child> = (0..size)
        .map(|rank| process(task, &slurm(&job, rank, size)))
        .collect();
    let (first, pids) = until_met(&mut ranks[0]);
    act(&pids);
    let start = Instant::now();
    let mut ended: Vec<(String, Option<i32>)> = ranks.into_iter().map(wait).collect();
    assert!(start.elapsed() < LONG, "{:?}", start.elapsed());
    ended[0].0.insert_str(0, &first);
    ended
}

/// Reads rank 0's stderr up to the line with the process ids.
fn until_met(rank_0: &mut Child) -> (String, Vec<u32>) {
    let stderr = rank_0.stderr.as_mut().unwrap();
    let (mut text, mut byte) = (Vec::new(), [0]);
    while stderr.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
        text.push(byte[0]);
    }
    let line = String::from_utf8(text).unwrap();
    match line.strip_prefix("pids ") {
        Some(pids) => (
            String::new(),
            pids.split(' ').map(|p| p.parse().unwrap()).collect(),
        ),
        None => (line + "\n", Vec::new()),
    }
}

fn wait(child: Child) -> (String, Option<i32>) {
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    (String::from_utf8(stderr).unwrap(), status.code())
}

fn kill(pid: u32, signal: i32) {
    // SAFETY: plain integers; the process is one that this test started.
    unsafe { libc::kill(pid as libc::pid_t, signal) };
}

#[test]
fn processes_work_together() {
    for (stderr, code) in run_ranks("sum", 3, |_| {}) {
        assert_eq!((stderr.as_str(), code), ("", Some(0)));
    }
}

#[test]
fn a_killed_rank_ends_all_and_is_named() {
    let host = Hello::new(0).host;
    for task in ["loop", "idle"] {
        let ended = run_ranks(task, 3, |pids| kill(pids[2], libc::SIGKILL));
        let message = format!("tandem: rank 2 ({host}) ended without a word (killed?)\n");
        assert_eq!(ended[0], (message, Some(1)), "{task}");
        assert_eq!(ended[1], (String::new(), Some(1)), "{task}");
    }
}

#[test]
fn a_failing_process_ends_all_with_its_error_shown_once() {
    let host = Hello::new(0).host;
    let ended = run_ranks("fail", 3, |_| {});
    let message = format!("tandem: rank 1 ({host}): the model is gone\n");
    assert_eq!(ended[0], (message, Some(1)));
    assert_eq!(ended[1], (String::new(), Some(1)));
    assert_eq!(ended[2], (String::new(), Some(1)));
}

#[test]
fn without_rank_0_the_others_say_so_and_end() {
    let host = Hello::new(0).host;
    let ended = run_ranks("loop", 3, |pids| kill(pids[0], libc::SIGKILL));
    let message = format!("tandem: rank 0 ({host}) ended without a word (killed?)\n");
    for (stderr, code) in &ended[1..] {
        assert_eq!((stderr, *code), (&message, Some(1)));
    }
}

#[test]
fn ctrl_c_is_quiet() {
    // To rank 0 alone, and to all, as a terminal does it.
    for all in [false, true] {
        for signal in [libc::SIGINT, libc::SIGTERM] {
            let ended = run_ranks("loop", 3, |pids| {
                let count = if all { 3 } else { 1 };
                pids[..count]
                    .iter()
                    .rev()
                    .for_each(|&pid| kill(pid, signal));
            });
            for (rank, (stderr, code)) in ended.iter().enumerate() {
                assert_eq!(stderr, "", "rank {rank}, signal {signal}, all {all}");
                assert_ne!(*code, Some(0), "rank {rank}");
            }
            assert_eq!(ended[0].1, None, "rank 0 ends by the signal itself");
        }
    }
}

#[test]
fn a_terminated_rank_is_named_with_its_signal() {
    let host = Hello::new(0).host;
    let ended = run_ranks("loop", 2, |pids| kill(pids[1], libc::SIGTERM));
    let message = format!("tandem: rank 1 ({host}) was ended by SIGTERM\n");
    assert_eq!(ended[0], (message, Some(1)));
}

#[test]
fn a_stopped_rank_ends_all_and_itself_when_it_goes_on() {
    let host = Hello::new(0).host;
    let runs = ["loop", "idle"].map(|task| {
        let job = job();
        let ranks = (0..3).map(|rank| process(task, &slurm(&job, rank, 3)));
        let mut ranks: Vec<Child> = ranks.collect();
        let (_, pids) = until_met(&mut ranks[0]);
        kill(pids[2], libc::SIGSTOP);
        (ranks, pids[2])
    });
    for (mut ranks, stopped) in runs {
        let (two, one, zero) = (ranks.pop(), ranks.pop(), ranks.pop());
        let message = format!(
            "tandem: rank 2 ({host}) has shown no sign of life for 14 s (stopped, or its machine is down?)\n"
        );
        assert_eq!(wait(zero.unwrap()), (message, Some(1)));
        assert_eq!(wait(one.unwrap()), (String::new(), Some(1)));
        kill(stopped, libc::SIGCONT);
        assert_eq!(wait(two.unwrap()), (String::new(), Some(1)));
    }
}

#[test]
fn a_stopped_rank_0_of_a_local_run_shows_the_end() {
    let host = Hello::new(0).host;
    let mut rank_0 = local("idle", "3");
    let (_, pids) = until_met(&mut rank_0);
    kill(pids[0], libc::SIGSTOP);
    let (stderr, code) = wait(rank_0);
    assert_eq!(code, Some(1), "{stderr}");
    let silence = format!("rank 0 ({host}) has shown no sign of life for 14 s");
    assert!(stderr.contains(&silence), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}

#[test]
fn a_pause_of_all_or_a_short_one_of_one_ends_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let end = dir.path().join("end");
    let job = job();
    let mut ranks: Vec<Child> = (0..3)
        .map(|rank| {
            let mut variables = slurm(&job, rank, 3);
            variables.push(("TANDEM_TEST_END", end.to_str().unwrap().to_owned()));
            process("sum until told", &variables)
        })
        .collect();
    let (_, pids) = until_met(&mut ranks[0]);
    // Longer than silence is borne; the one that goes on first must not blame the others.
    for (stopped, seconds) in [(&pids[1..2], 3), (&pids[..], 17)] {
        stopped.iter().for_each(|&pid| kill(pid, libc::SIGSTOP));
        std::thread::sleep(Duration::from_secs(seconds));
        for &pid in stopped {
            kill(pid, libc::SIGCONT);
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    std::fs::write(&end, "").unwrap();
    for rank in ranks {
        assert_eq!(wait(rank), (String::new(), Some(0)));
    }
}

fn local(task: &str, ranks: &str) -> Child {
    process(task, &[("TANDEM_TEST_RANKS", ranks.to_owned())])
}

#[test]
fn local_ranks_start_work_and_end() {
    let mut rank_0 = local("sum", "4");
    let (_, pids) = until_met(&mut rank_0);
    assert_eq!(pids.len(), 4);
    assert_eq!(wait(rank_0), (String::new(), Some(0)));
    for pid in pids {
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }
}

#[test]
fn a_killed_local_rank_is_named_with_its_signal() {
    let mut rank_0 = local("loop", "3");
    let (_, pids) = until_met(&mut rank_0);
    let start = Instant::now();
    kill(pids[2], libc::SIGKILL);
    let host = Hello::new(0).host;
    let message = format!("tandem: rank 2 ({host}) was killed by signal 9\n");
    assert_eq!(wait(rank_0), (message, Some(1)));
    assert!(start.elapsed() < LONG);
}

#[test]
fn a_local_rank_that_dies_early_is_not_waited_for() {
    let mut rank_0 = local("die early", "3");
    let start = Instant::now();
    let (first, _) = until_met(&mut rank_0);
    assert_eq!(
        first,
        "tandem: rank 2 was killed by signal 6 before the ranks had met\n"
    );
    assert_eq!(wait(rank_0).1, Some(1));
    assert!(start.elapsed() < LONG);
}

#[test]
fn local_ranks_do_not_outlive_rank_0() {
    let mut rank_0 = local("idle", "3");
    let (_, pids) = until_met(&mut rank_0);
    kill(pids[0], libc::SIGKILL);
    wait(rank_0);
    let until = Instant::now() + LONG;
    for pid in &pids[1..] {
        while is_running(*pid) {
            assert!(Instant::now() < until, "process {pid} is still there");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn is_running(pid: u32) -> bool {
    // A zombie whose new parent has not looked yet has ended.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}
