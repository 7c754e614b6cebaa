//! Pipeline `heavy` as a binary.

fn main() -> std::process::ExitCode {
    millstream_cli::main(benches::Heavy::from_env())
}
