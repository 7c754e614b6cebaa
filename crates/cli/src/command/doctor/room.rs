//! Whether there is room for what is to be stored: on the disk of the local stack, in NATS, on ClickHouse's disks.

use indicatif::HumanBytes;
use millstream_engine::clickhouse::store::Disk;
use millstream_engine::error::Code;
use millstream_engine::nats::broker::Reserved;
use millstream_engine::{Broker, Store};

use super::super::Context;
use super::{Check, Verdict, check, failed};

/// With less than this left, a disk is nearly full: a merge writes what it merges a second time.
const LOW: u64 = 1 << 30;
/// With less than this left, it is full: NATS and ClickHouse refuse what they are given.
const FULL: u64 = 64 << 20;
/// Parts of its limit beyond which an account has nearly no storage left.
const NEARLY: (u64, u64) = (9, 10);
/// Holders of storage that are named.
const SHOWN: usize = 8;

/// The disk that the local stack writes to; nothing where both servers are named.
#[cfg(feature = "local")]
pub(super) fn check_data(context: &Context) -> Option<Check> {
    let config = &context.config;
    if config.nats.is_some() && config.clickhouse.is_some() {
        return None;
    }
    let data = config.data.display();
    Some(match millstream_local::free(&config.data) {
        Ok(free) => {
            of_free("disk", free, format!("{} free in `{data}`", HumanBytes(free)), "free some space there")
        }
        Err(error) => check("disk", Verdict::Fail, format!("`{data}` cannot be looked at: {error}"), None),
    })
}

#[cfg(not(feature = "local"))]
pub(super) fn check_data(_: &Context) -> Option<Check> {
    None
}

fn of_free(what: &'static str, free: u64, found: String, helps: &str) -> Check {
    match free {
        0..FULL => {
            check(what, Verdict::Fail, format!("{found}: it is full"), Some(helps)).coded(Code::DiskFull)
        }
        FULL..LOW => check(what, Verdict::Warn, format!("{found}: it is nearly full"), Some(helps))
            .coded(Code::DiskFull),
        _ => check(what, Verdict::Ok, found, None),
    }
}

/// Who holds how much of NATS's storage, and how much an account may have; nothing where this user may not ask.
pub(super) async fn check_storage(broker: &Broker) -> Option<Check> {
    let all = broker.reserved().await.ok()?;
    let told = |held: &Reserved| {
        format!("{} {} ({} used)", held.holder, HumanBytes(held.reserved), HumanBytes(held.used))
    };
    let mut shown: Vec<String> = all.iter().take(SHOWN).map(told).collect();
    if all.len() > SHOWN {
        shown.push(format!("{} more", all.len() - SHOWN));
    }
    let reserved = all.iter().map(|held| held.reserved).sum();
    let found = format!("{} reserved: {}", HumanBytes(reserved), shown.join(", "));
    // A server without accounts of its own sets none.
    let Some(limit) = broker.storage_limit().await.ok().flatten() else {
        return Some(check("storage", Verdict::Ok, found, None));
    };
    let found = format!("{found}; this account may have {}", HumanBytes(limit));
    Some(if reserved >= limit / NEARLY.1 * NEARLY.0 {
        check(
            "storage",
            Verdict::Warn,
            found,
            Some(
                "a stream that is full cannot grow: give the account more (max_file), or `forget --pipeline` one that is done",
            ),
        )
    } else {
        check("storage", Verdict::Ok, found, None)
    })
}

/// The disks that the rows table lies on: the one with the most room counts, as ClickHouse chooses among them.
pub(super) async fn check_disks(store: &Store) -> Option<Check> {
    let disks = match store.disks().await {
        Ok(disks) => disks,
        Err(error) => return Some(failed("table disk", &error.into())),
    };
    let most = disks.iter().map(|disk| disk.free).max()?;
    let told = |Disk { name, path, free }: &Disk| match path.as_str() {
        "" => format!("{} free on `{name}`", HumanBytes(*free)),
        path => format!("{} free on `{name}` ({path})", HumanBytes(*free)),
    };
    let found = disks.iter().map(told).collect::<Vec<_>>().join(", ");
    Some(of_free("table disk", most, found, "free some disk space for ClickHouse"))
}
