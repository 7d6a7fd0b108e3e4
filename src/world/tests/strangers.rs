//! Another user of the machine who knows all that can be known of a job. Needs root, to be another user.

use super::*;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::channel;
use std::time::Instant;

use crate::world::handshake::Greeting;

/// Runs `f` on a thread that is another user's, and those that it starts; `None` where that cannot be.
pub(crate) fn as_another_user<T: Send>(f: impl FnOnce() -> T + Send) -> Option<T> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tried: only root can be another user");
        return None;
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: plain integers. The system call, unlike the library's function, is for this thread alone.
            let done = unsafe { libc::syscall(libc::SYS_setresuid, 64_007, 64_007, 64_007) };
            assert_eq!(done, 0);
            f()
        });
        Some(thread.join().unwrap())
    })
}

/// Ports that another user listens at until the end of the test, and what came to them is counted.
fn held_by_another_user(ports: &[u16]) -> Option<Arc<AtomicU64>> {
    let heard = Arc::new(AtomicU64::new(0));
    let listeners = as_another_user(|| {
        let bind = |&port: &u16| TcpListener::bind(("127.0.0.1", port)).unwrap();
        ports.iter().map(bind).collect::<Vec<_>>()
    })?;
    for listener in listeners {
        let heard = heard.clone();
        std::thread::spawn(move || {
            as_another_user(|| {
                for mut stream in listener.incoming().flatten() {
                    let mut bytes = [0; 4096];
                    while let Ok(n @ 1..) = stream.read(&mut bytes) {
                        heard.fetch_add(n as u64, Ordering::Relaxed);
                    }
                }
            })
        });
    }
    Some(heard)
}

fn connect(port: u16) -> TcpStream {
    loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => return stream,
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

#[test]
fn another_user_s_rank_is_no_rank() {
    let worlds = worlds(2);
    std::thread::scope(|scope| {
        let rank_0 = scope.spawn(|| meet_all(&worlds[..1], 60.0, |_| {}).remove(0));
        let refused = as_another_user(|| {
            let mut mine = worlds[1].clone();
            // It counts as it likes; that decides nothing either.
            (mine.size, mine.local_size) = (3, Some(3));
            let counted = meet_all(&[mine], 1.0, |_| {}).remove(0).err().unwrap();
            let joined = meet_all(&worlds[1..], 1.0, |_| {}).remove(0).err().unwrap();
            [counted, joined].map(|e| e.to_string())
        });
        for error in refused.into_iter().flatten() {
            assert!(error.contains("a process of another user"), "{error}");
        }
        let rank_1 = meet_all(&worlds[1..], 60.0, |_| {}).remove(0);
        finish_all(vec![rank_0.join().unwrap(), rank_1]);
    });
}

#[test]
fn another_user_s_packets_decide_nothing() {
    let worlds = worlds(2);
    let port = ports(&worlds[0])[0];
    std::thread::scope(|scope| {
        let rank_0 = scope.spawn(|| meet_all(&worlds[..1], 60.0, |_| {}).remove(0));
        let sent = as_another_user(|| {
            let mut other_version = Greeting::new(worlds[0].token, 1, 2);
            other_version.version = *b"6.6.6\0\0\0\0\0\0\0\0\0\0\0";
            let greetings = [
                other_version,
                Greeting::new(worlds[0].token, 1, 3),
                Greeting::new(worlds[0].token, 0, 2),
            ];
            for greeting in greetings {
                let mut bytes = greeting.to_bytes([7; 32]).to_vec();
                bytes.extend([0; 32]);
                bytes.extend([1, 0, 0, 0, 0]);
                let mut stream = connect(port);
                let _ = stream.write_all(&bytes);
                let mut answer = Vec::new();
                // Nothing is said to it, and it is not kept waiting.
                let _ = stream.read_to_end(&mut answer);
                assert!(answer.is_empty());
            }
        });
        let rank_1 = meet_all(&worlds[1..], 60.0, |_| {}).remove(0);
        finish_all(vec![rank_0.join().unwrap(), rank_1]);
        assert!(sent.is_some() || !rustix::process::geteuid().is_root());
    });
}

#[test]
fn a_listener_of_another_user_gets_nothing() {
    let worlds = worlds(2);
    let Some(heard) = held_by_another_user(&ports(&worlds[0])[..3]) else {
        return;
    };
    finish_all(meet_all(&worlds, 60.0, |_| {}));
    assert_eq!(heard.load(Ordering::Relaxed), 0);
}

#[test]
fn ports_that_are_all_held_are_one_error_or_none() {
    let mut worlds = worlds(2);
    let Some(_) = held_by_another_user(&ports(&worlds[0])) else {
        return;
    };
    let start = Instant::now();
    let results = meet_all(&worlds[..1], 60.0, |_| {});
    let error = results
        .into_iter()
        .next()
        .unwrap()
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("7 others: Address already in use"),
        "{error}"
    );
    assert!(start.elapsed() < Duration::from_secs(30));
    // A secret leads to ports that nobody could hold.
    for world in &mut worlds {
        world.secret = Secret::of_key([3; 32]);
        world.add_unforeseeable_ports();
    }
    finish_all(meet_all(&worlds, 60.0, |_| {}));
}

#[test]
fn several_machines_need_a_secret() {
    let apart = |secret: &Secret| {
        let mut worlds = worlds(3);
        for world in &mut worlds {
            (world.local_size, world.secret) = (Some(1), secret.clone());
        }
        worlds
    };
    let none = Secret::none("HOME is not set");
    let error = one_error(meet_all(&apart(&none), 60.0, |_| {}));
    assert!(
        error.contains("(HOME is not set): set TANDEM_SECRET"),
        "{error}"
    );
    let some = Secret::of_key([5; 32]);
    finish_all(meet_all(&apart(&some), 60.0, |_| {}));
}

/// Carries bytes between two connections, as a machine in between would.
fn relay(from: &TcpListener, to: SocketAddr, carried: &AtomicU64) {
    for near in from.incoming().flatten() {
        let Ok(far) = TcpStream::connect(to) else {
            continue;
        };
        let pairs = [
            (near.try_clone().unwrap(), far.try_clone().unwrap()),
            (far, near),
        ];
        std::thread::scope(|scope| {
            for (mut a, mut b) in pairs {
                scope.spawn(move || {
                    let mut bytes = [0; 4096];
                    while let Ok(n @ 1..) = a.read(&mut bytes) {
                        carried.fetch_add(n as u64, Ordering::Relaxed);
                        if b.write_all(&bytes[..n]).is_err() {
                            break;
                        }
                    }
                    let _ = b.shutdown(Shutdown::Both);
                });
            }
        });
    }
}

#[test]
fn a_relay_between_two_ranks_carries_nothing_of_the_run() {
    let worlds = worlds(2);
    let candidates = ports(&worlds[0]);
    let carried = Arc::new(AtomicU64::new(0));
    let (ready, listens) = channel();
    let counter = carried.clone();
    std::thread::spawn(move || {
        as_another_user(|| {
            let listener = TcpListener::bind(("127.0.0.1", candidates[0])).unwrap();
            ready.send(()).unwrap();
            relay(&listener, ([127, 0, 0, 1], candidates[1]).into(), &counter);
        })
    });
    if listens.recv().is_err() {
        return;
    }
    finish_all(meet_all(&worlds, 60.0, |_| {}));
    assert_eq!(carried.load(Ordering::Relaxed), 0);
}
