//! Pipeline `rogue` as a binary.

fn main() -> std::process::ExitCode {
    millstream_cli::main(tests::Rogue)
}
