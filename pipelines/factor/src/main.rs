//! The binary of pipeline `factor`.

fn main() -> std::process::ExitCode {
    millstream_cli::main(factor::Factor)
}
