//! The binary of pipeline `collatz`.

fn main() -> std::process::ExitCode {
    millstream_cli::main(collatz::Collatz)
}
