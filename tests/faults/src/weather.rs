//! A link whose weather is made here: latency that varies, loss, reordering, a narrow pipe.
//!
//! What netem does in kernels that have it (`CONFIG_NET_SCH_NETEM`), for those that do not: each end of the link is a TUN
//! device in its own namespace, socat carries its IP packets as datagrams, and two threads between pass them on, each
//! at its own time. TCP above it is the kernel's.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tests::dice::Dice;
use tests::{SOON, wait_until};

use crate::netns::{Hub, Spoke};

/// How often a direction without packets looks at what is due.
const LOOK: Duration = Duration::from_millis(1);
/// Packets that wait in one direction; more are lost, as in a router.
const QUEUE: usize = 500;
const LARGEST_PACKET: usize = 64 << 10;

/// What becomes of packets, in each direction.
#[derive(Debug, Clone, Copy)]
pub struct Weather {
    /// How long each is under way.
    pub latency: Duration,
    /// By how much that varies, up and down, for each packet by itself: later ones overtake.
    pub jitter: Duration,
    /// How many of a hundred never arrive.
    pub lost_percent: u64,
    /// How many bytes a second fit through.
    pub bytes_per_second: Option<u32>,
}

/// Nothing happens to anything.
pub const CLEAR: Weather =
    Weather { latency: Duration::ZERO, jitter: Duration::ZERO, lost_percent: 0, bytes_per_second: None };

/// Packets so far, both directions together.
#[derive(Debug, Default)]
pub struct Counts {
    /// That arrived.
    pub passed: AtomicU64,
    /// That never did.
    pub lost: AtomicU64,
    /// That arrived after one that was sent later.
    pub overtaken: AtomicU64,
}

/// A link between the hub and a spoke; gone when dropped.
pub struct Link {
    /// What is at the other end of it.
    pub spoke: Spoke,
    /// What became of packets.
    pub counts: Arc<Counts>,
    weather: Arc<Mutex<Weather>>,
    ended: Arc<AtomicBool>,
    carriers: Vec<Child>,
    threads: Vec<JoinHandle<()>>,
    dir: TempDir,
}

impl Link {
    /// Makes a spoke at the end of a link in clear weather.
    pub fn new(hub: &Hub, name: &str, seed: u64) -> Self {
        let dir = tempfile::Builder::new().prefix("millstream-link-").tempdir().expect("a directory");
        let spoke = hub.bare_spoke(name);
        let mut link = Self {
            spoke,
            counts: Arc::default(),
            weather: Arc::new(Mutex::new(CLEAR)),
            ended: Arc::default(),
            carriers: Vec::new(),
            threads: Vec::new(),
            dir,
        };
        // The sockets first: a carrier sends to them at once.
        let [near, far] = ["near", "far"].map(|end| {
            let socket = UnixDatagram::bind(link.file(&format!("{end}-relay"))).expect("a socket");
            socket.set_read_timeout(Some(LOOK)).expect("a timeout");
            socket
        });
        let near_end = link.carrier("near", link.spoke.hub_address());
        let far_end = link.carrier("far", link.spoke.own_address());
        let far_end = link.spoke.command(&far_end);
        for mut carrier in [near_end, far_end] {
            let carrier = carrier.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("socat starts");
            link.carriers.push(carrier);
        }
        link.pump(&near, &far, "far", seed);
        link.pump(&far, &near, "near", seed + 1);
        link.wait_up();
        hub.lead_to_loopback(&device("near", &link.spoke), link.spoke.hub_address());
        link
    }

    /// Changes the weather.
    pub fn set(&self, weather: Weather) {
        *self.weather.lock().unwrap_or_else(PoisonError::into_inner) = weather;
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What carries one end's packets.
    fn carrier(&self, end: &str, address: std::net::Ipv4Addr) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "socat"]);
        command.arg(format!("TUN:{address}/30,up,iff-no-pi,tun-name={}", device(end, &self.spoke)));
        let (relay, own) = (self.file(&format!("{end}-relay")), self.file(end));
        command.arg(format!("UNIX-SENDTO:{},bind={}", relay.display(), own.display()));
        command
    }

    /// Carries packets from one relay's socket to the other end.
    fn pump(&mut self, from: &UnixDatagram, by: &UnixDatagram, to: &str, seed: u64) {
        let direction = Direction {
            from: from.try_clone().expect("a second handle"),
            by: by.try_clone().expect("a second handle"),
            to: self.file(to),
            weather: self.weather.clone(),
            counts: self.counts.clone(),
            dice: Dice::seeded(seed),
            waiting: BinaryHeap::new(),
            sent: 0,
            newest_arrived: 0,
            free_at: Instant::now(),
        };
        let ended = self.ended.clone();
        self.threads.push(std::thread::spawn(move || direction.carry(&ended)));
    }

    /// Waits until both devices are there and up.
    fn wait_up(&self) {
        let (near, far) = (device("near", &self.spoke), device("far", &self.spoke));
        wait_until("a link", SOON, || {
            let here = Command::new("ip").args(["address", "show", &near]).output().expect("`ip` runs");
            let there = self.spoke.try_run("ip", &["address", "show", &far]);
            let ups = [here, there].map(|shown| String::from_utf8_lossy(&shown.stdout).into_owned());
            if ups.iter().all(|shown| shown.contains(",UP") && shown.contains("inet ")) {
                Ok(())
            } else {
                Err(ups.concat())
            }
        });
    }
}

/// A device's name: no longer than 15 bytes.
fn device(end: &str, spoke: &Spoke) -> String {
    format!("{end}-{}", spoke.hub_address().octets()[2])
}

impl Drop for Link {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        for carrier in &mut self.carriers {
            // One that has ended already is as gone as it should be.
            drop(carrier.kill());
            drop(carrier.wait());
        }
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

struct Direction {
    from: UnixDatagram,
    by: UnixDatagram,
    to: PathBuf,
    weather: Arc<Mutex<Weather>>,
    counts: Arc<Counts>,
    dice: Dice,
    waiting: BinaryHeap<Reverse<(Instant, u64, Vec<u8>)>>,
    sent: u64,
    newest_arrived: u64,
    free_at: Instant,
}

impl Direction {
    fn carry(mut self, ended: &AtomicBool) {
        let mut packet = vec![0; LARGEST_PACKET];
        while !ended.load(Ordering::Relaxed) {
            match self.from.recv(&mut packet) {
                Ok(length) => self.take(&packet[..length]),
                Err(error)
                    if [io::ErrorKind::WouldBlock, io::ErrorKind::TimedOut].contains(&error.kind()) => {}
                Err(error) => panic!("a link's socket: {error}"),
            }
            self.deliver();
        }
    }

    fn take(&mut self, packet: &[u8]) {
        let weather = *self.weather.lock().unwrap_or_else(PoisonError::into_inner);
        if self.dice.between(0, 100) < weather.lost_percent || self.waiting.len() >= QUEUE {
            self.counts.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let now = Instant::now();
        let through = match weather.bytes_per_second {
            Some(rate) => {
                let takes = Duration::from_secs_f64(packet.len() as f64 / f64::from(rate));
                self.free_at = self.free_at.max(now) + takes;
                self.free_at
            }
            None => now,
        };
        let jitter = weather.jitter.as_micros() as u64;
        let varied = weather.latency + Duration::from_micros(self.dice.between(0, 2 * jitter + 1));
        self.sent += 1;
        self.waiting.push(Reverse((through + varied - weather.jitter, self.sent, packet.to_vec())));
    }

    fn deliver(&mut self) {
        while self.waiting.peek().is_some_and(|Reverse((due, ..))| *due <= Instant::now()) {
            let Some(Reverse((_, number, packet))) = self.waiting.pop() else { return };
            // A carrier that is not there yet, or not any more, is a cable that is out.
            if self.by.send_to(&packet, Path::new(&self.to)).is_ok() {
                self.counts.passed.fetch_add(1, Ordering::Relaxed);
            }
            if number < self.newest_arrived {
                self.counts.overtaken.fetch_add(1, Ordering::Relaxed);
            }
            self.newest_arrived = self.newest_arrived.max(number);
        }
    }
}
