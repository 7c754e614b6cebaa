//! Loopback ports and the two probes: an HTTP GET and a NATS greeting.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;

const PROBE: Duration = Duration::from_secs(5);
const LONGEST_ANSWER: u64 = 64 * 1024;

/// Where ports are picked: below the range of outgoing connections (32768 and up on Linux). A port out of that range
/// could be taken by an outgoing connection of any process while its server is being restarted, even by a client that reconnects
/// to it and, the port being free, happens to connect to itself.
const PICK_FROM: u16 = 20_000;
const PICK_BELOW: u16 = 32_000;
const PICK_TRIES: u16 = 200;

/// Whether a server could listen on this port now.
pub(crate) fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

/// Picks a free port. Different data directories start looking at different places, so that two stacks that start at
/// once do not choose the same one.
pub(crate) fn pick(data: &Path, what: &str, taken: &[u16]) -> io::Result<u16> {
    let mut hasher = DefaultHasher::new();
    (data, what, std::process::id()).hash(&mut hasher);
    let width = PICK_BELOW - PICK_FROM;
    let start = (hasher.finish() % u64::from(width)) as u16;
    (0..PICK_TRIES)
        .map(|step| PICK_FROM + (start + step) % width)
        .find(|port| !taken.contains(port) && is_free(*port))
        .map_or_else(any_port, Ok)
}

fn any_port() -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// GETs a path from a loopback server; answers status and body. Ends within five seconds.
pub(crate) async fn get(port: u16, path: &str) -> io::Result<(u16, String)> {
    let exchange = async {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(LONGEST_ANSWER).read_to_end(&mut answer).await?;
        parse_answer(&answer).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not an HTTP answer"))
    };
    timeout(PROBE, exchange).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

fn parse_answer(answer: &[u8]) -> Option<(u16, String)> {
    let text = String::from_utf8_lossy(answer);
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    Some((status, body.to_owned()))
}

/// The JSON with which a nats-server greets a new connection. Ends within five seconds.
pub(crate) async fn nats_greeting(port: u16) -> io::Result<serde_json::Value> {
    let exchange = async {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        let mut line = String::new();
        BufReader::new(stream).take(LONGEST_ANSWER).read_line(&mut line).await?;
        let json = line
            .strip_prefix("INFO ")
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, line.clone()))?;
        Ok(serde_json::from_str(json)?)
    };
    timeout(PROBE, exchange).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Whether anything listens on a loopback port.
pub(crate) async fn listens(port: u16) -> bool {
    matches!(timeout(PROBE, TcpStream::connect((Ipv4Addr::LOCALHOST, port))).await, Ok(Ok(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_http_answer_is_split_into_status_and_body() {
        let answer = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno";
        assert_eq!(parse_answer(answer), Some((503, "no".to_owned())));
        assert_eq!(parse_answer(b"INFO {}\r\n"), None);
    }

    #[test]
    fn a_picked_port_is_free_and_not_one_of_those_taken() {
        let first = pick(Path::new("/a"), "nats", &[]).expect("a free port");
        let second = pick(Path::new("/a"), "nats", &[first]).expect("a free port");
        assert_ne!(first, second);
        assert!(is_free(second));
    }
}
