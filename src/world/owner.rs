//! Whose process is at the other end of a connection, where that end is on this machine.
//!
//! The kernel lists every TCP socket with its owner. A connection has two sockets in that list, ours and the
//! peer's, which has the same two addresses the other way round. A peer on another machine has none.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

/// Who is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// A process of this user.
    Us,
    /// A process of another user on this machine.
    Stranger,
    /// A process elsewhere, or one that has not taken the connection yet.
    Unknown,
}

/// What the kernel's list says of one socket.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    local: SocketAddr,
    remote: SocketAddr,
    listens: bool,
    uid: u32,
    /// 0: no process has it (yet).
    inode: u64,
}

const LISTEN: &str = "0A";
/// User ids that this name space does not know appear as this one.
const OVERFLOW: u32 = 65534;

/// The owner of the socket at the other end of `stream`.
pub(super) fn of_peer(stream: &TcpStream) -> Owner {
    let (Ok(here), Ok(there)) = (stream.local_addr(), stream.peer_addr()) else {
        return Owner::Unknown;
    };
    let (here, there) = (canonical(here), canonical(there));
    let same_machine =
        here.ip() == there.ip() || (here.ip().is_loopback() && there.ip().is_loopback());
    // The list is not read in one piece: a socket can be missed while others come and go.
    let looks = if same_machine { 5 } else { 1 };
    for look in 0..looks {
        if look > 0 {
            std::thread::sleep(Duration::from_millis(2));
        }
        let rows = rows(|row| {
            row.listens && row.local.port() == there.port()
                || row.local == there && row.remote == here
        });
        let (listening, connected): (Vec<Row>, Vec<Row>) =
            rows.into_iter().partition(|r| r.listens);
        match connected.iter().find(|row| row.inode != 0) {
            Some(row) => return owner(row.uid),
            None if same_machine && all_are_strangers(&listening, there.ip()) => {
                return Owner::Stranger;
            }
            None => {}
        }
    }
    Owner::Unknown
}

/// Whether a listener of another user holds `address` here; one of ours beside it says that it does not.
pub(super) fn a_stranger_listens_at(address: SocketAddr) -> bool {
    let address = canonical(address);
    let rows = rows(|row| row.listens && row.local.port() == address.port());
    all_are_strangers(&rows, address.ip())
}

/// A connection that nobody has taken yet belongs to whoever listens.
fn all_are_strangers(listening: &[Row], ip: IpAddr) -> bool {
    let mut there = listening
        .iter()
        .filter(|row| row.local.ip() == ip || row.local.ip().is_unspecified())
        .peekable();
    there.peek().is_some() && there.all(|row| owner(row.uid) == Owner::Stranger)
}

fn owner(uid: u32) -> Owner {
    let us = rustix::process::geteuid().as_raw();
    match uid {
        OVERFLOW if us == OVERFLOW && !knows_all_users() => Owner::Unknown,
        uid if uid == us => Owner::Us,
        _ => Owner::Stranger,
    }
}

fn knows_all_users() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// The rows of this network's lists that are `wanted`.
fn rows(wanted: impl Fn(&Row) -> bool) -> Vec<Row> {
    let mut found = Vec::new();
    for list in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
        let Ok(file) = File::open(list) else { continue };
        let lines = BufReader::with_capacity(1 << 16, file).lines();
        let rows = lines.map_while(Result::ok).filter_map(|line| parse(&line));
        found.extend(rows.filter(&wanted));
    }
    found
}

fn parse(line: &str) -> Option<Row> {
    let mut words = line.split_whitespace().skip(1);
    let (local, remote) = (address(words.next()?)?, address(words.next()?)?);
    let listens = words.next()? == LISTEN;
    let uid = words.nth(3)?.parse().ok()?;
    let inode = words.nth(1)?.parse().ok()?;
    Some(Row {
        local,
        remote,
        listens,
        uid,
        inode,
    })
}

/// `0100007F:1F90`: words of 32 bits as they lie in memory, each as a number of this machine.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |i: usize| {
        let digits = ip.get(8 * i..8 * i + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    let ip = match ip.len() {
        8 => IpAddr::from(Ipv4Addr::from(word(0)?)),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?];
            let octets: [u8; 16] = words.concat().try_into().ok()?;
            IpAddr::from(Ipv6Addr::from(octets))
        }
        _ => return None,
    };
    Some(canonical(SocketAddr::new(ip, port)))
}

/// The same address in one form: a socket for both families shows IPv4 as IPv6.
pub(super) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn rows_are_read_in_both_families() {
        let row = parse(
            "   7: 0100007F:ABFD 0100007F:EC0E 01 00000000:00000000 03:00000398 00000000  1000        0 4711 3 0000000086e153a3",
        )
        .unwrap();
        assert_eq!((row.uid, row.inode, row.listens), (1000, 4711, false));
        assert_eq!(row.local, "127.0.0.1:44029".parse().unwrap());
        let mapped = address("0000000000000000FFFF00000100007F:1F90").unwrap();
        assert_eq!(mapped, "127.0.0.1:8080".parse().unwrap());
        let six = address("00000000000000000000000001000000:0016").unwrap();
        assert_eq!(six, "[::1]:22".parse().unwrap());
        for bad in [
            "",
            "sl local_address rem_address st",
            "0: 0100007F 01",
            "0: é:1 é:1 01 a b c 1 2 3",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_other_end_is_ours_once_it_is_taken() {
        for place in ["127.0.0.1:0", "[::1]:0", "[::]:0", "0.0.0.0:0"] {
            let Ok(listener) = TcpListener::bind(place) else {
                continue;
            };
            let port = listener.local_addr().unwrap().port();
            let ip: IpAddr = match place {
                "[::1]:0" => "::1".parse().unwrap(),
                _ => "127.0.0.1".parse().unwrap(),
            };
            let Ok(to) = TcpStream::connect((ip, port)) else {
                continue;
            };
            assert_eq!(of_peer(&to), Owner::Unknown, "{place}: not taken yet");
            assert!(!a_stranger_listens_at(SocketAddr::new(ip, port)));
            let (from, _) = listener.accept().unwrap();
            assert_eq!(of_peer(&from), Owner::Us, "{place}");
            assert_eq!(of_peer(&to), Owner::Us, "{place}");
        }
    }

    #[test]
    fn another_number_is_a_stranger() {
        let us = rustix::process::geteuid().as_raw();
        assert_eq!(owner(us), Owner::Us);
        assert_eq!(owner(us + 1), Owner::Stranger);
        let row = |uid, local: &str| Row {
            local: local.parse().unwrap(),
            remote: "0.0.0.0:0".parse().unwrap(),
            listens: true,
            uid,
            inode: 1,
        };
        let ip = "127.0.0.1".parse().unwrap();
        assert!(all_are_strangers(&[row(us + 1, "0.0.0.0:9")], ip));
        assert!(!all_are_strangers(&[row(us + 1, "10.0.0.1:9")], ip));
        assert!(!all_are_strangers(
            &[row(us + 1, "0.0.0.0:9"), row(us, "127.0.0.1:9")],
            ip
        ));
        assert!(!all_are_strangers(&[], ip));
    }
}
