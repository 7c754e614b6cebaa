//! What the process tests start: a binary that opens a local stack as a pipeline's binary does.
//!
//! `probe DATA run|up|moment [nats] [clickhouse]` prints one JSON line when the stack is open or has failed to open,
//! one for each event before and after, and stops the stack when its stdin ends.

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;

use millstream_local::{Error, Options, Owner, Stack};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

fn main() -> ExitCode {
    if let Some(code) = millstream_local::child_main() {
        return code;
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let outcome = runtime.block_on(probe());
    // Tokio's stdin is a thread that may still be reading.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            say(&json!({ "error": error.to_string(), "hint": error.hint(), "cause": cause }));
            ExitCode::FAILURE
        }
    }
}

async fn probe() -> Result<(), Error> {
    let mut args = std::env::args().skip(1);
    let data = args.next().expect("a data directory").into();
    let owner = match args.next().as_deref() {
        Some("up") => Owner::Up,
        Some("moment") => Owner::Moment,
        _ => Owner::Run,
    };
    let servers: Vec<String> = args.collect();
    let need = |server: &str| servers.iter().any(|name| name == server);
    let options = Options {
        data,
        nats_port: 0,
        clickhouse_port: 0,
        need_nats: need("nats"),
        need_clickhouse: need("clickhouse"),
        owner,
        exe: None,
    };
    let mut stack =
        millstream_local::open(options, Arc::new(|event| say(&json!({ "event": format!("{event:?}") }))))
            .await?;
    say_open(&stack);
    let mut end = [0; 1];
    let mut stdin = tokio::io::stdin();
    tokio::select! {
        error = stack.failed() => {
            stack.stop().await?;
            return Err(error);
        }
        _ = stdin.read(&mut end) => {}
    }
    stack.stop().await?;
    say(&json!({ "stopped": true }));
    Ok(())
}

fn say_open(stack: &Stack) {
    say(
        &json!({ "nats": stack.nats_url(), "clickhouse": stack.clickhouse_url(), "attached": stack.attached() }),
    );
}

fn say(value: &Value) {
    writeln!(io::stdout(), "{value}").expect("someone reads stdout");
}
