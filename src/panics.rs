//! A panic is a defect of this program; it ends a run as any error does: one line, on one rank, and the others with it.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook};
use std::sync::Once;

use crate::{Error, Result, logging};

thread_local! {
    static CATCHING: Cell<bool> = const { Cell::new(false) };
    /// Where and why this thread has panicked last.
    static LAST: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs `f`; a panic inside it becomes its error, and prints nothing of its own. One on another thread is a line on stderr.
///
/// # Errors
/// Those of `f`.
pub fn caught<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        set_hook(Box::new(|info| {
            // Its first line says where, the second why.
            let text = info.to_string();
            if CATCHING.get() {
                LAST.with_borrow_mut(|last| *last = Some(text));
            } else {
                logging::say(format_args!("tandem: {}", error(&text)));
            }
        }));
    });
    let outer = CATCHING.replace(true);
    // The run ends with this error: nobody looks at what `f` has left half-done.
    let result = catch_unwind(AssertUnwindSafe(f));
    CATCHING.set(outer);
    result.unwrap_or_else(|panic| {
        // One that another thread has handed on has been shown by that thread.
        let handed_on = panic
            .downcast_ref::<&str>()
            .copied()
            .unwrap_or("a thread panicked");
        let text = LAST.take().unwrap_or_else(|| handed_on.to_owned());
        Err(error(&text))
    })
}

fn error(text: &str) -> Error {
    Error::failed(format!("internal error, please report it: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_of_one_line_that_says_where() {
        let error = caught::<()>(|| panic!("seven is {}", 7)).unwrap_err();
        let line = error.to_string();
        assert!(
            line.contains("panics.rs") && line.ends_with("seven is 7"),
            "{line}"
        );
        assert!(!line.contains('\n') && error.exit_code() == 1);
        assert_eq!(caught(|| Ok(1)).unwrap(), 1);
        assert!(caught::<()>(|| Err(Error::usage("no"))).is_err());
    }
}
