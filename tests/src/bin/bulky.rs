//! Pipeline `bulky` as a binary.

fn main() -> std::process::ExitCode {
    millstream_cli::main(tests::Bulky::<u64>::new(0))
}
