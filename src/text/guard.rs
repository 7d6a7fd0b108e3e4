//! A library that panics on strange input, made to return an error instead.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

thread_local! {
    /// Panics of this thread are being caught and will be reported as errors.
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`; a panic inside it becomes its message, and prints nothing.
///
/// The tokenizers crate panics where `tokenizer.json` contradicts itself and where a regular expression gives up
/// on a text. Neither is a defect of this program, so neither may look like one.
pub(super) fn guarded<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    static QUIET_HOOK: Once = Once::new();
    QUIET_HOOK.call_once(|| {
        let print = take_hook();
        set_hook(Box::new(move |info| {
            if !GUARDED.get() {
                print(info);
            }
        }));
    });
    let outer = GUARDED.replace(true);
    // What `f` leaves half-done is dropped with the error: callers give it nothing that outlives a failure.
    let result = catch_unwind(AssertUnwindSafe(f));
    GUARDED.set(outer);
    result.map_err(|panic| {
        let text = panic.downcast_ref::<&str>().copied();
        let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        text.unwrap_or("unknown failure").to_owned()
    })
}

/// Runs `f` as [`guarded`] does, and gives up waiting for it after `patience`.
///
/// The thread that is given up ends with the program: nothing can stop a regular expression from outside.
pub(super) fn in_time<T: Send + 'static>(
    patience: Duration,
    f: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    let (send, receive) = channel();
    std::thread::Builder::new()
        .name("tokenizer".into())
        .spawn(move || send.send(guarded(f)))
        .map_err(|e| format!("cannot start a thread: {e}"))?;
    receive.recv_timeout(patience).unwrap_or_else(|e| match e {
        RecvTimeoutError::Timeout => Err(format!(
            "its rules take more than {:.0} seconds",
            patience.as_secs_f64()
        )),
        RecvTimeoutError::Disconnected => Err("its thread ended".into()),
    })
}
