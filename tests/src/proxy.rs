//! A TCP proxy that stands before NATS or ClickHouse, and cuts, stalls, drops replies and slows.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{sleep, spawn};
use std::time::Duration;

/// How often a direction without bytes looks at what it should do.
const LOOK: Duration = Duration::from_millis(20);
const PIECE: usize = 16 << 10;

/// What becomes of bytes and connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Both directions flow.
    Pass,
    /// Connections are closed, new ones at once: nobody is there.
    Refuse,
    /// Nothing flows, and nobody is told.
    Stall,
    /// Requests flow; replies vanish.
    DropReplies,
    /// Each direction of each connection flows at so many bytes a second.
    Slow(u32),
}

struct Shared {
    upstream: String,
    mode: Mutex<Mode>,
    ended: AtomicBool,
    /// Bytes of replies that vanished.
    dropped: AtomicU64,
}

/// Stands between clients and one server; ends when dropped.
pub struct Proxy {
    /// Its own `host:port`.
    pub address: String,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Passes everything on to the server at this address, until told otherwise.
    pub fn before(upstream: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let upstream = upstream.split("://").last().unwrap_or(upstream).trim_end_matches('/').to_owned();
        let shared = Arc::new(Shared {
            upstream,
            mode: Mutex::new(Mode::Pass),
            ended: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
        });
        let accepting = shared.clone();
        spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if accepting.ended.load(Ordering::Relaxed) {
                    break;
                }
                // A connection that cannot be made is closed, as it would be without a proxy.
                drop(accepting.clone().connect(client));
            }
        });
        Self { address, shared }
    }

    /// Changes what becomes of bytes from now on, on open connections too.
    pub fn set(&self, mode: Mode) {
        *lock(&self.shared.mode) = mode;
    }

    /// Bytes of replies that vanished so far.
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        // Wakes the accepting thread; without a connection it stays until the process ends.
        drop(TcpStream::connect(&self.address));
    }
}

impl Shared {
    fn mode(&self) -> Mode {
        *lock(&self.mode)
    }

    fn connect(self: Arc<Self>, client: TcpStream) -> io::Result<()> {
        if self.mode() == Mode::Refuse {
            return client.shutdown(Shutdown::Both);
        }
        let server = TcpStream::connect(&self.upstream)?;
        for stream in [&client, &server] {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(LOOK))?;
        }
        let (requests, replies) = ((client.try_clone()?, server.try_clone()?), (server, client));
        for (is_reply, (from, to)) in [(false, requests), (true, replies)] {
            let shared = self.clone();
            spawn(move || {
                // However a direction ends, the connection ends with it.
                drop(shared.pump(&from, &to, is_reply));
                drop(from.shutdown(Shutdown::Both));
                drop(to.shutdown(Shutdown::Both));
            });
        }
        Ok(())
    }

    fn pump(&self, mut from: &TcpStream, mut to: &TcpStream, is_reply: bool) -> io::Result<()> {
        let mut piece = [0; PIECE];
        while !self.ended.load(Ordering::Relaxed) {
            let most = match self.mode() {
                Mode::Refuse => return Ok(()),
                Mode::Stall => {
                    sleep(LOOK);
                    continue;
                }
                Mode::Slow(bytes) => {
                    sleep(LOOK);
                    (bytes as usize * LOOK.as_millis() as usize / 1000).clamp(1, PIECE)
                }
                Mode::Pass | Mode::DropReplies => PIECE,
            };
            let length = match from.read(&mut piece[..most]) {
                Ok(0) => return Ok(()),
                Ok(length) => length,
                Err(error) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()) => {
                    continue;
                }
                Err(error) => return Err(error),
            };
            // What came while it was waited for is held back, too.
            while self.mode() == Mode::Stall && !self.ended.load(Ordering::Relaxed) {
                sleep(LOOK);
            }
            if is_reply && self.mode() == Mode::DropReplies {
                self.dropped.fetch_add(length as u64, Ordering::Relaxed);
            } else {
                to.write_all(&piece[..length])?;
            }
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that answers every piece with itself.
    fn echo() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                spawn(move || io::copy(&mut &client, &mut &client));
            }
        });
        address
    }

    fn asked(stream: &mut TcpStream, within: Duration) -> io::Result<[u8; 4]> {
        let mut answer = [0; 4];
        stream.set_read_timeout(Some(within))?;
        stream.write_all(b"ping")?;
        stream.read_exact(&mut answer)?;
        Ok(answer)
    }

    #[test]
    fn a_proxy_does_as_it_is_told() {
        let proxy = Proxy::before(&echo());
        let connect = || TcpStream::connect(&proxy.address).expect("it listens");
        let mut stream = connect();
        let answered = |stream: &mut TcpStream| asked(stream, crate::SOON).expect("an answer") == *b"ping";
        let silent = |stream: &mut TcpStream| asked(stream, LOOK * 6).is_err();
        assert!(answered(&mut stream));
        proxy.set(Mode::DropReplies);
        assert!(silent(&mut stream));
        crate::wait_until("a reply dropped", crate::SOON, || match proxy.dropped() {
            4 => Ok(()),
            bytes => Err(format!("{bytes} bytes")),
        });
        proxy.set(Mode::Slow(100_000));
        assert!(answered(&mut stream));
        proxy.set(Mode::Stall);
        assert!(silent(&mut stream));
        proxy.set(Mode::Refuse);
        // Both are cut, so nothing is waited for.
        assert!(asked(&mut stream, crate::SOON).is_err() && asked(&mut connect(), crate::SOON).is_err());
        proxy.set(Mode::Pass);
        assert!(answered(&mut connect()));
    }
}
