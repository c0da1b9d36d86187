//! The `firn` command.

mod bench;
mod doctor;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Runs functions, each in its own microVM.
#[derive(Debug, Parser)]
#[command(name = "firn", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Doctor(doctor::Arguments),
    /// Measure what a start costs: boot, thaw and warm, interleaved, with every phase
    Bench(bench::Options),
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Bench(options) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let result = runtime.map_err(Into::into).and_then(|r| r.block_on(bench::run(options)));
            match result {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("firn bench: {error:#}");
                    ExitCode::FAILURE
                }
            }
        }
    }
}
