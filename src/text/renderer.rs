//! Chat templates are programs from strangers: a process of its own runs them, with limits of memory, stack and time.
//!
//! No limit inside the engine bounds its native stack, and none bounds what a single operation allocates. The process is
//! this program again, under another name (see [`serve_if_asked`]). It answers one [`Rendering`] after the other over
//! a socket, each message its length and its bytes, and ends when nothing is asked for a while.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use minijinja::Environment;
use minijinja::value::Serde;
use rustix::process::{Resource, Rlimit, Signal, getrlimit, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::guard::guarded;
use super::jinja;

/// The process's name, and its one argument. Programs that have this library without [`serve_if_asked`] know neither.
const NAME: &str = "tandem-templates";
const ARGUMENT: &str = "render-chat-templates";

/// Memory of one rendering, beyond what the program and the messages themselves take.
const MEMORY: u64 = 512 << 20;
/// Bytes of memory for each byte of a message: text, parsed, and as the template's own values.
const MEMORY_PER_BYTE: u64 = 32;
/// Native stack: a template within the engine's own limits of depth takes a few MiB.
const STACK: usize = 64 << 20;
/// Time for one rendering; most take about a millisecond.
const TIME: Duration = Duration::from_secs(10);
/// The process ends after so long without work: most runs render all of their prompts at once.
const IDLE: Duration = Duration::from_secs(2);
/// Longest text that a template may make: several times what can be tokenized.
const MAX_RENDERED: usize = 64 << 20;

/// Characters of an error; a template may raise one of any length.
const MAX_MESSAGE: usize = 2000;

/// A template and its variables.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Rendering {
    /// The template itself.
    pub source: String,
    /// Name and JSON text of each variable: apart, so that none is nested deeper on the way than it came.
    pub variables: Vec<(String, String)>,
}

/// Runs templates; the process is started when it is first needed, and again when it has ended.
#[derive(Default)]
pub(super) struct Renderer(Mutex<Option<Worker>>);

impl Renderer {
    /// The rendered text, or what is wrong with the template.
    pub(super) fn render(&self, rendering: &Rendering) -> Result<String, String> {
        if cfg!(test) {
            // A test program cannot serve; the tests of the limits run the real one.
            return Server::default().answer(rendering);
        }
        let message = postcard::to_stdvec(rendering).map_err(|e| e.to_string())?;
        let mut place = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // One that has served before may have ended since, or have died of what earlier templates left in its memory.
        let kept = place.take();
        if let Some(Ok(done)) = kept.map(|worker| worker.ask(&message)) {
            let (answer, worker) = done;
            *place = worker;
            return answer;
        }
        let worker = Worker::start().map_err(|e| {
            format!("cannot start the process that renders it (/proc/self/exe): {e}")
        })?;
        let (answer, worker) = worker.ask(&message).unwrap_or_else(|why| (Err(why), None));
        *place = worker;
        answer
    }
}

/// The process, seen from here.
struct Worker {
    socket: UnixStream,
    process: Child,
}

impl Worker {
    fn start() -> io::Result<Self> {
        let (socket, theirs) = UnixStream::pair()?;
        // Not `current_exe`: this name still leads to the program when its file has been replaced. And no `pre_exec`,
        // so that nothing of this process is copied, which may hold much memory.
        let process = Command::new("/proc/self/exe")
            .arg0(NAME)
            .arg(ARGUMENT)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self { socket, process })
    }

    /// The answer, with the process unless it is of no further use; or how it ended without one.
    fn ask(mut self, message: &[u8]) -> Result<(Result<String, String>, Option<Self>), String> {
        let until = Instant::now() + TIME;
        let reply = send(&mut self.socket, message, until)
            .and_then(|()| receive(&mut self.socket, MAX_RENDERED + 64, until));
        match reply {
            Ok(Some(reply)) => {
                let answer = postcard::from_bytes(&reply).map_err(|e| e.to_string())?;
                Ok((answer, Some(self)))
            }
            Err(e) if is_late(&e) => Ok((Err(too_slow()), None)),
            Ok(None) | Err(_) => Err(self.end()),
        }
    }

    fn end(mut self) -> String {
        let Ok(status) = self.process.wait() else {
            return "the process that renders it is gone".into();
        };
        match status.signal() {
            Some(libc::SIGXCPU) => too_slow(),
            Some(signal) => format!(
                "it takes more than {} MiB of memory or {} MiB of stack (the process that renders it ended with signal {signal})",
                MEMORY >> 20,
                STACK >> 20
            ),
            None => format!("the process that renders it ended without an answer ({status})"),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have ended already, or have been waited for.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn too_slow() -> String {
    format!("it takes more than {} seconds", TIME.as_secs())
}

fn is_late(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

fn send(socket: &mut UnixStream, message: &[u8], until: Instant) -> io::Result<()> {
    socket.set_write_timeout(Some(left(until)?))?;
    socket.write_all(&(message.len() as u64).to_le_bytes())?;
    socket.write_all(message)
}

/// The next message; none when the other side has closed.
fn receive(socket: &mut UnixStream, limit: usize, until: Instant) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 8];
    if !read_exact(socket, &mut length, until)? {
        return Ok(None);
    }
    let length = usize::try_from(u64::from_le_bytes(length)).unwrap_or(usize::MAX);
    if length > limit {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut message = vec![0; length];
    Ok(read_exact(socket, &mut message, until)?.then_some(message))
}

/// Fills `buffer` in time; false when the other side closes first.
fn read_exact(socket: &mut UnixStream, buffer: &mut [u8], until: Instant) -> io::Result<bool> {
    let mut filled = 0;
    while filled < buffer.len() {
        socket.set_read_timeout(Some(left(until)?))?;
        match socket.read(&mut buffer[filled..]) {
            Ok(0) => return Ok(false),
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(true)
}

fn left(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(left)
}

/// Becomes the process that renders templates, if that is what this one was started for; `main` asks this first.
pub fn serve_if_asked() -> Option<ExitCode> {
    let mut args = std::env::args_os();
    let asked =
        args.next()? == NAME && args.next().is_some_and(|a| a == ARGUMENT) && args.next().is_none();
    asked.then(|| match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    })
}

fn serve() -> io::Result<()> {
    // Where this cannot be had, the closed socket ends the process all the same.
    let _ = set_parent_process_death_signal(Some(Signal::KILL));
    lower(Resource::Core, 0);
    let mut socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let serving = move || -> io::Result<()> {
        let base = address_space();
        let mut server = Server::default();
        loop {
            match receive(&mut socket, usize::MAX, Instant::now() + IDLE) {
                Ok(Some(message)) => {
                    limit(base, message.len());
                    let answer = postcard::from_bytes(&message)
                        .map_err(|e| e.to_string())
                        .and_then(|rendering| server.answer(&rendering));
                    let reply = postcard::to_stdvec(&answer).map_err(io::Error::other)?;
                    send(&mut socket, &reply, Instant::now() + TIME)?;
                }
                Ok(None) => return Ok(()),
                Err(e) if is_late(&e) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
    };
    std::thread::Builder::new()
        .stack_size(STACK)
        .spawn(serving)?
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("a panic")))
}

/// Limits of the next rendering. All counts from the start: what earlier templates leave behind does not add up.
fn limit(base: u64, message: usize) {
    let memory = MEMORY + MEMORY_PER_BYTE.saturating_mul(message as u64);
    lower(Resource::As, base.saturating_add(memory));
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    lower(Resource::Cpu, used.tv_sec as u64 + TIME.as_secs() + 1);
}

/// Sets a limit as far as this process may; one that cannot be set leaves the others.
fn lower(resource: Resource, value: u64) {
    let maximum = getrlimit(resource).maximum;
    let current = Some(maximum.map_or(value, |most| value.min(most)));
    let _ = rustix::process::setrlimit(resource, Rlimit { current, maximum });
}

/// Address space of this process in bytes.
fn address_space() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status.lines().find_map(|line| {
        line.strip_prefix("VmSize:")?
            .split_whitespace()
            .next()?
            .parse()
            .ok()
    });
    kib.unwrap_or(256 << 10) << 10
}

/// Renders; the last template stays compiled, since a batch has one.
#[derive(Default)]
struct Server(Option<(String, Environment<'static>)>);

impl Server {
    fn answer(&mut self, rendering: &Rendering) -> Result<String, String> {
        guarded(|| self.render(rendering))
            .unwrap_or_else(|panic| {
                self.0 = None;
                Err(panic)
            })
            .map_err(|what| what.chars().take(MAX_MESSAGE).collect())
    }

    fn render(&mut self, rendering: &Rendering) -> Result<String, String> {
        let mut variables = Map::new();
        for (name, json) in &rendering.variables {
            let value: Value = serde_json::from_str(json).map_err(|e| format!("{name}: {e}"))?;
            variables.insert(name.clone(), value);
        }
        if self
            .0
            .as_ref()
            .is_none_or(|(source, _)| *source != rendering.source)
        {
            let environment =
                jinja::environment(&rendering.source).map_err(|e| jinja::describe(&e))?;
            self.0 = Some((rendering.source.clone(), environment));
        }
        let Some((_, environment)) = &self.0 else {
            return Ok(String::new());
        };
        let text = environment
            .get_template(jinja::TEMPLATE)
            .and_then(|t| t.render(Serde(&variables)))
            .map_err(|e| jinja::describe(&e))?;
        if text.len() > MAX_RENDERED {
            return Err(format!(
                "it makes more than {} MiB of text",
                MAX_RENDERED >> 20
            ));
        }
        Ok(text)
    }
}
