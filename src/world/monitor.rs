//! One end for all ranks.
//!
//! Each control connection has a thread that does nothing but listen, so that the end of a rank is noticed at
//! once, whatever the main thread is doing. What is wrong is settled on rank 0: it waits a moment for the others
//! to say their part, picks the cause (what a rank said before what a closed connection suggests, the lowest
//! rank first), tells all, and shows it. When rank 0 itself ends without a word, each rank speaks for itself.
//!
//! A rank that is stopped, or whose machine is gone, closes nothing. So each rank has one more thread, which sends
//! a sign of life every second, whatever the main thread is doing, and counts how long the others have sent none. It
//! counts its own turns, not the time: while this process is stopped itself, it blames nobody.

use std::collections::BTreeMap;
use std::io;
use std::net::TcpStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::group::{End, MeetOptions};
use super::hello::{self, Failure};
use super::link::{Link, Listening};
use super::meet::Verdict;
use super::wire::{self, Kind};
use super::{Children, Source, World, signals, spawn};
use crate::{Error, Result};

/// How long rank 0 listens for further causes before it decides which one counts.
pub(super) const SETTLE: Duration = Duration::from_millis(400);
/// How long rank 0 waits until the others have heard the verdict and gone.
pub(super) const FAREWELL: Duration = Duration::from_secs(2);
/// How long a failing rank waits for rank 0's verdict.
pub(super) const HEARING: Duration = Duration::from_secs(4);
/// How long rank 0 waits for the others at the orderly end.
const GOODBYE: Duration = Duration::from_secs(10);
/// Time between two signs of life, one turn of the watching thread.
const TURN: Duration = Duration::from_secs(1);
/// So many turns without a sign of life, and a rank counts as lost: more than a loaded machine makes a thread wait.
const SILENCE: u32 = 14;
/// How long a message may wait for a rank that reads nothing: until its silence has been noticed.
const UNREAD: Duration = Duration::from_secs(2 * SILENCE as u64);

/// What the main thread and the threads of the connections share.
pub(super) struct Shared {
    pub rank: usize,
    pub hosts: Vec<String>,
    /// Rank 0: to every other rank. The others: to rank 0. By rank.
    pub links: Vec<Option<Link>>,
    children: Option<Arc<Children>>,
    /// Rank 0's process has started this one.
    is_child: bool,
    settle: Duration,
    end: End,
    /// Turns of the watching thread.
    turns: AtomicU32,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Rank 0: what has gone wrong, by rank.
    causes: BTreeMap<usize, Cause>,
    /// Somebody is ending this process; whoever comes later leaves it to them.
    claimed: bool,
    /// Rank 0: the watching thread is to decide on one error and end the run.
    to_decide: bool,
    /// There is nothing left to watch.
    over: bool,
    /// A signal ends this process, as soon as rank 0 has told the others.
    signalled: bool,
    /// Rank 0 has told the others.
    told: bool,
    /// The other ranks: rank 0's verdict.
    verdict: Option<u8>,
    /// Said goodbye, by rank.
    bye: Vec<bool>,
    /// Closed their connection, by rank.
    gone: Vec<bool>,
}

enum Cause {
    Said {
        code: u8,
        line: String,
    },
    Lost {
        how: String,
    },
    /// Nothing to show (a signal, a closed pipe): everybody leaves with this code.
    Quiet(u8),
}

/// A closed connection is an ended process; one that times out is an ended machine or network.
fn how_it_ended(peer: usize, error: Option<io::Error>) -> &'static str {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    let Some(error) = error else {
        return "sent something that is no message";
    };
    tracing::debug!("the connection to rank {peer} ended: {error}");
    match error.kind() {
        UnexpectedEof | ConnectionReset | BrokenPipe => "ended without a word (killed?)",
        _ => "is out of reach (machine or network down?)",
    }
}

impl Shared {
    pub fn new(
        rank: usize,
        hosts: Vec<String>,
        links: Vec<Option<Link>>,
        world: &World,
        options: &MeetOptions,
    ) -> Self {
        let size = hosts.len();
        Shared {
            rank,
            hosts,
            links,
            children: world.children.clone(),
            is_child: world.source == Source::Local && rank > 0,
            settle: options.settle,
            end: options.end.clone(),
            turns: AtomicU32::new(0),
            state: Mutex::new(State {
                bye: vec![false; size],
                gone: vec![false; size],
                ..State::default()
            }),
            changed: Condvar::new(),
        }
    }

    pub fn start(
        world: &World,
        hosts: Vec<String>,
        controls: Vec<Option<TcpStream>>,
        options: &MeetOptions,
    ) -> Result<(Arc<Self>, Receiver<Vec<u8>>)> {
        let failed = |e: io::Error| Error::failed(format!("cannot watch the ranks: {e}"));
        let mut links = Vec::new();
        for stream in controls {
            if let Some(stream) = &stream {
                stream.set_read_timeout(None).map_err(failed)?;
                stream.set_write_timeout(Some(UNREAD)).map_err(failed)?;
            }
            links.push(stream.map(Link::new));
        }
        let shared = Arc::new(Shared::new(world.rank, hosts, links, world, options));
        let (sender, inbox) = channel();
        for peer in 0..shared.links.len() {
            if shared.links[peer].is_some() {
                let (shared, sender) = (shared.clone(), sender.clone());
                std::thread::Builder::new()
                    .name(format!("rank {peer}"))
                    .spawn(move || shared.listen_to(peer, sender))
                    .map_err(failed)?;
            }
        }
        let watching = shared.clone();
        std::thread::Builder::new()
            .name("watch".into())
            .spawn(move || watching.watch())
            .map_err(failed)?;
        if options.signals {
            let shared = shared.clone();
            signals::watch(move |signal| shared.leave_by(signal)).map_err(failed)?;
        }
        Ok((shared, inbox))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done`, for at most `patience`.
    fn wait(&self, patience: Duration, done: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let until = Instant::now() + patience;
        let mut state = self.lock();
        while !done(&state) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = match self.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        state
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Whether the caller is the one who ends this process.
    fn claim(&self) -> bool {
        !std::mem::replace(&mut self.lock().claimed, true)
    }

    /// The thread of one control connection.
    fn listen_to(self: Arc<Self>, peer: usize, inbox: Sender<Vec<u8>>) {
        let Some(link) = &self.links[peer] else {
            return;
        };
        let mut inbox = Some(inbox);
        let mut listening = Listening {
            link,
            turns: &self.turns,
        };
        loop {
            match wire::read_frame(&mut listening, wire::MAX_FRAME) {
                Ok((Kind::Beat, _)) => {}
                Ok((Kind::Data, message)) if self.rank != 0 => {
                    if let Some(inbox) = &inbox {
                        let _ = inbox.send(message);
                    }
                }
                Ok((Kind::Fail, body)) => {
                    let verdict = postcard::from_bytes(&body).unwrap_or_else(|e| Verdict {
                        code: 1,
                        line: format!("its last word does not decode: {e}"),
                    });
                    self.heard(peer, verdict);
                }
                Ok((Kind::Bye, _)) => {
                    self.change(|state| state.bye[peer] = true);
                    inbox = None;
                }
                other => {
                    let how = how_it_ended(peer, other.err());
                    self.change(|state| state.gone[peer] = true);
                    self.lost(peer, how);
                    return;
                }
            }
        }
    }

    fn heard(self: &Arc<Self>, peer: usize, Verdict { code, line }: Verdict) {
        if self.rank == 0 {
            return self.report(peer, Cause::Said { code, line });
        }
        tracing::debug!("rank 0 says: {line}");
        self.change(|state| state.verdict = Some(code));
        if self.claim() {
            (self.end)(&Error::Told(code));
        }
    }

    fn lost(self: &Arc<Self>, peer: usize, how: &'static str) {
        let state = self.lock();
        if state.bye[peer] || state.causes.contains_key(&peer) || state.verdict.is_some() {
            return;
        }
        drop(state);
        if self.rank == 0 {
            let how = how.to_owned();
            self.report(peer, Cause::Lost { how });
        } else if self.claim() {
            (self.end)(&self.without_a_word(peer, how));
        }
    }

    /// The thread that shows that this rank is alive, notices who is not, and on rank 0 decides: when it comes to
    /// that, there may be no thread to be had.
    fn watch(self: Arc<Self>) {
        loop {
            let state = self.wait(TURN, |state| state.to_decide || state.over);
            let (to_decide, over) = (state.to_decide, state.over || state.claimed);
            drop(state);
            if to_decide {
                let error = self.decide();
                if !self.lock().signalled {
                    (self.end)(&error);
                }
            }
            if to_decide || over {
                return;
            }
            let turn = 1 + self.turns.fetch_add(1, Ordering::Relaxed);
            for (peer, link) in self.links.iter().enumerate() {
                let Some(link) = link else { continue };
                link.offer(Kind::Beat, &[]);
                let silent = turn.wrapping_sub(link.heard.load(Ordering::Relaxed));
                if silent >= SILENCE {
                    self.missed(peer);
                }
            }
        }
    }

    /// A rank has shown no sign of life for too long.
    fn missed(self: &Arc<Self>, peer: usize) {
        let mut state = self.lock();
        if state.bye[peer] || state.gone[peer] || state.verdict.is_some() || state.claimed {
            return;
        }
        // Rank 0 waits for it no longer; the others may yet get it going.
        state.gone[peer] = self.rank == 0;
        drop(state);
        let how = format!(
            "has shown no sign of life for {} s (stopped, or its machine is down?)",
            (SILENCE * TURN).as_secs()
        );
        if self.rank == 0 {
            return self.report(peer, Cause::Lost { how });
        }
        if !self.claim() {
            return;
        }
        let error = self.without_a_word(peer, &how);
        if self.is_child {
            // Rank 0 has the terminal: it goes on, to show what has ended the run.
            spawn::resume_parent();
            if let Some(code) = self.ask_rank_0(&Verdict::of(&error)) {
                return (self.end)(&Error::Told(code));
            }
        }
        (self.end)(&error);
    }

    fn without_a_word(&self, rank: usize, how: &str) -> Error {
        let host = &self.hosts[rank];
        let children = self.children.as_ref();
        match children.and_then(|c| c.end_of(rank, Duration::from_millis(500))) {
            Some(how) => Error::failed(format!("rank {rank} ({host}) {how}")),
            None => Error::failed(format!("rank {rank} ({host}) {how}")),
        }
    }

    /// Rank 0: notes a cause; the first one calls for a verdict. Whoever reports goes on listening, to see the others
    /// leave.
    fn report(self: &Arc<Self>, rank: usize, cause: Cause) {
        self.change(|state| {
            state.causes.entry(rank).or_insert(cause);
            state.to_decide |= !std::mem::replace(&mut state.claimed, true);
        });
    }

    /// Rank 0: settles on one error, tells all, waits until they have gone.
    fn decide(&self) -> Error {
        let quiet = |state: &State| matches!(state.causes.get(&0), Some(Cause::Quiet(_)));
        let state = self.wait(self.settle, |state| {
            quiet(state) || state.causes.len() == self.hosts.len()
        });
        let (mut said, mut ended, mut lost) = (Vec::new(), None, None);
        for (&rank, cause) in state.causes.iter().rev() {
            match cause {
                // A signal's code: less of a cause than what a rank found wrong.
                Cause::Said { code, line } if *code > 128 => {
                    let host = &self.hosts[rank];
                    ended = Some(Error::failed(format!("rank {rank} ({host}) {line}")));
                }
                Cause::Said { code, line } => said.push(Failure {
                    rank,
                    host: self.hosts[rank].clone(),
                    code: *code,
                    line: line.clone(),
                }),
                Cause::Lost { how } => lost = Some((rank, how.clone())),
                Cause::Quiet(_) => {}
            }
        }
        let quiet_code = match state.causes.get(&0) {
            Some(Cause::Quiet(code)) => Some(*code),
            _ => None,
        };
        drop(state);
        let error = quiet_code
            .map(Error::Told)
            .or_else(|| hello::root_cause(&said, self.hosts.len()))
            .or(ended)
            .or_else(|| lost.map(|(rank, how)| self.without_a_word(rank, &how)))
            .unwrap_or_else(|| Error::failed("the run has ended"));
        self.tell_all(&error);
        self.change(|state| state.told = true);
        error
    }

    fn tell_all(&self, error: &Error) {
        let Ok(body) = postcard::to_allocvec(&Verdict::of(error)) else {
            return;
        };
        let gone = self.lock().gone.clone();
        for (rank, link) in self.links.iter().enumerate() {
            let Some(link) = link else { continue };
            let _ = link.stream.set_write_timeout(Some(FAREWELL));
            // One that is stopped reads it when it goes on.
            if gone[rank] {
                link.offer(Kind::Fail, &body);
            } else if let Err(e) = link.send(Kind::Fail, &body) {
                tracing::debug!("a rank could not be told: {e}");
            }
            let _ = link.stream.shutdown(std::net::Shutdown::Write);
        }
        drop(self.wait(FAREWELL, |state| {
            state
                .gone
                .iter()
                .enumerate()
                .all(|(r, gone)| r == 0 || *gone)
        }));
    }

    pub fn fail(&self, error: Error) -> Error {
        if self.hosts.len() == 1 {
            return error;
        }
        let cause = match &error {
            Error::Told(_) if self.rank != 0 => return error,
            Error::Told(code) => Cause::Quiet(*code),
            other => Cause::Said {
                code: other.exit_code(),
                line: other.to_string(),
            },
        };
        self.change(|state| {
            state.causes.entry(self.rank).or_insert(cause);
        });
        if !self.claim() {
            // A thread of the group is ending this process, with the cause that counts.
            std::thread::sleep(HEARING);
            return Error::Told(error.exit_code());
        }
        if self.rank == 0 {
            return self.decide();
        }
        match self.ask_rank_0(&Verdict::of(&error)) {
            Some(code) => Error::Told(code),
            None => error,
        }
    }

    /// Another rank hands its last word to rank 0 and gets the verdict; `None` without a rank 0 to give it.
    fn ask_rank_0(&self, word: &Verdict) -> Option<u8> {
        let body = postcard::to_allocvec(word).ok()?;
        self.links[0].as_ref()?.send(Kind::Fail, &body).ok()?;
        self.wait(HEARING, |state| state.verdict.is_some() || state.gone[0])
            .verdict
    }

    /// On the way out by a signal: rank 0 sends all home, another rank says why it leaves.
    fn leave_by(&self, signal: i32) {
        let code = 128 + signal as u8;
        self.change(|state| {
            state.signalled = true;
            state.causes.insert(self.rank, Cause::Quiet(code));
        });
        if !self.claim() {
            drop(self.wait(FAREWELL, |state| state.told));
        } else if self.rank == 0 {
            self.decide();
        } else {
            let line = format!("was ended by {}", signals::name(signal as u8));
            self.ask_rank_0(&Verdict { code, line });
        }
    }

    pub fn finish(&self) -> Result<()> {
        if self.rank != 0 {
            if let Some(link) = &self.links[0] {
                let _ = link.send(Kind::Bye, &[]);
            }
            drop(self.wait(GOODBYE, |state| state.bye[0] || state.gone[0]));
            self.change(|state| state.over = true);
            return Ok(());
        }
        let all = |state: &State| state.bye.iter().skip(1).all(|bye| *bye);
        if !all(&self.wait(GOODBYE, all)) {
            tracing::debug!("not every rank has said goodbye");
        }
        self.lock().bye.fill(true);
        self.change(|state| state.over = true);
        for link in self.links.iter().flatten() {
            let _ = link.send(Kind::Bye, &[]);
        }
        match &self.children {
            Some(children) => children.join(Duration::from_secs(5)),
            None => Ok(()),
        }
    }
}
