//! Pipeline `guest` as a binary that prints before it hands over.

use std::io::Write;

fn main() -> std::process::ExitCode {
    if std::env::args().any(|argument| argument.starts_with("__compute")) {
        // Nothing of it may get between frames.
        let _printed = writeln!(std::io::stdout(), "main prints before it hands over");
    }
    millstream_cli::main(tests::guest::Guest)
}
