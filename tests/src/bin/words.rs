//! Pipeline `words` as a binary.

fn main() -> std::process::ExitCode {
    millstream_cli::main(tests::Words)
}
