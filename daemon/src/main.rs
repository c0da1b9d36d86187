//! The program; everything is in the library, where the fuzzer can reach it.

fn main() -> std::process::ExitCode {
    firnd::main()
}
