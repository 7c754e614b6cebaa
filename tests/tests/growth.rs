//! Streams begin small and grow when they are full, unless an operator has given them a size.

use std::time::Duration;

use serde_json::json;
use tests::nats::Nats;
use tests::{Host, SOON, Up, wait_until};

const MIB: u64 = 1 << 20;
/// What marks a stream that may grow: the bytes that it was given last.
const GROWN: &str = "millstream.grown";
/// About 100 KB of noise each, and four of 9 MiB, which no message takes.
const IDS: u64 = 400;

/// A published run whose ids and rows have more bytes than these streams, which are `ours` or an operator's.
fn cramped(ours: bool) -> (Host, Up, Nats) {
    let host = Host::new(env!("CARGO_BIN_EXE_bulky"));
    let up = host.up();
    host.call(&["setup"]).expect(0);
    let mut nats = Nats::connect(&up.nats);
    for (stream, usual, bytes) in [("bulky_ids", 64 * MIB, 2048), ("bulky_rows", 256 * MIB, 12 * MIB)] {
        let mut config = nats.stream(stream)["config"].take();
        assert_eq!(config["max_bytes"], json!(usual), "{config}");
        assert_eq!(config["metadata"][GROWN], json!(usual.to_string()), "{config}");
        // The operator changes ours.
        if ours {
            config["metadata"][GROWN] = json!(bytes.to_string());
        }
        config["max_bytes"] = json!(bytes);
        let answer = nats.api(&format!("STREAM.UPDATE.{stream}"), &config);
        assert_eq!(answer["config"]["max_bytes"], json!(bytes), "{answer}");
    }
    (host, up, nats)
}

fn size(nats: &mut Nats, stream: &str) -> u64 {
    nats.stream(stream)["config"]["max_bytes"].as_u64().expect("bytes")
}

fn produce(host: &Host) {
    let ids = format!("1..={IDS}");
    host.call(&["produce", "--ids", &ids, "--run", "a", "--batch", "5"]).expect(0);
}

/// Ids whose row is stored, dead letters among them.
fn done(host: &Host) -> serde_json::Value {
    host.status("a")["done"].clone()
}

#[test]
fn what_does_not_fit_makes_streams_grow_and_loses_nothing() {
    let (host, _up, mut nats) = cramped(true);
    produce(&host);
    assert!(size(&mut nats, "bulky_ids") >= 4096);
    // Several find it full at once, and no sink makes room.
    let _workers: Vec<_> =
        ["work-1", "work-2", "work-3"].iter().map(|name| host.start(name, &["work"])).collect();
    let mut sizes = vec![size(&mut nats, "bulky_rows")];
    wait_until("all rows in the stream", SOON, || {
        let now = size(&mut nats, "bulky_rows");
        let last = sizes[sizes.len() - 1];
        assert!(now >= last, "it shrank: {sizes:?}, {now}");
        if now > last {
            sizes.push(now);
        }
        let status = host.status("a");
        let computed = status["pending"] == 0 && status["in_flight"] == 0;
        if computed { Ok(()) } else { Err(format!("{sizes:?} {status}")) }
    });
    // It doubles, and one look may miss a step.
    let is_doubled = |size: &u64| (size / (12 * MIB)).is_power_of_two() && size.is_multiple_of(12 * MIB);
    assert!(sizes.iter().all(is_doubled) && sizes.last() >= Some(&(48 * MIB)), "{sizes:?}");
    let _sink = host.start("sink", &["sink"]);
    host.wait_sealed("a", SOON);
    assert_eq!(done(&host), IDS);
    assert_eq!(host.verify("a")["ids"], IDS);
    for name in ["work-1", "work-2", "work-3"] {
        assert!(!host.log(name).contains("publish not confirmed"), "{}", host.log(name));
    }
}

#[test]
fn an_operators_size_is_kept() {
    let (host, _up, mut nats) = cramped(false);
    let published = host.start("produce", &["produce", "--ids", "1..=400", "--run", "a", "--batch", "5"]);
    host.wait_log("produce", "the stream is full");
    assert_eq!(size(&mut nats, "bulky_ids"), 2048);
    // The operator gives ids, which stay for replay, the room that they need.
    let mut config = nats.stream("bulky_ids")["config"].take();
    config["max_bytes"] = json!(MIB);
    nats.api("STREAM.UPDATE.bulky_ids", &config);
    let _published = published;
    let _work = host.start("work", &["work"]);
    host.wait_log("work", "the stream is full");
    let _sink = host.start("sink", &["sink"]);
    host.wait_sealed("a", SOON + Duration::from_secs(60));
    assert_eq!(done(&host), IDS);
    assert_eq!((size(&mut nats, "bulky_rows"), size(&mut nats, "bulky_ids")), (12 * MIB, MIB));
}
