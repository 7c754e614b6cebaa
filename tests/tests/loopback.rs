//! The local stack has no passwords: it listens on loopback only, and says so to whoever asks for more.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use tests::Host;

/// The state of a socket that listens, in `/proc/net/tcp`.
const LISTENS: &str = "0A";
/// 127.0.0.1 as the kernel prints it: the bytes of a word of this machine.
const LOOPBACK: &str = "0100007F";

fn trial() -> Host {
    Host::new(env!("CARGO_BIN_EXE_trial"))
}

fn word(path: &Path, name: &str) -> Option<String> {
    let status = fs::read_to_string(path.join("status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix(name)).map(|rest| rest.trim().to_owned())
}

/// A process and all that descend from it.
fn family(ancestor: u32) -> Vec<u32> {
    let processes: Vec<(u32, u32)> = fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let pid = entry.file_name().to_str()?.parse().ok()?;
            Some((pid, word(&entry.path(), "PPid:")?.parse().ok()?))
        })
        .collect();
    let mut family = vec![ancestor];
    let mut at = 0;
    while let Some(parent) = family.get(at).copied() {
        family.extend(processes.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
        at += 1;
    }
    family
}

/// The inodes of the sockets that processes have open.
fn sockets(pids: &[u32]) -> HashSet<String> {
    let descriptors = pids.iter().filter_map(|pid| fs::read_dir(format!("/proc/{pid}/fd")).ok()).flatten();
    descriptors
        .filter_map(|entry| {
            let target = fs::read_link(entry.ok()?.path()).ok()?;
            let inode = target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
            Some(inode.to_owned())
        })
        .collect()
}

/// Addresses and ports, as the kernel prints them, on which sockets of these inodes listen, in TCP of both kinds.
fn listening(inodes: &HashSet<String>) -> Vec<(String, u16)> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| fs::read_to_string(path).unwrap_or_default());
    let lines = tables.iter().flat_map(|table| table.lines().skip(1));
    lines
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (address, port) = fields.get(1)?.split_once(':')?;
            let ours = *fields.get(3)? == LISTENS && inodes.contains(*fields.get(9)?);
            ours.then(|| (address.to_owned(), u16::from_str_radix(port, 16).expect("a port in hex")))
        })
        .collect()
}

#[test]
fn every_socket_of_the_stack_listens_on_loopback() {
    let host = trial();
    let up = host.up();
    let found = listening(&sockets(&family(up.process.pid())));
    for url in [&up.nats, &up.clickhouse] {
        let port = url.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).expect("a port");
        assert!(found.contains(&(LOOPBACK.to_owned(), port)), "{url} is not among {found:?}");
    }
    let elsewhere: Vec<_> = found.iter().filter(|(address, _)| address != LOOPBACK).collect();
    assert!(elsewhere.is_empty(), "sockets listen beyond loopback: {elsewhere:?}");
}

#[test]
fn who_asks_for_another_address_is_told_why_there_is_none() {
    let host = trial();
    let why = "the local stack listens on 127.0.0.1 only, because it has no passwords";
    let hint = "hint: for other hosts, run a nats-server and a ClickHouse of your own, with users, and name them with \
                --nats and --clickhouse";
    let asked: &[&[&str]] = &[
        &["up", "--listen", "0.0.0.0"],
        &["up", "--listen", "::"],
        &["up", "--nats-port", "0.0.0.0:4222"],
        &["up", "--clickhouse-port", "[::]:8123"],
    ];
    for args in asked {
        host.call(args).expect(2).says(&["error: ", args[2], why, hint]);
    }
    fs::write(host.path().join("millstream.toml"), "listen = '0.0.0.0'\n").expect("written");
    host.call(&["up"]).expect(2).says(&["listen in millstream.toml: `0.0.0.0`", why, "own, with users"]);
    assert!(!host.path().join(".millstream").exists(), "nothing was started");
}
