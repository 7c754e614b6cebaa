//! nats-servers with a configuration of their own: one on a volume that loses power, or three that are a cluster, each
//! in a network namespace.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use millstream_local::{Progress, find_clickhouse, find_nats_server};
use serde_json::Value;
use tests::{SOON, wait_until};

use crate::netns::{Hub, Spoke};

const CLIENTS: u16 = 4222;
const MONITOR: u16 = 8222;
const ROUTES: u16 = 6222;
/// How long a server may take to say something about itself.
const ANSWER: Duration = Duration::from_secs(5);

/// One nats-server, killed when dropped.
pub struct NatsServer {
    address: Ipv4Addr,
    ports: (u16, u16),
    binary: PathBuf,
    config: PathBuf,
    log: PathBuf,
    child: Option<Child>,
}

impl NatsServer {
    /// Starts a server by itself on the loopback, with this `sync_interval`, and waits until it answers.
    pub fn alone(store: &Path, log: &Path, ports: (u16, u16), sync_interval: &str) -> Self {
        let text = config("alone", Ipv4Addr::LOCALHOST, ports, store, log, sync_interval);
        let mut server = Self::configured(Ipv4Addr::LOCALHOST, ports, log, &text);
        server.start(None);
        server.wait_ready();
        server
    }

    fn configured(address: Ipv4Addr, ports: (u16, u16), log: &Path, text: &str) -> Self {
        let config = log.with_extension("conf");
        fs::write(&config, text).expect("a configuration file");
        Self { address, ports, binary: nats_server(), config, log: log.to_owned(), child: None }
    }

    /// Its address for clients.
    pub fn url(&self) -> String {
        format!("nats://{}:{}", self.address, self.ports.0)
    }

    /// Starts it, in a spoke's namespace if one is given.
    pub fn start(&mut self, place: Option<&Spoke>) {
        let output = File::options()
            .create(true)
            .append(true)
            .open(self.log.with_extension("out"))
            .expect("a log file");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(&self.binary).arg("--config").arg(&self.config);
        if let Some(spoke) = place {
            command = spoke.command(&command);
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a second handle"))
            .stderr(output)
            .spawn()
            .expect("nats-server starts");
        self.child = Some(child);
    }

    /// Waits until it says that all its streams are there.
    pub fn wait_ready(&self) {
        wait_until(&format!("health of nats-server {}", self.url()), SOON, || match self.get("/healthz") {
            Ok(answer) if answer.contains("\"ok\"") => Ok(()),
            Ok(answer) => Err(answer),
            Err(error) => Err(format!("{error}: {}", fs::read_to_string(&self.log).unwrap_or_default())),
        });
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("it can be killed");
            child.wait().expect("it ends");
        }
    }

    /// Whether it runs.
    pub fn runs(&self) -> bool {
        self.child.is_some()
    }

    /// How many messages a stream of its holds; 0 without such a stream.
    pub fn messages(&self, stream: &str) -> u64 {
        self.stream(stream).map_or(0, |found| found["state"]["messages"].as_u64().unwrap_or(0))
    }

    fn stream(&self, name: &str) -> Option<Value> {
        let answer = self.get("/jsz?accounts=true&streams=true&config=false").ok()?;
        let answer: Value = serde_json::from_str(&answer).ok()?;
        let streams = answer["account_details"]
            .as_array()?
            .iter()
            .flat_map(|account| account["stream_detail"].as_array().map(Vec::as_slice).unwrap_or_default());
        streams.into_iter().find(|stream| stream["name"] == name).cloned()
    }

    fn get(&self, path: &str) -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&(self.address, self.ports.1).into(), ANSWER)?;
        stream.set_read_timeout(Some(ANSWER))?;
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer.split_once("\r\n\r\n").map_or(String::new(), |(_, body)| body.to_owned()))
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Three nats-servers that keep three copies of every stream, each in a namespace of its own.
pub struct Cluster {
    // Servers end before their namespaces go.
    servers: Vec<NatsServer>,
    spokes: Vec<Spoke>,
}

impl Cluster {
    /// Starts them and waits until every one is ready.
    pub fn start(hub: &Hub, dir: &Path) -> Self {
        let spokes: Vec<Spoke> = ["nats-0", "nats-1", "nats-2"].map(|name| hub.spoke(name)).into();
        let routes: Vec<String> =
            spokes.iter().map(|spoke| format!("\"nats://{}:{ROUTES}\"", spoke.own_address())).collect();
        let servers = spokes.iter().enumerate().map(|(at, spoke)| {
            let address = spoke.own_address();
            let (store, log) = (dir.join(format!("nats-{at}")), dir.join(format!("nats-{at}.log")));
            let alone = config(&format!("nats-{at}"), address, (CLIENTS, MONITOR), &store, &log, "always");
            let text = format!(
                "{alone}cluster {{ name: faults, listen: \"{address}:{ROUTES}\", routes: [{}] }}\n",
                routes.join(", ")
            );
            NatsServer::configured(address, (CLIENTS, MONITOR), &log, &text)
        });
        let mut cluster = Self { servers: servers.collect(), spokes };
        for at in 0..cluster.servers.len() {
            cluster.revive(at);
        }
        cluster.wait_ready();
        cluster
    }

    /// The addresses of all three, as `NATS_URL` takes them.
    pub fn urls(&self) -> String {
        self.servers.iter().map(NatsServer::url).collect::<Vec<_>>().join(",")
    }

    /// Which server leads a stream, as another one than `besides` sees it.
    pub fn leader(&self, stream: &str, besides: Option<usize>) -> usize {
        wait_until(&format!("a leader of `{stream}`"), SOON, || {
            let mut seen = String::new();
            for (at, server) in self.servers.iter().enumerate() {
                if !server.runs() || besides == Some(at) {
                    continue;
                }
                let leader = server.stream(stream).map(|found| found["cluster"]["leader"].clone());
                seen += &format!("{at}: {leader:?} ");
                let number =
                    leader.as_ref().and_then(Value::as_str).and_then(|name| name.strip_prefix("nats-"));
                if let Some(number) = number.and_then(|number| number.parse().ok())
                    && besides != Some(number)
                    && self.servers[number].runs()
                {
                    return Ok(number);
                }
            }
            Err(seen)
        })
    }

    /// How many messages of a stream one server has.
    pub fn messages(&self, at: usize, stream: &str) -> u64 {
        self.servers[at].messages(stream)
    }

    /// SIGKILL to one of them.
    pub fn kill(&mut self, at: usize) {
        self.servers[at].kill();
    }

    /// Starts one again.
    pub fn revive(&mut self, at: usize) {
        self.servers[at].start(Some(&self.spokes[at]));
    }

    /// The namespace of one, to cut it off.
    pub fn spoke(&self, at: usize) -> &Spoke {
        &self.spokes[at]
    }

    /// Waits until all of them are there and up to date.
    pub fn wait_ready(&self) {
        self.servers.iter().for_each(NatsServer::wait_ready);
    }
}

fn config(
    name: &str,
    address: Ipv4Addr,
    (clients, monitor): (u16, u16),
    store: &Path,
    log: &Path,
    sync_interval: &str,
) -> String {
    format!(
        "server_name: {name}\nlisten: \"{address}:{clients}\"\nhttp: \"{address}:{monitor}\"\nmax_payload: 8MB\n\
         logfile: \"{}\"\njetstream {{ store_dir: \"{}\", sync_interval: {sync_interval}, max_file_store: 2GB, \
         max_memory_store: 64MB }}\n",
        log.display(),
        store.display(),
    )
}

/// The nats-server that the local stack would start; fetched if need be.
pub fn nats_server() -> PathBuf {
    found("nats-server", async |progress| find_nats_server(progress).await)
}

/// Makes sure that the ClickHouse that the local stack would start is there.
pub fn clickhouse() {
    found("ClickHouse", async |progress| find_clickhouse(progress).await);
}

fn found<T>(what: &str, find: impl AsyncFnOnce(&Progress) -> Result<T, millstream_local::Error>) -> T {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let progress: Progress = Arc::new(|_| {});
    runtime.block_on(find(&progress)).unwrap_or_else(|error| panic!("{what}: {error}"))
}
