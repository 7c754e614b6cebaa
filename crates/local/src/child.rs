//! The two ways in which a pipeline's binary is a child of the local stack.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use chdb_http::OpenError;

use crate::guard;

const USAGE: u8 = 2;

/// First thing in a pipeline binary's main: if this process was started as a child of the local stack, does that
/// child's work and returns its exit code.
///
/// Must come before anything that starts threads or reads stdin. `None` in every other process.
pub fn child_main() -> Option<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    match args.next()?.to_str()? {
        "__local-guard" => Some(guard::run(args)),
        "__local-engine" => Some(match engine_args(args) {
            Some(args) => engine(&args),
            None => {
                guard::complain("usage: __local-engine --lib FILE --path DIR --port N");
                ExitCode::from(USAGE)
            }
        }),
        _ => None,
    }
}

/// Serves until it is told to stop. Failures are told on stderr: one `error:` line with its causes, one `hint:` line.
fn engine(args: &chdb_http::Args) -> ExitCode {
    let Err(error) = chdb_http::run(args) else { return ExitCode::SUCCESS };
    let mut text = format!("error: failed to {error}\n");
    let mut cause = std::error::Error::source(&error);
    while let Some(source) = cause {
        text.push_str(&format!("  {source}\n"));
        cause = source.source();
    }
    text.push_str(&format!("hint: {}", hint(&error)));
    guard::complain(&text);
    ExitCode::FAILURE
}

/// What the operator of a local stack can do about it.
fn hint(error: &chdb_http::Error) -> &'static str {
    use chdb_http::Error;

    match error {
        Error::Directory { .. } => "check that the directory can be written, or name another with --data",
        Error::InUse { .. } => {
            "stop the run or `up` that uses this data directory, or name another with --data"
        }
        Error::Engine(OpenError::Load { .. }) => {
            "the library needs 64-bit Linux with glibc; delete the cached copy to have it fetched again, \
             or set CLICKHOUSE_URL"
        }
        Error::Engine(OpenError::Path { .. } | OpenError::Boot { .. }) => {
            "the engine's own message, if any, is above; check the directory's owner and free space"
        }
        Error::Version { .. } => {
            "the library may be damaged; delete the cached copy to have it fetched again"
        }
        Error::Listen { .. } => "another process may use this port; 0 picks a free one",
        Error::Runtime(_) | Error::Ready(_) => "check the limits on threads and open files",
    }
}

fn engine_args(mut args: impl Iterator<Item = OsString>) -> Option<chdb_http::Args> {
    let mut lib = None;
    let mut path = None;
    let mut port = None;
    while let Some(name) = args.next() {
        let value = args.next()?;
        match name.to_str()? {
            "--lib" => lib = Some(PathBuf::from(value)),
            "--path" => path = Some(PathBuf::from(value)),
            "--port" => port = Some(value.to_str().and_then(|text: &str| text.parse().ok())?),
            _ => return None,
        }
    }
    Some(chdb_http::Args { lib: lib?, path: path?, port: port? })
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    fn parse(line: &str) -> Option<chdb_http::Args> {
        engine_args(line.split(' ').map(|word| OsStr::new(word).to_owned()))
    }

    #[test]
    fn the_engines_arguments_are_all_needed_and_no_others() {
        let args = parse("--lib /l.so --path /data/clickhouse --port 8123").expect("complete");
        assert_eq!((args.lib, args.path, args.port), ("/l.so".into(), "/data/clickhouse".into(), 8123));
        assert!(parse("--lib /l.so --path /p").is_none());
        assert!(parse("--lib /l.so --path /p --port 99999").is_none());
        assert!(parse("--lib /l.so --path /p --port 1 --more x").is_none());
    }
}
