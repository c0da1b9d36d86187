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
    /// The research harness: measure, report, compare
    #[command(subcommand)]
    Bench(firn_bench::Command),
    /// What `bench` was before it became the harness; goes as soon as nothing uses it
    #[command(hide = true)]
    BenchStarts(bench::Options),
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::BenchStarts(options) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let result = runtime.map_err(Into::into).and_then(|r| r.block_on(bench::run(options)));
            match result {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("firn bench-starts: {error:#}");
                    ExitCode::FAILURE
                }
            }
        }
        Command::Bench(command) => match firn_bench::main(command) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("firn bench: {error}");
                ExitCode::FAILURE
            }
        },
    }
}
