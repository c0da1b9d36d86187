//! What can keep the harness from measuring.

use std::{io, path::Path};

/// Why there is no figure.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The arguments make no sense together, or not on this host.
    #[error("{0}")]
    Usage(String),
    /// A file or system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// What is being measured failed.
    #[error("{subject}: {what}: {source}")]
    Subject {
        /// [`Subject::name`](crate::subject::Subject::name).
        subject: &'static str,
        /// What it was doing.
        what: &'static str,
        /// Its own error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The function answered with an error.
    #[error("{subject}: the function failed: {answer}")]
    Function {
        /// [`Subject::name`](crate::subject::Subject::name).
        subject: &'static str,
        /// What it answered.
        answer: String,
    },
    /// A results file is not what this program writes.
    #[error("{file}, line {line}: {reason}")]
    Results {
        /// The file.
        file: String,
        /// Line, counted from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
}

/// The harness's result.
pub type Result<T> = std::result::Result<T, Error>;

/// Adds what was being done to an I/O error.
pub fn io_at(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let what = what.into();
    move |source| Error::Io { what, source }
}

/// Adds the path to an I/O error.
pub fn io_with(path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    io_at(path.display().to_string())
}

/// Adds subject and operation to an error of what is measured.
pub fn of<E>(subject: &'static str, what: &'static str) -> impl FnOnce(E) -> Error
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    move |source| Error::Subject { subject, what, source: source.into() }
}
