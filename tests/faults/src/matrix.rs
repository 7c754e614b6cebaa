//! The fault matrix: 38 rows of `reliability.md` §6.1 and 15 that came later, of commands, of rows as columns, of what ids
//! do to their process, and of servers that take what they do not do; each with the scenarios that play it: all of them can run
//! on one Linux machine as root.
//!
//! P is the producer, W a worker, K a sink, N nats-server, C ClickHouse. Every row expects no id lost, no id twice in the
//! views, and a seal that needs nobody; [`Raw`] says what it expects of the table beneath the views.

use crate::Plan;
use crate::scenarios::{
    clickhouse, cluster, home, machine, merges, namespaces, nats, net, old_clickhouse, outage, power,
    producer, rows, sealer, sink, steered, streams, worker,
};
use crate::scene::Report;

/// A row of the matrix.
pub struct Row {
    /// Its number there.
    pub number: u8,
    /// What fails.
    pub fault: &'static str,
    /// By what.
    pub means: &'static str,
    /// What plays it, at different moments.
    pub scenarios: &'static [Scenario],
}

/// One moment of a row.
pub struct Scenario {
    /// When the fault happens.
    pub moment: &'static str,
    /// What is expected of the rows beneath the views.
    pub raw: Raw,
    /// Whether it is part of the subset for CI.
    pub ci: bool,
    /// Plays it; a panic is a failure.
    pub play: fn(Plan) -> Report,
}

/// Raw duplicates, which views never show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Raw {
    /// There must be none at any time.
    Never,
    /// There may be some until the seal, or until `verify --repair` where a zombie woke after it.
    Merged,
}

impl Row {
    /// The name of one of its scenarios: `8c`, or `18` where there is but one.
    pub fn label(&self, at: usize) -> String {
        let letter =
            if self.scenarios.len() > 1 { char::from(b'a' + at as u8).to_string() } else { String::new() };
        format!("{}{letter}", self.number)
    }
}

const fn row(number: u8, fault: &'static str, means: &'static str, scenarios: &'static [Scenario]) -> Row {
    Row { number, fault, means, scenarios }
}

const fn at(moment: &'static str, raw: Raw, play: fn(Plan) -> Report) -> Scenario {
    Scenario { moment, raw, ci: false, play }
}

/// One of the subset for CI.
const fn ci(scenario: Scenario) -> Scenario {
    Scenario { ci: true, ..scenario }
}

/// All of it.
pub static ROWS: [Row; 53] = [
    row(
        1,
        "kill -9 P",
        "failpoints",
        &[at("before, in and after publishing, around the record", Raw::Never, producer::killed)],
    ),
    row(
        2,
        "P runs twice at once",
        "two processes",
        &[at("from the start", Raw::Never, producer::twice_at_once)],
    ),
    row(
        3,
        "kill -9 W in compute",
        "SIGKILL",
        &[at("with batches in its hands", Raw::Never, worker::killed_in_compute)],
    ),
    row(
        4,
        "kill -9 W after publishing",
        "failpoint",
        &[at("before the ack", Raw::Never, worker::killed_before_ack)],
    ),
    row(
        5,
        "W paused for 3 ack_wait (scaled: 75 s)",
        "SIGSTOP, SIGCONT after the seal; no watchdog",
        &[at("in compute", Raw::Never, worker::paused)],
    ),
    row(
        6,
        "all W killed every 2 s of their lives",
        "SIGKILL",
        &[at("for 60 s (long: 300 s)", Raw::Never, worker::killed_again_and_again)],
    ),
    row(
        7,
        "ids that panic, abort, fault, loop, eat memory, sleep",
        "a pipeline of such ids",
        &[at("1 of 1,000 ids each", Raw::Never, worker::rogue_ids)],
    ),
    row(
        8,
        "kill -9 K",
        "failpoints",
        &[
            at("before the INSERT", Raw::Never, sink::killed_before_insert),
            ci(at("in the INSERT's body", Raw::Never, sink::killed_in_insert)),
            ci(at("after 200, before the ask", Raw::Never, sink::killed_after_insert)),
            at("after the ask, before the ack", Raw::Never, sink::killed_after_ask),
            at("between two acks", Raw::Never, sink::killed_after_ack),
        ],
    ),
    row(
        9,
        "K paused between ask and INSERT, another takes over",
        "failpoint with SIGSTOP, SIGCONT after the seal",
        &[ci(at("before the INSERT", Raw::Merged, sink::paused_before_insert))],
    ),
    row(
        10,
        "K paused in mid-INSERT, another takes over",
        "failpoint with SIGSTOP, SIGCONT after the seal",
        &[at("in the INSERT's body", Raw::Merged, sink::paused_in_insert)],
    ),
    row(
        11,
        "reply lost after commit",
        "network namespace, iptables, ss -K",
        &[
            ci(at("answers dropped, then reset, 4 times", Raw::Never, net::answers_lost)),
            at("answers dropped for 100 s", Raw::Never, net::answers_lost_for_long),
            ci(at(
                "KILL QUERY SYNC of an insert cut off, on 18.16",
                Raw::Never,
                old_clickhouse::kill_query_sync,
            )),
            at("query_id in use, on 18.16", Raw::Never, old_clickhouse::query_id_in_use),
        ],
    ),
    row(
        12,
        "two K restart in turn",
        "SIGTERM and SIGKILL",
        &[at("every 4 s under load", Raw::Never, sink::restarted_in_turn)],
    ),
    row(
        13,
        "kill -9 C",
        "SIGKILL; strace",
        &[
            at("idle", Raw::Never, clickhouse::killed_idle),
            ci(at("in an INSERT, 6 times", Raw::Never, clickhouse::killed_in_insert)),
            ci(at("between a part and its rename", Raw::Never, clickhouse::killed_at_rename)),
            at("in a merge, 3 times", Raw::Never, clickhouse::killed_in_merge),
        ],
    ),
    row(
        14,
        "no space for C",
        "small tmpfs; strace",
        &[
            ci(at("before a part is written", Raw::Never, clickhouse::full_disk)),
            at("at the fsync of a part", Raw::Never, clickhouse::full_at_sync),
            ci(at("at the rename of a part", Raw::Never, clickhouse::full_at_rename)),
        ],
    ),
    row(
        15,
        "C away under full load",
        "proxy that refuses, small streams",
        &[ci(at("for 20 s after all is full (long: 600 s)", Raw::Never, outage::clickhouse_away))],
    ),
    row(
        16,
        "C has too many parts",
        "parts_to_throw_insert=15, no merges",
        &[at("for 30 s under load (long: 120 s)", Raw::Never, outage::too_many_parts)],
    ),
    row(
        17,
        "C restarts with old data",
        "directory copied back",
        &[at("after the seal", Raw::Never, outage::old_data)],
    ),
    row(
        18,
        "kill -9 N, 50 times",
        "SIGKILL",
        &[ci(at("idle, under publish, under acks", Raw::Merged, nats::killed_under_load))],
    ),
    row(
        19,
        "no space for N",
        "small tmpfs",
        &[
            at("while ids are published", Raw::Merged, nats::full_in_publish),
            at("while rows are published", Raw::Merged, nats::full_in_rows),
        ],
    ),
    row(
        20,
        "max_bytes reached",
        "small streams",
        &[
            at("rows stream", Raw::Never, outage::rows_at_limit),
            at("ids stream, until a person gives room", Raw::Never, outage::ids_at_limit),
        ],
    ),
    row(
        21,
        "N paused",
        "SIGSTOP, SIGCONT",
        &[at("for 45 s under load (long: 120 s)", Raw::Merged, outage::nats_paused)],
    ),
    row(
        22,
        "partition from N, 10 s and 60 s",
        "network namespace, iptables",
        &[
            at("of every W", Raw::Never, net::workers_without_nats),
            at("of every K", Raw::Never, net::sinks_without_nats),
            at("of P in mid-publish", Raw::Never, net::producer_without_nats),
        ],
    ),
    row(
        23,
        "partition of K from C in one direction",
        "network namespace, iptables",
        &[
            at("C does not hear K, from mid-INSERT on", Raw::Never, net::sink_not_heard),
            at("K does not hear C, from mid-INSERT on", Raw::Never, net::clickhouse_not_heard),
        ],
    ),
    row(
        24,
        "slow, lossy, reordering, narrow network",
        "TUN devices and a relay (this kernel has no netem)",
        &[at("200 ms ± 100 ms, 5 % lost, reordered; then 64 kbit/s", Raw::Never, net::bad_weather)],
    ),
    row(
        25,
        "storm of connection resets",
        "network namespace, ss -K",
        &[at("every 500 ms for 60 s, memory flat", Raw::Never, net::resets)],
    ),
    row(
        26,
        "N's data wiped",
        "rm -r between two starts",
        &[at("in mid-run, the same input given again", Raw::Never, streams::wiped)],
    ),
    row(
        27,
        "consumer deleted, reset, paused; subject purged",
        "NATS API",
        &[
            at("workers' consumer deleted", Raw::Never, streams::work_consumer_deleted),
            at("sinks' consumer deleted", Raw::Never, streams::sink_consumer_deleted),
            at("workers' consumer reset", Raw::Never, streams::consumer_reset),
            at("workers' consumer paused for 20 s", Raw::Never, streams::consumer_paused),
            at("ids of a batch purged", Raw::Never, streams::ids_purged),
            at("rows of a batch purged", Raw::Never, streams::rows_purged),
        ],
    ),
    row(
        28,
        "power loss of N",
        "ext4 on a loop device, shut down without a flush",
        &[
            at("3 times, under publish, results and acks", Raw::Merged, power::nats_loses_power),
            at(
                "control: sync_interval 2m loses acked messages",
                Raw::Merged,
                power::nats_loses_power_unsynced,
            ),
        ],
    ),
    row(
        29,
        "power loss of C",
        "ext4 on a loop device, shut down without a flush",
        &[
            at("3 times, after ask and ack", Raw::Never, power::clickhouse_loses_power),
            at(
                "control: without fsync acked rows are lost",
                Raw::Never,
                power::clickhouse_loses_power_unsynced,
            ),
        ],
    ),
    row(
        30,
        "one bit flipped at rest",
        "a byte written to a stopped server's file",
        &[
            at("in a block of the rows stream", Raw::Never, power::bit_flip_in_rows_stream),
            at("in a block of the ids stream", Raw::Never, power::bit_flip_in_ids_stream),
            at("in a part of a sealed run", Raw::Never, power::bit_flip_in_part),
        ],
    ),
    row(
        31,
        "corrupt or foreign messages",
        "NATS API",
        &[
            at("under subjects of no batch", Raw::Never, streams::foreign),
            at("in the place of a batch's rows", Raw::Never, streams::rows_corrupt),
            at("in the place of a batch's ids", Raw::Never, streams::ids_corrupt),
        ],
    ),
    row(
        32,
        "wall clock an hour ahead, then behind",
        "libfaketime on a worker and a sink",
        &[at("in mid-run", Raw::Never, machine::clock_shifted)],
    ),
    row(
        33,
        "W, K, N, C terminated in turn",
        "SIGTERM",
        &[at("under load", Raw::Merged, machine::rolling_restart)],
    ),
    row(
        34,
        "out of memory",
        "control group with 24 MiB",
        &[
            at("W, with batches of 4 MB", Raw::Never, machine::worker_out_of_memory),
            at("K", Raw::Never, machine::sink_out_of_memory),
        ],
    ),
    row(
        35,
        "sealer or repair killed",
        "failpoints",
        &[
            ci(at("around the row, before and after tidying", Raw::Never, sealer::killed_in_seal)),
            at("with its claim, before and after the consumer is made", Raw::Never, sealer::killed_in_repair),
        ],
    ),
    row(
        36,
        "cluster of three N, three copies of each stream",
        "network namespaces, SIGKILL, iptables",
        &[
            at("leader killed 3 times", Raw::Merged, cluster::leader_killed),
            at("two of three killed", Raw::Merged, cluster::two_killed),
            at("leader cut off for 40 s", Raw::Merged, cluster::leader_cut_off),
            at("all three killed at once, twice", Raw::Merged, cluster::all_restarted),
        ],
    ),
    row(
        37,
        "mixed versions of the payload",
        "messages of a later version",
        &[at("ids and rows", Raw::Never, streams::newer_versions)],
    ),
    row(
        38,
        "a machine that is short of things",
        "prlimit, tmpfs, mount",
        &[
            at("40 open files", Raw::Never, machine::few_files),
            at("no space for logs", Raw::Never, machine::full_logs),
            at("read-only /etc", Raw::Never, machine::read_only_etc),
        ],
    ),
    row(
        39,
        "P of an open run killed, or paused",
        "failpoints",
        &[
            ci(at("around a batch, the run's end and its record", Raw::Never, steered::follower_killed)),
            ci(at("until another has ended the run", Raw::Never, steered::follower_wakes_after_the_end)),
        ],
    ),
    row(
        40,
        "forget killed",
        "failpoints",
        &[ci(at("after each of its steps", Raw::Never, steered::killed_in_forget))],
    ),
    row(
        41,
        "rebuild killed",
        "failpoints",
        &[ci(at("before readers are told", Raw::Never, steered::killed_in_rebuild))],
    ),
    row(
        42,
        "rows of a faulty build",
        "messages with a sound envelope in a batch's place",
        &[
            ci(at("block cut, in a frame and between two", Raw::Never, rows::blocks_cut)),
            ci(at("block too short, others behind it", Raw::Never, rows::block_too_short)),
            at("block that takes bytes of the next", Raw::Never, rows::block_that_borrows),
        ],
    ),
    row(
        43,
        "three builds of two schemas at once, W and K of each killed",
        "SIGKILL",
        &[at("while a column is added", Raw::Never, rows::builds_side_by_side)],
    ),
    row(
        44,
        "materialized view that throws",
        "an operator's view, failpoint",
        &[at("K killed in an INSERT meanwhile", Raw::Never, rows::view_throws)],
    ),
    row(
        45,
        "values that a column does not have",
        "a build of such values, SIGKILL of W",
        &[ci(at("2 of 10 ids", Raw::Never, rows::values_without_column))],
    ),
    row(
        46,
        "programs that ids start",
        "a pipeline of such ids, SIGTERM and SIGKILL of W",
        &[
            at("ignore SIGTERM, until the hard limit", Raw::Never, home::program_ignores_sigterm),
            at("hold a crashed id's pipes open", Raw::Never, home::pipe_held_open),
        ],
    ),
    row(
        47,
        "a host without threads",
        "prlimit",
        &[at("beside a W that is killed", Raw::Never, home::host_without_threads)],
    ),
    row(
        48,
        "two namespaces on the same servers",
        "SIGKILL of W and K of both",
        &[at("a run of one name in each", Raw::Never, namespaces::killed_in_both)],
    ),
    row(
        49,
        "C does not do what it takes",
        "SYSTEM STOP MERGES; a mutation that throws",
        &[
            at("merges stopped, with raw duplicates; K killed", Raw::Merged, merges::stopped),
            at("a mutation before the sealer's; K killed", Raw::Merged, merges::mutation_stuck),
        ],
    ),
    row(
        50,
        "the process that computes gives no sign",
        "SIGSTOP",
        &[at("in compute", Raw::Never, home::pool_frozen)],
    ),
    row(
        51,
        "an id that takes long",
        "a pipeline with such an id, SIGKILL of all W",
        &[at("in that id, twice", Raw::Never, home::straggler)],
    ),
    row(
        52,
        "a service that ids need is away",
        "a pipeline of such ids, SIGKILL of W",
        &[at("for ten times as long as five attempts take", Raw::Never, home::service_away)],
    ),
    row(
        53,
        "kill -9 W with rows stored beside ids that are not done",
        "failpoint",
        &[at("after the first early part", Raw::Never, worker::killed_with_early_parts)],
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_the_matrix_is_accounted_for() {
        for (at, row) in ROWS.iter().enumerate() {
            assert_eq!(usize::from(row.number), at + 1);
            assert!(!row.scenarios.is_empty(), "nothing plays row {}", row.number);
        }
    }
}
