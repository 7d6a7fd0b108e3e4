//! What goes to stderr besides the answer: log lines tagged with rank and host, and a progress bar on a terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::fmt;
use std::io::{IsTerminal, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// `rank 2 of 4 (node07)`, once known and if there is more than one.
static TAG: OnceLock<String> = OnceLock::new();

/// Puts a line on stderr, in one write, so that the lines of several ranks do not mix.
///
/// Where stderr cannot be written (a full disk, a reader that has gone) the line is lost, and nothing else.
pub fn say(line: impl fmt::Display) {
    show(&format!("{line}\n"));
}

/// The same without a line break: the prompt of a conversation.
pub fn show(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Whether another rank is the first.
static NOT_FIRST: AtomicBool = AtomicBool::new(false);

/// Warns of what every rank finds alike: the first one says it.
pub fn said_by_one(what: fmt::Arguments<'_>) {
    if !NOT_FIRST.load(Ordering::Relaxed) {
        tracing::warn!("{what}");
    }
}

/// Names this rank in every later log line.
pub fn set_rank(rank: usize, size: usize) {
    NOT_FIRST.store(rank > 0, Ordering::Relaxed);
    if size > 1 {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        // Called once a process; a second call would carry the same tag.
        let _ = TAG.set(format!("[rank {rank}/{size} {}] ", host.trim()));
    }
}

/// Sends log lines to stderr: warnings, with `-v` what happens, with `-vv` every detail; `TANDEM_LOG` overrides.
pub fn init(verbose: u8) {
    let level = match verbose {
        0 => "tandem=warn",
        1 => "tandem=info",
        2 => "tandem=debug",
        _ => "tandem=trace",
    };
    let filter = std::env::var("TANDEM_LOG").unwrap_or_else(|_| level.to_string());
    let filter = tracing_subscriber::EnvFilter::try_new(&filter).unwrap_or_else(|_| level.into());
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // It would tell stderr that stderr cannot be written, and panic.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    // Fails only when a subscriber is set already, as in tests.
    let _ = subscriber.event_format(Line).try_init();
}

struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut w: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write!(w, "tandem: {}", TAG.get().map_or("", String::as_str))?;
        match *event.metadata().level() {
            Level::WARN => write!(w, "warning: ")?,
            Level::ERROR => write!(w, "error: ")?,
            _ => {}
        }
        ctx.field_format().format_fields(w.by_ref(), event)?;
        writeln!(w)
    }
}

/// A progress bar over bytes; silent where stderr is not a terminal or `show` is false.
pub fn byte_bar(total: u64, show: bool) -> ProgressBar {
    if !show || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    if let Ok(style) =
        ProgressStyle::with_template("loading {bar:40} {bytes}/{total_bytes} {bytes_per_sec}")
    {
        bar.set_style(style);
    }
    bar
}
