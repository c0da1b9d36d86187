//! The research harness of Firn, `firn bench`: what a start costs, phase by phase, with the numbers
//! that a reader needs to trust it, side by side with others.
//!
//! ```text
//! run ─▶ scenario × subject × function, in turns ─▶ JSON lines (record) ─▶ report, compare
//! ```
//!
//! [`subject`] is the boundary to what is measured, [`scenario`] what is asked of it, [`record`]
//! the results file. Nothing here is Firn's own but `subjects/firn.rs`. `docs/benchmarks.md` says
//! how to read the results.

pub mod clock;
pub mod compare;
pub mod error;
pub mod frames;
pub mod functions;
pub mod host;
pub mod observe;
pub mod record;
pub mod replay;
pub mod report;
pub mod run;
pub mod scenario;
pub mod stats;
pub mod subject;
pub mod subjects;
pub mod summary;
pub mod trace;

pub use run::hash;

use crate::error::{Result, io_at};

/// `firn bench …`.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Measure, and print JSON lines: a manifest, then one line a raw sample
    Run(Box<run::Options>),
    /// Replay an invocation trace against policies, with real microVMs
    Replay(Box<replay::Options>),
    /// Print a synthetic invocation trace
    Generate(replay::generate::Options),
    /// Make tables, CSV and one HTML page of results
    Report(report::Options),
    /// Say what changed between two results files, and whether it may be chance
    Compare(compare::Options),
}

/// Runs a command.
///
/// # Errors
/// Whatever keeps it from being done.
pub fn main(command: Command) -> Result<()> {
    match command {
        Command::Run(options) => wait(run::run(*options)),
        Command::Replay(options) => wait(replay::run(*options)),
        Command::Generate(options) => replay::generate::run(&options),
        Command::Report(options) => report::run(&options),
        Command::Compare(options) => compare::run(&options),
    }
}

/// One thread: what is measured has the other CPUs, if there are any.
fn wait(work: impl Future<Output = Result<()>>) -> Result<()> {
    ::firn::raise_descriptor_limit().map_err(io_at("raise the limit of open descriptors"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(io_at("start the runtime"))?.block_on(work)
}
