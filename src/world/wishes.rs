//! What a process still has to do when a signal or a lost rank ends it.

use std::sync::{Mutex, PoisonError};

type Wish = Box<dyn FnOnce() + Send>;

static WISHES: Mutex<Vec<Wish>> = Mutex::new(Vec::new());

/// Has `wish` carried out if this process ends before its main thread has come to its own end.
///
/// It runs on another thread, while the main thread may still be at work, and should be quick.
pub fn last_wish(wish: impl FnOnce() + Send + 'static) {
    let mut wishes = WISHES.lock().unwrap_or_else(PoisonError::into_inner);
    wishes.push(Box::new(wish));
}

/// Carries out every wish, once.
pub(super) fn grant() {
    let wishes = std::mem::take(&mut *WISHES.lock().unwrap_or_else(PoisonError::into_inner));
    wishes.into_iter().for_each(|wish| wish());
}
