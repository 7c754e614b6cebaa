use std::io;
use std::path::PathBuf;

use crate::chdb::OpenError;

/// Why the server could not start.
///
/// Its display is a fragment that fits after "error: failed to "; the cause is in `source`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The data's directory could not be made, locked or cleaned.
    #[error("use the directory `{}`", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why it could not be.
        #[source]
        source: io::Error,
    },
    /// Another process serves the same data.
    #[error("open the ClickHouse data at `{}`: another process has it open", path.display())]
    InUse {
        /// The data's directory.
        path: PathBuf,
    },
    /// The engine could not be loaded, or does not open the data.
    #[error(transparent)]
    Engine(#[from] OpenError),
    /// The engine is open but runs no statement.
    #[error("ask the ClickHouse engine for its version: {text}")]
    Version {
        /// The engine's own words.
        text: String,
    },
    /// The port could not be listened on.
    #[error("listen on 127.0.0.1:{port}")]
    Listen {
        /// The port that was asked for; 0 for any.
        port: u16,
        /// Why it could not be.
        #[source]
        source: io::Error,
    },
    /// Threads or signal handlers could not be had.
    #[error("start the runtime")]
    Runtime(#[source] io::Error),
    /// Stdout does not take the line that says the port.
    #[error("say on stdout that the engine is ready")]
    Ready(#[source] io::Error),
}
