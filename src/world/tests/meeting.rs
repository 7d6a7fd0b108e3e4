//! The meeting, with everything that can come in between.

use super::*;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

#[test]
fn ranks_meet_talk_and_part() {
    for size in [2, 4] {
        let groups = meet_all(&worlds(size), 60.0, |_| {});
        std::thread::scope(|scope| {
            for group in groups {
                scope.spawn(move || {
                    let group = group.unwrap();
                    let rank = group.rank();
                    assert_eq!(group.local_rank_and_size(), (rank, size));
                    assert!(group.hellos().iter().enumerate().all(|(r, h)| h.rank == r));
                    for round in 0..20u8 {
                        if rank == 0 {
                            group.broadcast(&[round]).unwrap();
                        } else {
                            assert_eq!(group.receive().unwrap(), [round]);
                        }
                    }
                    let mut sum = [rank as f32];
                    let mut collective = group.take_collective();
                    collective.all_reduce(&mut sum).unwrap();
                    assert_eq!(sum[0], (0..size).sum::<usize>() as f32);
                    group.finish().unwrap();
                });
            }
        });
    }
}

#[test]
fn a_missing_rank_is_named_on_time() {
    let worlds = worlds(4);
    let start = Instant::now();
    let error = one_error(meet_all(&worlds[..3], 5.0, |_| {}));
    let host = Hello::new(0).host;
    assert_eq!(
        error,
        format!("rank 3 never arrived within 5 s (3 of 4 are here: 0-2 on {host})")
    );
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn without_rank_0_each_speaks_for_itself() {
    let worlds = worlds(3);
    let port = ports(&worlds[0])[0];
    for result in meet_all(&worlds[1..], 1.0, |_| {}) {
        let error = result.err().unwrap().to_string();
        assert_eq!(
            error,
            format!(
                "rank 0 never arrived at localhost:{port} or the ports that follow it within 1 s"
            )
        );
    }
    // A rank with an error of its own says that instead.
    let mine = Hello::new(1).with_error(&Error::usage("no such model"));
    let error = Group::meet(&worlds[1], mine, &options(0.5)).err().unwrap();
    assert_eq!(
        (error.to_string().as_str(), error.exit_code()),
        ("no such model", 2)
    );
}

#[test]
fn disagreements_are_one_error_for_all() {
    let host = Hello::new(0).host;
    let error = one_error(meet_all(&worlds(3), 60.0, |hello| {
        hello.fingerprint = u64::from(hello.rank == 2);
    }));
    assert!(
        error.starts_with(&format!("rank 2 ({host}) has another model")),
        "{error}"
    );

    let error = one_error(meet_all(&worlds(2), 60.0, |hello| {
        hello.gpu_uuid = Some("GPU-5".into());
    }));
    assert!(
        error.starts_with("ranks 0 and 1 both have GPU GPU-5"),
        "{error}"
    );

    let mut sizes = worlds(3);
    sizes[1].size = 4;
    let error = one_error(meet_all(&sizes, 60.0, |_| {}));
    assert!(
        error.starts_with(&format!("rank 1 ({host}) counts 4 ranks, rank 0 counts 3")),
        "{error}"
    );

    let mut twice = worlds(3);
    twice[2].rank = 1;
    let error = one_error(meet_all(&twice, 60.0, |_| {}));
    assert!(
        error.starts_with("two processes say that they are rank 1"),
        "{error}"
    );
}

#[test]
fn two_ranks_0_are_noticed() {
    let worlds = worlds(2);
    let start = Instant::now();
    let twice = [worlds[0].clone(), worlds[0].clone()];
    let results = meet_all(&twice, 2.0, |_| {});
    let errors: Vec<String> = results
        .into_iter()
        .map(|r| r.err().unwrap().to_string())
        .collect();
    assert!(
        errors
            .iter()
            .any(|e| e.starts_with("two processes say that they are rank 0")),
        "{errors:?}"
    );
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn an_error_from_before_the_meeting_is_shown_once() {
    let host = Hello::new(0).host;
    let error = one_error(meet_all(&worlds(3), 60.0, |hello| {
        if hello.rank > 0 {
            let what = Error::failed(format!("no memory for {}", hello.rank));
            *hello = hello.clone().with_error(&what);
        }
    }));
    assert_eq!(error, format!("rank 1 ({host}): no memory for 1"));
    let error = one_error(meet_all(&worlds(3), 60.0, |hello| {
        *hello = hello
            .clone()
            .with_error(&Error::usage("model/: no such folder"));
    }));
    assert_eq!(error, "model/: no such folder");
}

#[test]
fn a_failure_does_not_wait_for_the_missing_for_long() {
    let start = Instant::now();
    let error = one_error(meet_all(&worlds(3)[..2], 120.0, |hello| {
        if hello.rank == 1 {
            *hello = hello.clone().with_error(&Error::failed("broken"));
        }
    }));
    assert!(error.ends_with("broken"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(40));
}

#[test]
fn a_port_in_use_is_passed_over() {
    let worlds = worlds(2);
    let candidates = ports(&worlds[0]);
    // One that never says a word, one that hangs up, one that speaks first.
    let silent = TcpListener::bind(("127.0.0.1", candidates[0])).unwrap();
    let rude = TcpListener::bind(("127.0.0.1", candidates[1])).unwrap();
    let chatty = TcpListener::bind(("127.0.0.1", candidates[2])).unwrap();
    std::thread::spawn(move || rude.incoming().for_each(drop));
    std::thread::spawn(move || {
        for stream in chatty.incoming().flatten() {
            let mut stream = stream;
            let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n");
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    let start = Instant::now();
    finish_all(meet_all(&worlds, 60.0, |_| {}));
    assert!(start.elapsed() < Duration::from_secs(40));
    drop(silent);
}

#[test]
fn no_free_port_is_a_clear_error() {
    let mut worlds = worlds(2);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    for world in &mut worlds {
        world.rendezvous = Rendezvous::At {
            host: "127.0.0.1".into(),
            ports: vec![port],
        };
    }
    let mut errors = meet_all(&worlds, 1.0, |_| {})
        .into_iter()
        .map(|r| r.err().unwrap().to_string());
    let (zero, one) = (errors.next().unwrap(), errors.next().unwrap());
    assert!(
        zero.starts_with("rank 0 cannot listen on any of its ports on 127.0.0.1"),
        "{zero}"
    );
    assert!(
        one.starts_with(&format!(
            "rank 0 never arrived at 127.0.0.1:{port} within 1 s"
        )),
        "{one}"
    );
}

#[test]
fn strangers_neither_disturb_nor_delay_the_meeting() {
    let worlds = worlds(2);
    let port = ports(&worlds[0])[0];
    let mut held: Vec<TcpStream> = Vec::new();
    std::thread::scope(|scope| {
        let rank_0 = scope.spawn(|| meet_all(&worlds[..1], 60.0, |_| {}).remove(0));
        let connect = || loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => return stream,
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let token = worlds[0].token;
        // What a process of this user could say: the kernel vouches for it, so any proof does.
        let greeting = |rank, size| {
            let greeting = super::handshake::Greeting::new(token, rank, size);
            let mut bytes = greeting.to_bytes([0; 32]).to_vec();
            bytes.extend([0; 32]);
            bytes
        };
        let lying_length = [&greeting(1, 2)[..], &[1, 0xff, 0xff, 0xff, 0xff]].concat();
        let garbled = [
            &greeting(1, 2)[..],
            &[1, 4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
        ]
        .concat();
        let drips = greeting(1, 2)[..20].to_vec();
        for bytes in [
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
            vec![0xff; 4096],
            Vec::new(),
            drips,
            lying_length,
            garbled,
        ] {
            let mut stream = connect();
            stream.write_all(&bytes).unwrap();
            held.push(stream);
        }
        for _ in 0..50 {
            held.push(connect());
        }
        std::thread::sleep(Duration::from_millis(200));
        let start = Instant::now();
        let rank_1 = meet_all(&worlds[1..], 60.0, |_| {}).remove(0);
        finish_all(vec![rank_0.join().unwrap(), rank_1]);
        assert!(
            start.elapsed() < Duration::from_secs(40),
            "{:?}",
            start.elapsed()
        );
    });
}

#[test]
fn an_older_build_is_told_apart() {
    let worlds = worlds(2);
    let port = ports(&worlds[0])[0];
    std::thread::scope(|scope| {
        let rank_0 = scope.spawn(|| meet_all(&worlds[..1], 60.0, |_| {}).remove(0));
        let mut greeting = super::handshake::Greeting::new(worlds[0].token, 1, 2);
        greeting.version = *b"0.0.9\0\0\0\0\0\0\0\0\0\0\0";
        let stream = loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => break stream,
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let trust = super::handshake::Trust {
            secret: worlds[1].secret.clone(),
            owner: true,
        };
        let patience = Duration::from_secs(20);
        assert!(super::handshake::greet(&stream, &greeting, &trust, patience).is_ok());
        super::wire::write_frame(&stream, super::wire::Kind::Hello, b"another layout").unwrap();
        let told = super::wire::read_frame(&stream, 1000).unwrap();
        assert_eq!(told.0, super::wire::Kind::Fail);
        drop(stream);
        let error = rank_0.join().unwrap().err().unwrap().to_string();
        assert!(error.contains("is tandem 0.0.9, rank 0 is"), "{error}");
    });
}

#[test]
fn a_late_rank_0_is_waited_for() {
    let worlds = worlds(2);
    std::thread::scope(|scope| {
        let rank_1 = scope.spawn(|| meet_all(&worlds[1..], 60.0, |_| {}).remove(0));
        std::thread::sleep(Duration::from_millis(1200));
        let rank_0 = meet_all(&worlds[..1], 60.0, |_| {}).remove(0);
        finish_all(vec![rank_0, rank_1.join().unwrap()]);
    });
}
