//! The `firn` command.

mod doctor;
mod endpoint;
mod logs;

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
    Logs(logs::Arguments),
    /// The research harness: measure, report, compare
    #[command(subcommand)]
    Bench(firn_bench::Command),
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Logs(arguments) => match logs::run(&arguments) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("firn logs: {error}");
                ExitCode::FAILURE
            }
        },
        Command::Bench(command) => match firn_bench::main(command) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("firn bench: {error}");
                ExitCode::FAILURE
            }
        },
    }
}
