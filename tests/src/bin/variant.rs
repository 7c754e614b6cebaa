//! Pipeline `variant` as one of its builds.

fn main() -> std::process::ExitCode {
    tests::variants::main()
}
