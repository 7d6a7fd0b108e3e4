//! The one error type: each variant renders as one line that says what, where, and what to do.

use std::path::{Path, PathBuf};

/// What can go wrong, worded for the person at the terminal.
///
/// `main` prints it once ([`Error::Told`] not at all) and ends with its [`Error::exit_code`].
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The command line asks for something that cannot be (exit code 2).
    #[error("{0}")]
    Usage(String),
    /// A file or folder is missing, unreadable, or not what it should be.
    #[error("{}: {what}", path.display())]
    File {
        /// The file or folder at fault.
        path: PathBuf,
        /// What is wrong with it and what to do, one line.
        what: String,
    },
    /// A tensor-parallel rank failed, or the ranks do not agree.
    #[error("rank {rank} ({host}): {what}")]
    Rank {
        /// The failing rank.
        rank: usize,
        /// Its host name.
        host: String,
        /// Its own error, one line.
        what: String,
    },
    /// Rank 0 shows the error, or there is nothing to show: end with this exit code and print nothing.
    #[error("rank 0 has shown the error")]
    Told(u8),
    /// Anything else, already worded for the terminal.
    #[error("{0}")]
    Failed(String),
}

/// `Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A [`Error::Usage`] from anything printable.
    pub fn usage(what: impl std::fmt::Display) -> Self {
        Error::Usage(one_line(what))
    }

    /// A [`Error::File`] that names `path`.
    pub fn file(path: impl AsRef<Path>, what: impl std::fmt::Display) -> Self {
        Error::File {
            path: path.as_ref().to_owned(),
            what: one_line(what),
        }
    }

    /// A [`Error::Failed`] from anything printable.
    pub fn failed(what: impl std::fmt::Display) -> Self {
        Error::Failed(one_line(what))
    }

    /// The same error with the place before it, e.g. `prompts.jsonl: line 2`.
    pub fn within(self, place: impl std::fmt::Display) -> Self {
        match self {
            Error::Usage(what) => Error::usage(format!("{place}: {what}")),
            told @ Error::Told(_) => told,
            other => Error::failed(format!("{place}: {other}")),
        }
    }

    /// The process exit code: 2 for wrong usage, 1 for a failure, what rank 0 said on a rank that was told.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) => 2,
            Error::Told(code) => *code,
            _ => 1,
        }
    }
}

/// Errors of libraries and file contents may hold line breaks or control characters; a terminal line must not.
fn one_line(what: impl std::fmt::Display) -> String {
    let text = what.to_string();
    let clean: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    clean.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_and_maps_to_its_exit_code() {
        let e = Error::file("model/config.json", "line\nbreak\x1b[31m and\ttab");
        assert_eq!(e.to_string(), "model/config.json: line break [31m and tab");
        assert_eq!(e.exit_code(), 1);
        assert_eq!(Error::usage("--ranks 0: at least 1").exit_code(), 2);
    }
}
