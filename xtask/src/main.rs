//! `cargo xtask`: everything that a person runs while developing Firn.

mod artifacts;
mod bench;
mod cache;
mod cargo;
mod clients;
mod cpio;
mod daemon;
mod demo;
mod functions;
mod fuzz;
mod host_vm;
mod images;
mod kernel;
mod lane;
mod packages;
mod python;
mod scratch;
mod spec;
mod step;
mod system_calls;
mod test;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Build, try and test Firn.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    Demo(demo::Arguments),
    Artifacts(artifacts::Arguments),
    HostVm(host_vm::command::Arguments),
    Kernel(kernel::Arguments),
    Test(test::Arguments),
    Spec(spec::Arguments),
    Bench(bench::Arguments),
    Fuzz(fuzz::Arguments),
    SystemCalls(system_calls::Arguments),
}

fn main() -> ExitCode {
    let result = run(Arguments::parse());
    scratch::remove();
    match result {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the task; the result is the exit code.
fn run(arguments: Arguments) -> Result<i32> {
    scratch::clean_up_on_signals()?;
    match arguments.task {
        Task::Demo(arguments) => demo::run(&arguments),
        Task::Artifacts(arguments) => artifacts::run(arguments),
        Task::Test(arguments) => test::run(&arguments),
        Task::Spec(arguments) => spec::run(&arguments),
        Task::Fuzz(arguments) => fuzz::run(&arguments),
        Task::SystemCalls(arguments) => system_calls::run(&arguments),
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Kernel(arguments) => kernel::run(arguments),
        Task::HostVm(arguments) => host_vm::command::run(arguments),
    }
}
