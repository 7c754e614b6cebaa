//! Pipeline `factor` as a binary that benchmarks can find.

fn main() -> std::process::ExitCode {
    millstream_cli::main(factor::Factor)
}
