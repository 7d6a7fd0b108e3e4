//! Ctrl-C and its kin: the other ranks are told before this process ends.

use std::io::{self, Read};
use std::os::fd::IntoRawFd;
use std::sync::atomic::{AtomicI32, Ordering};

const WATCHED: [i32; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

static PIPE: AtomicI32 = AtomicI32::new(-1);

/// Calls `before_end` with the first such signal, then ends by it, as without a handler; a second one ends at once.
///
/// Signals that this process was started with ignoring (`nohup`) stay ignored.
pub(super) fn watch(before_end: impl FnOnce(i32) + Send + 'static) -> io::Result<()> {
    let (mut reader, writer) = io::pipe()?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let mut signal = [0];
            if reader.read_exact(&mut signal).is_ok() {
                let signal = i32::from(signal[0]);
                set_default();
                super::wishes::grant();
                before_end(signal);
                // SAFETY: takes a plain integer; the default action ends the process.
                unsafe { libc::raise(signal) };
            }
        })?;
    PIPE.store(writer.into_raw_fd(), Ordering::Release);
    for signal in WATCHED {
        install(signal)?;
    }
    Ok(())
}

extern "C" fn note(signal: i32) {
    let byte = signal as u8;
    // SAFETY: `write` may be called in a signal handler; the byte outlives the call, and a full or closed pipe
    // only loses the note. `errno` is put back for the code that was interrupted.
    unsafe {
        let errno = *libc::__errno_location();
        libc::write(PIPE.load(Ordering::Acquire), (&raw const byte).cast(), 1);
        *libc::__errno_location() = errno;
    }
}

fn install(signal: i32) -> io::Result<()> {
    // SAFETY: both structures are plain data that live through the calls, and `note` is a handler that keeps to
    // what a handler may do.
    unsafe {
        let mut old: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(signal, std::ptr::null(), &mut old) != 0 {
            return Err(io::Error::last_os_error());
        }
        if old.sa_sigaction == libc::SIG_IGN {
            return Ok(());
        }
        let mut new: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = note as *const () as usize;
        new.sa_flags = libc::SA_RESTART;
        if libc::sigaction(signal, &new, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn set_default() {
    for signal in WATCHED {
        // SAFETY: plain integers; only handlers that `install` set are replaced, ignored signals stay so.
        unsafe {
            let mut old: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, std::ptr::null(), &mut old);
            if old.sa_sigaction == note as *const () as usize {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
    }
}

/// `SIGTERM` for 15.
pub(super) fn name(signal: u8) -> String {
    match i32::from(signal) {
        libc::SIGINT => "SIGINT".into(),
        libc::SIGTERM => "SIGTERM".into(),
        libc::SIGHUP => "SIGHUP".into(),
        other => format!("signal {other}"),
    }
}
