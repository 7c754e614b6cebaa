//! A nats-server with a configuration of the test's own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use serde_json::Value;

use crate::{SOON, wait_until};

/// It runs until it is dropped.
pub struct NatsServer {
    child: Child,
    directory: PathBuf,
    /// Its port, which it picked itself when it was first started.
    pub port: u16,
}

impl NatsServer {
    /// Starts one with JetStream, whose files are in this directory. `settings` are lines of its configuration.
    pub fn start(directory: &Path, settings: &str) -> Self {
        fs::create_dir_all(directory).expect("a directory");
        let child = spawn(directory, -1, settings);
        let mut server = Self { child, directory: directory.to_owned(), port: 0 };
        server.port = server.wait_port();
        server
    }

    /// Ends it, and starts it again at the same port with other settings.
    pub fn restart(&mut self, settings: &str) {
        self.end();
        self.child = spawn(&self.directory, i32::from(self.port), settings);
        self.wait_port();
    }

    /// Its address, with a login before an `@` or nothing, and this scheme.
    pub fn url(&self, scheme: &str, login: &str) -> String {
        format!("{scheme}://{login}127.0.0.1:{}", self.port)
    }

    fn wait_port(&self) -> u16 {
        let file = self.directory.join(format!("nats-server_{}.ports", self.child.id()));
        let log = self.directory.join("nats.log");
        wait_until("the port of nats-server", SOON, || {
            let text = fs::read_to_string(&file).map_err(|_| fs::read_to_string(&log).unwrap_or_default())?;
            let ports: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
            let url = ports["nats"][0].as_str().or(ports["tls"][0].as_str()).ok_or_else(|| text.clone())?;
            url.rsplit(':').next().and_then(|port| port.parse().ok()).ok_or(text)
        })
    }

    fn end(&mut self) {
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it ends");
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        self.end();
    }
}

fn spawn(directory: &Path, port: i32, settings: &str) -> Child {
    let config = directory.join("nats.conf");
    let shown = directory.display();
    let text = format!(
        "listen: \"127.0.0.1:{port}\"\nports_file_dir: \"{shown}\"\nmax_payload: 8MB\n\
         jetstream {{ store_dir: \"{shown}/store\", max_file_store: 1GB }}\n{settings}\n"
    );
    fs::write(&config, text).expect("a configuration");
    let log = File::options().create(true).append(true).open(directory.join("nats.log")).expect("a log");
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(nats_server()).arg("--config").arg(&config);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("nats-server starts")
}

fn nats_server() -> PathBuf {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let progress = Arc::new(|_| {}) as millstream_local::Progress;
    runtime.block_on(millstream_local::find_nats_server(&progress)).expect("a nats-server")
}
