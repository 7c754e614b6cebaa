//! Network namespaces of our own: a hub in which the servers listen on their loopback, and spokes for the processes
//! that are to be cut off from them, each at the end of a cable (a veth pair) that can be cut packet by packet.
//!
//! Nothing of the machine's own network is touched. Whatever is made here goes when its value is dropped, also while a
//! scenario panics; what a killed suite left is removed by the next one.

use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sched::{CloneFlags, setns};
use tests::Launch;

use crate::cluster;

/// Where `ip netns` keeps its handles.
const HANDLES: &str = "/run/netns";
/// Every name begins so, then the suite's process id.
const PREFIX: &str = "millstream-";

/// Programs that the network scenarios need, with their Debian packages.
const PROGRAMS: [(&str, &str); 4] =
    [("ip", "iproute2"), ("ss", "iproute2"), ("iptables", "iptables"), ("socat", "socat")];

/// A namespace, removed when dropped.
struct Netns {
    name: String,
}

/// The namespace of the servers and of the harness: this thread, its children and its connections are in it.
pub struct Hub {
    netns: Netns,
    home: File,
    spokes: AtomicU8,
}

/// A namespace that reaches the hub's servers over one cable.
pub struct Spoke {
    netns: Netns,
    /// The hub's end of the cable; the spoke's end is the next address.
    hub_address: Ipv4Addr,
}

/// Which packets of a conversation with a server are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// What goes to the server.
    Requests,
    /// What comes from it.
    Replies,
    /// What comes from it with data in it: the server hears that its reader is there, and the reader hears nothing.
    Answers,
    /// All of it.
    Both,
}

/// Rules that drop packets, until this is dropped.
pub struct Cut<'a> {
    netns: &'a Netns,
    rules: Vec<Vec<String>>,
}

impl Hub {
    /// Makes the namespace and moves this thread into it.
    pub fn enter() -> Self {
        install(&PROGRAMS);
        // Both are fetched where the machine's own network still is.
        cluster::nats_server();
        cluster::clickhouse();
        remove_leftovers();
        let home = File::open("/proc/thread-self/ns/net").expect("this thread's namespace");
        let netns = Netns::new("hub");
        // A cluster's servers, each on a spoke, talk to each other through the hub.
        netns.run("sysctl", &["-q", "-w", "net.ipv4.ip_forward=1"]);
        let handle = File::open(netns.handle()).expect("a namespace's handle");
        setns(handle, CloneFlags::CLONE_NEWNET).expect("root may enter a namespace");
        Self { netns, home, spokes: AtomicU8::new(0) }
    }

    /// Makes a spoke at the end of a cable. The hub's loopback servers answer at the hub's end of it.
    pub fn spoke(&self, name: &str) -> Spoke {
        let spoke = self.bare_spoke(name);
        let cable = format!("to-{name}");
        let (hub, end) = (spoke.hub_address, spoke.own_address());
        let (hub_netns, spoke_netns) = (self.netns.name.as_str(), spoke.netns.name.as_str());
        ip(&format!("link add {cable} netns {hub_netns} type veth peer name cable netns {spoke_netns}"));
        ip(&format!("-n {hub_netns} address add {hub}/30 dev {cable}"));
        ip(&format!("-n {hub_netns} link set {cable} up"));
        ip(&format!("-n {spoke_netns} address add {end}/30 dev cable"));
        ip(&format!("-n {spoke_netns} link set cable up"));
        ip(&format!("-n {spoke_netns} route add default via {hub}"));
        self.lead_to_loopback(&cable, hub);
        spoke
    }

    /// A spoke without a cable: whoever asks for it makes another way into the hub.
    pub fn bare_spoke(&self, name: &str) -> Spoke {
        let number = self.spokes.fetch_add(1, Ordering::Relaxed) + 1;
        Spoke { netns: Netns::new(name), hub_address: Ipv4Addr::new(10, 77, number, 1) }
    }

    /// What comes over this device for the hub's own end of it goes to the servers on the loopback.
    pub fn lead_to_loopback(&self, device: &str, hub_address: Ipv4Addr) {
        self.netns.run("sysctl", &["-q", "-w", &format!("net.ipv4.conf.{device}.route_localnet=1")]);
        let rule = format!(
            "-w -t nat -A PREROUTING -i {device} -d {hub_address} -p tcp -j DNAT --to-destination 127.0.0.1"
        );
        self.netns.run("iptables", &words(&rule));
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        // Outside of a namespace that is gone nothing of this thread would work any more.
        setns(&self.home, CloneFlags::CLONE_NEWNET).expect("back to where this thread came from");
    }
}

impl Spoke {
    /// The same command, in this namespace.
    pub fn command(&self, command: &Command) -> Command {
        let mut inside = Command::new("nsenter");
        inside.arg(format!("--net={}", self.netns.handle())).arg(command.get_program());
        inside.args(command.get_args());
        if let Some(dir) = command.get_current_dir() {
            inside.current_dir(dir);
        }
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        inside
    }

    /// The same service, started in this namespace and told of the hub's servers as they are reached from here.
    pub fn launch(&self, mut launch: Launch, nats: &str, clickhouse: &str) -> Launch {
        launch.under = vec!["nsenter".to_owned(), format!("--net={}", self.netns.handle())];
        for (variable, url) in [("NATS_URL", nats), ("CLICKHOUSE_URL", clickhouse)] {
            launch.env.push((variable.to_owned(), self.reach(url)));
        }
        launch
    }

    /// The address of a server on the hub's loopback, as it is reached from here.
    pub fn reach(&self, url: &str) -> String {
        url.replace("127.0.0.1", &self.hub_address.to_string())
    }

    /// The hub's end of the way into it.
    pub fn hub_address(&self) -> Ipv4Addr {
        self.hub_address
    }

    /// The end of the way that is here.
    pub fn own_address(&self) -> Ipv4Addr {
        let [a, b, c, d] = self.hub_address.octets();
        Ipv4Addr::new(a, b, c, d + 1)
    }

    /// Drops packets of every conversation with a server at this port.
    pub fn cut(&self, port: u16, lost: Lost) -> Cut<'_> {
        let requests = format!("OUTPUT -p tcp --dport {port} -j DROP");
        let replies = format!("INPUT -p tcp --sport {port} -j DROP");
        let answers = format!("INPUT -p tcp --sport {port} --tcp-flags PSH PSH -j DROP");
        let rules = match lost {
            Lost::Requests => vec![requests],
            Lost::Replies => vec![replies],
            Lost::Answers => vec![answers],
            Lost::Both => vec![requests, replies],
        };
        Cut::new(&self.netns, &rules)
    }

    /// Drops everything, in both directions.
    pub fn isolate(&self) -> Cut<'_> {
        Cut::new(&self.netns, &["INPUT -i cable -j DROP".to_owned(), "OUTPUT -o cable -j DROP".to_owned()])
    }

    /// Resets every TCP connection to this port, on this side of it; answers how many there were.
    pub fn reset(&self, port: u16) -> usize {
        let killed = self.netns.run("ss", &["-H", "-K", "-t", "dport", "=", &format!(":{port}")]);
        String::from_utf8_lossy(&killed.stdout).lines().count()
    }

    /// Runs a program here to its end, whatever that is.
    pub fn try_run(&self, program: &str, args: &[&str]) -> Output {
        let mut command = Command::new(program);
        command.args(args);
        self.command(&command).output().unwrap_or_else(|error| panic!("{program}: {error}"))
    }
}

impl<'a> Cut<'a> {
    fn new(netns: &'a Netns, rules: &[String]) -> Self {
        let rules: Vec<Vec<String>> =
            rules.iter().map(|rule| rule.split(' ').map(str::to_owned).collect()).collect();
        for rule in &rules {
            let rule: Vec<&str> = ["-w", "-I"].into_iter().chain(rule.iter().map(String::as_str)).collect();
            netns.run("iptables", &rule);
        }
        Self { netns, rules }
    }

    /// How many packets these rules have dropped: none means that there was no fault.
    pub fn packets(&self) -> u64 {
        let count = |chain: &str| -> u64 {
            let listed = self.netns.run("iptables", &["-w", "-L", chain, "-v", "-x", "-n"]);
            let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
            listed
                .lines()
                .filter(|line| line.contains("DROP"))
                .filter_map(|line| line.split_whitespace().next()?.parse::<u64>().ok())
                .sum()
        };
        count("INPUT") + count("OUTPUT")
    }
}

impl Drop for Cut<'_> {
    fn drop(&mut self) {
        for rule in &self.rules {
            let rule: Vec<&str> = ["-w", "-D"].into_iter().chain(rule.iter().map(String::as_str)).collect();
            self.netns.run("iptables", &rule);
        }
    }
}

impl Netns {
    fn new(name: &str) -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let netns = Self { name: format!("{PREFIX}{}-{number}-{name}", std::process::id()) };
        ip(&format!("netns add {}", netns.name));
        ip(&format!("-n {} link set lo up", netns.name));
        netns
    }

    fn handle(&self) -> String {
        format!("{HANDLES}/{}", self.name)
    }

    fn run(&self, program: &str, args: &[&str]) -> Output {
        let handle = format!("--net={}", self.handle());
        let all: Vec<&str> = [handle.as_str(), program].into_iter().chain(args.iter().copied()).collect();
        run("nsenter", &all)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // A leftover is no reason to panic while a scenario panics; the next suite removes it.
        let removed = Command::new("ip").args(["netns", "delete", &self.name]).output();
        debug_assert!(removed.is_ok_and(|removed| removed.status.success()) || std::thread::panicking());
    }
}

/// apt-get refuses to run twice at once, and scenarios are played beside each other.
pub fn one_apt_at_once() -> MutexGuard<'static, ()> {
    static APT: Mutex<()> = Mutex::new(());
    APT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Installs what is missing of these programs, given with their Debian packages, and says so.
#[expect(clippy::print_stderr, reason = "nobody should be surprised by packages that a test installs")]
pub fn install(programs: &[(&str, &str)]) {
    let _alone = one_apt_at_once();
    let missing: Vec<&str> =
        programs.iter().filter(|(program, _)| !is_installed(program)).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return;
    }
    eprintln!("installing with apt-get: {}", missing.join(", "));
    run("apt-get", &["-qq", "update"]);
    let words = ["-qq", "-y", "--no-install-recommends", "install"];
    run("apt-get", &words.into_iter().chain(missing).collect::<Vec<_>>());
}

fn is_installed(program: &str) -> bool {
    ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].iter().any(|dir| Path::new(dir).join(program).exists())
}

/// Runs a program to its end, which must be a good one.
pub fn run(program: &str, args: &[&str]) -> Output {
    let output =
        Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {}: {} {said}", args.join(" "), output.status);
    output
}

fn ip(line: &str) {
    run("ip", &words(line));
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

/// Removes the namespaces of suites that are no more.
fn remove_leftovers() {
    let Ok(handles) = fs::read_dir(HANDLES) else { return };
    let names = handles.filter_map(io::Result::ok).filter_map(|entry| entry.file_name().into_string().ok());
    for name in names {
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()).unwrap_or_default();
        if pid.parse::<u32>().is_ok_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            ip(&format!("netns delete {name}"));
        }
    }
}
