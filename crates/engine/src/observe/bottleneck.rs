//! The bottleneck of a run, in one sentence, from how cores, sinks and the producer spend their time.
//!
//! The rules are few and apply in order; each gives the measured figures and what would help. Shares are parts
//! of the time that all cores, or all sinks, had.

use millstream::names::RunName;

use serde::Serialize;

use crate::model::host::{Doing, HostReport};
use crate::model::times::{CoreTimes, ProduceTimes, SinkTimes};

/// The share of busy core time from which the cores limit the run.
const BUSY: f64 = 0.8;
/// The share of waiting core time from which the cores are limited by what they wait for.
const WAITS: f64 = 0.2;
/// The share of sink time in ClickHouse from which, if cores wait for the sinks too, ClickHouse limits the run.
const STORES: f64 = 0.5;
/// The share of sink time in ClickHouse from which, if rows pile up, ClickHouse limits the run even while all
/// cores are busy.
const ONLY_STORES: f64 = 0.8;
/// Rows pile up if storing them takes at least this many seconds.
const PILE_SECONDS: f64 = 10.0;

/// The age of the oldest batch, in seconds, from which a run without finished batches has no known bottleneck.
const UNFINISHED: f64 = 20.0;

/// What limits a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bottleneck {
    /// The cores.
    Compute,
    /// Encoding and compressing rows.
    Encode,
    /// ClickHouse.
    Store,
    /// NATS.
    Broker,
    /// The producer.
    Input,
    /// Ids that wait for another attempt.
    Retry,
    /// The run's rate limit.
    Rate,
    /// A stage has no process to do its work.
    Nobody,
    /// Unknown: cores are busy and no batch is finished, or processes do not respond.
    Unknown,
    /// Ids have no row, and nothing on its way would bring one.
    Missing,
    /// Nothing: the run is almost done.
    End,
    /// No single thing.
    Mixed,
}

/// The bottleneck of a run with its reasons.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// What limits the run.
    pub bottleneck: Bottleneck,
    /// The sentence with figures and advice.
    pub text: String,
}

/// The period of the times that count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Span {
    /// The last seconds.
    Recent,
    /// Since the start of each process.
    Total,
}

/// What the verdict needs beside the times.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Scene {
    /// Whether ids are still being published.
    pub publishing: bool,
    /// Whether the run has ended.
    pub ended: bool,
    /// The number of batches that no worker has received.
    pub pending: u64,
    /// The number of batches that workers hold.
    pub in_flight: u64,
    /// The number of rows that wait for sinks.
    pub rows_to_store: u64,
    /// The number of ids that wait for another attempt.
    pub asking: u64,
    /// The run's recently computed ids per second.
    pub ids_per_second: f64,
    /// Seconds since a worker received the oldest open batch; zero if there is none.
    pub oldest_seconds: f64,
    /// The number of ids without a row, if nothing of the run is on its way.
    pub missing: u64,
}

/// The times of all processes of a fleet.
#[derive(Debug, Default)]
struct Fleet {
    hosts: usize,
    /// The number of workers that cannot compute.
    unable: usize,
    cores: usize,
    work: CoreTimes,
    sinks: usize,
    sink: SinkTimes,
    rows_per_second: f64,
    produce: Option<ProduceTimes>,
}

impl Fleet {
    fn of(hosts: &[HostReport], run: &RunName, span: Span) -> Self {
        let mut fleet = Self::default();
        for host in hosts {
            match &host.doing {
                Doing::Work { unable: Some(_), .. } => fleet.unable += 1,
                Doing::Work { cores, recent, total, .. } => {
                    fleet.hosts += 1;
                    fleet.cores += cores;
                    fleet.add_work(span.of(recent, total));
                }
                Doing::Sink { recent, total, rows_per_second, .. } => {
                    fleet.sinks += 1;
                    fleet.rows_per_second += rows_per_second;
                    fleet.add_sink(span.of(recent, total));
                }
                Doing::Produce { run: of, recent, total } if *of == run.as_str() => {
                    fleet.produce = Some(*span.of(recent, total));
                }
                Doing::Produce { .. } => {}
            }
        }
        fleet
    }

    fn add_work(&mut self, times: &CoreTimes) {
        self.work.all += times.all;
        self.work.computing += times.computing;
        self.work.encoding += times.encoding;
        self.work.waiting_for_ids += times.waiting_for_ids;
        self.work.waiting_for_room += times.waiting_for_room;
        self.work.held_by_rate += times.held_by_rate;
        self.work.silent += times.silent;
    }

    fn add_sink(&mut self, times: &SinkTimes) {
        self.sink.all += times.all;
        self.sink.inserting += times.inserting;
        self.sink.asking += times.asking;
        self.sink.waiting_for_rows += times.waiting_for_rows;
    }

    /// A part as a share of the cores' time.
    fn cores(&self, part: f64) -> f64 {
        part / self.work.all.max(f64::MIN_POSITIVE)
    }

    /// The share of the sinks' time in ClickHouse, for inserts and for questions about them.
    fn storing(&self) -> f64 {
        (self.sink.inserting + self.sink.asking) / self.sink.all.max(f64::MIN_POSITIVE)
    }

    fn pile_seconds(&self, scene: &Scene) -> f64 {
        scene.rows_to_store as f64 / self.rows_per_second.max(1.0)
    }
}

impl Span {
    fn of<'a, T>(self, recent: &'a T, total: &'a T) -> &'a T {
        match self {
            Self::Recent => recent,
            Self::Total => total,
        }
    }
}

/// The bottleneck of a run.
pub fn verdict(hosts: &[HostReport], run: &RunName, span: Span, scene: &Scene) -> Verdict {
    let fleet = Fleet::of(hosts, run, span);
    let rules = [no_process, missing, silent, rate, retry, store, broker, unknown, compute, input, end];
    rules.iter().find_map(|rule| rule(&fleet, scene)).unwrap_or_else(|| mixed(&fleet))
}

fn no_process(fleet: &Fleet, scene: &Scene) -> Option<Verdict> {
    let waiting = scene.pending + scene.in_flight;
    let text = match (fleet.hosts, fleet.sinks) {
        (0, _) if waiting > 0 && fleet.unable > 0 => format!(
            "no worker computes: {waiting} batches wait, and none of {} can compute: `unable` says why",
            counted(fleet.unable, "worker")
        ),
        (0, _) if waiting > 0 => {
            format!(
                "no worker computes: {waiting} batches wait, and no worker reports; start `work` on a host"
            )
        }
        (_, 0) if scene.rows_to_store > 0 => format!(
            "no sink stores: about {} rows wait, and no sink reports; start `sink` on a host",
            scene.rows_to_store
        ),
        (_, 0) if waiting == 0 && !scene.publishing && !scene.ended => {
            "no sink proves: all batches are computed, and no sink reports; start `sink` on a host".to_owned()
        }
        _ => return None,
    };
    Some(Verdict { bottleneck: Bottleneck::Nobody, text })
}

fn missing(_: &Fleet, scene: &Scene) -> Option<Verdict> {
    (scene.missing > 0 && !scene.ended).then(|| Verdict {
        bottleneck: Bottleneck::Missing,
        text: format!(
            "not complete: {} have no row, and nothing of the run is on its way; a sink repairs what it can, and `verify RUN` names \
             the batches and what helps",
            counted(scene.missing as usize, "id")
        ),
    })
}

/// Cores whose process is stopped or hangs in the kernel have no known bottleneck until the worker replaces the
/// process.
fn silent(fleet: &Fleet, _: &Scene) -> Option<Verdict> {
    let silent = fleet.cores(fleet.work.silent);
    (silent >= WAITS).then(|| Verdict {
        bottleneck: Bottleneck::Unknown,
        text: format!(
            "unknown: for {} of the cores' time, processes with ids did not respond: they are stopped, or hang in the kernel \
             (a slow disk, swapping); the worker replaces one after {} s",
            percent(silent),
            crate::compute::SILENT.as_secs()
        ),
    })
}

/// Ids that run long or hang look the same until they end.
fn unknown(fleet: &Fleet, scene: &Scene) -> Option<Verdict> {
    let busy = fleet.cores(fleet.work.computing + fleet.work.encoding);
    let is_unfinished =
        scene.in_flight > 0 && scene.ids_per_second <= 0.0 && scene.oldest_seconds >= UNFINISHED;
    (busy >= BUSY && is_unfinished).then(|| Verdict {
        bottleneck: Bottleneck::Unknown,
        text: format!(
            "unknown so far: {} {} busy, and no batch was finished lately, the oldest was received {:.0} s ago; its ids take that \
             long, or hang: `hard_limit` would end them",
            counted(fleet.cores, "core"),
            percent(busy),
            scene.oldest_seconds
        ),
    })
}

fn rate(fleet: &Fleet, _: &Scene) -> Option<Verdict> {
    let CoreTimes { held_by_rate, waiting_for_room, .. } = fleet.work;
    let held = fleet.cores(held_by_rate);
    (held >= WAITS && held_by_rate >= waiting_for_room).then(|| Verdict {
        bottleneck: Bottleneck::Rate,
        text: format!(
            "rate-limited: cores wait {} of their time for the rate limit; `set RUN --rate N` changes it",
            percent(held)
        ),
    })
}

fn retry(fleet: &Fleet, scene: &Scene) -> Option<Verdict> {
    let idle = fleet.cores(fleet.work.waiting_for_ids + fleet.work.waiting_for_room);
    (scene.asking > 0 && idle >= WAITS).then(|| Verdict {
        bottleneck: Bottleneck::Retry,
        text: format!(
            "limited by retries: {} ids wait for another attempt, and cores are idle {} of their time; more hosts \
             will not help",
            scene.asking,
            percent(idle)
        ),
    })
}

fn store(fleet: &Fleet, scene: &Scene) -> Option<Verdict> {
    let room = fleet.cores(fleet.work.waiting_for_room);
    let storing = fleet.storing();
    let pile = fleet.pile_seconds(scene);
    let busy = fleet.cores(fleet.work.computing + fleet.work.encoding);
    let text = if room >= WAITS && storing >= STORES {
        format!(
            "store-bound: sinks spend {} of their time in ClickHouse, workers wait {} for capacity; a faster ClickHouse will \
             help, more workers will not",
            percent(storing),
            percent(room)
        )
    } else if storing >= ONLY_STORES && pile >= PILE_SECONDS && !scene.ended {
        format!(
            "store-bound: sinks spend {} of their time in ClickHouse, and {pile:.0} s of rows wait for them; a faster \
             ClickHouse will help, more workers will not",
            percent(storing)
        )
    } else if scene.ended && storing >= ONLY_STORES && busy < BUSY {
        format!(
            "store-bound: sinks spent {} of their time in ClickHouse, while cores were {} busy; a faster ClickHouse will \
             help, more workers will not",
            percent(storing),
            percent(busy)
        )
    } else {
        return None;
    };
    Some(Verdict { bottleneck: Bottleneck::Store, text })
}

fn broker(fleet: &Fleet, _: &Scene) -> Option<Verdict> {
    let CoreTimes { waiting_for_room, waiting_for_ids, .. } = fleet.work;
    let room = fleet.cores(waiting_for_room);
    // A worker that waits longer for ids than for capacity has no rows to send.
    (room >= WAITS && waiting_for_room >= waiting_for_ids).then(|| Verdict {
        bottleneck: Bottleneck::Broker,
        text: format!(
            "broker-bound: workers wait {} for NATS to take their rows, while sinks store {} of their time; larger \
             batches (--batch), or a faster disk and network of NATS, will help",
            percent(room),
            percent(fleet.storing())
        ),
    })
}

fn compute(fleet: &Fleet, _: &Scene) -> Option<Verdict> {
    let CoreTimes { computing, encoding, .. } = fleet.work;
    let busy = fleet.cores(computing + encoding);
    if busy < BUSY {
        return None;
    }
    let hosts = counted(fleet.hosts, "host");
    let cores = counted(fleet.cores, "core");
    let busy = percent(busy);
    Some(if encoding > computing {
        Verdict {
            bottleneck: Bottleneck::Encode,
            text: format!(
                "encode-bound: {cores} {busy} busy, {} of the time with writing and compressing rows; smaller rows or more \
                 hosts will help",
                percent(fleet.cores(encoding))
            ),
        }
    } else {
        Verdict {
            bottleneck: Bottleneck::Compute,
            text: format!(
                "compute-bound: {hosts} with {cores} {} {busy} busy; adding hosts will help",
                if fleet.hosts == 1 { "is" } else { "are" }
            ),
        }
    })
}

fn input(fleet: &Fleet, scene: &Scene) -> Option<Verdict> {
    let waits = fleet.cores(fleet.work.waiting_for_ids);
    if waits < WAITS || scene.ended && fleet.produce.is_none() {
        return None;
    }
    let waits = percent(waits);
    let times = fleet.produce.filter(|_| scene.publishing || scene.ended);
    if let Some(ProduceTimes { all, reading, waiting_for_broker }) = times {
        let of = |part: f64| percent(part / all.max(f64::MIN_POSITIVE));
        let (bottleneck, why) = if reading >= waiting_for_broker {
            let why = format!(
                "the producer spends {} waiting for its input; a faster input will help",
                of(reading)
            );
            (Bottleneck::Input, why)
        } else {
            let why = format!(
                "the producer spends {} waiting for NATS; look at the disk and network of NATS",
                of(waiting_for_broker)
            );
            (Bottleneck::Broker, why)
        };
        return Some(Verdict {
            bottleneck,
            text: format!("starved: workers wait for ids {waits} of their time; {why}"),
        });
    }
    if scene.publishing {
        let text = format!(
            "starved: workers wait for ids {waits} of their time, and no producer reports; start `produce` again with \
             the same command"
        );
        return Some(Verdict { bottleneck: Bottleneck::Input, text });
    }
    (scene.pending > 0).then(|| Verdict {
        bottleneck: Bottleneck::Broker,
        text: format!(
            "broker-bound: batches wait for workers, and workers wait for ids {waits} of their time; larger batches \
             (--batch) or a nearer NATS will help"
        ),
    })
}

fn end(fleet: &Fleet, scene: &Scene) -> Option<Verdict> {
    let nothing = !scene.publishing && !scene.ended && scene.pending == 0;
    nothing.then(|| Verdict {
        bottleneck: Bottleneck::End,
        text: format!(
            "at its end: {} with workers, about {} rows to be stored, then the proof; {} busy",
            counted(scene.in_flight as usize, "batch"),
            scene.rows_to_store,
            percent(fleet.cores(fleet.work.computing + fleet.work.encoding))
        ),
    })
}

fn mixed(fleet: &Fleet) -> Verdict {
    let CoreTimes { computing, encoding, waiting_for_ids, waiting_for_room, .. } = fleet.work;
    let of = |part: f64| percent(fleet.cores(part));
    let text = format!(
        "no single bottleneck: cores compute {} of their time, encode {}, wait {} for ids and {} for capacity; sinks store {}",
        of(computing),
        of(encoding),
        of(waiting_for_ids),
        of(waiting_for_room),
        percent(fleet.storing())
    );
    Verdict { bottleneck: Bottleneck::Mixed, text }
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

fn counted(number: usize, of: &str) -> String {
    let plural = match (number, of) {
        (1, _) => "",
        (_, "batch") => "es",
        _ => "s",
    };
    format!("{number} {of}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(doing: Doing) -> HostReport {
        HostReport { host: "a".into(), pid: 1, instance: 7, started_ms: 0, build: String::new(), doing }
    }

    fn work(cores: usize, parts: [f64; 5]) -> HostReport {
        worker(cores, with_silent(parts, 0.0))
    }

    fn with_silent([computing, encoding, ids, room, rate]: [f64; 5], silent: f64) -> CoreTimes {
        CoreTimes::from([computing, encoding, ids, room, rate, silent])
    }

    fn worker(cores: usize, recent: CoreTimes) -> HostReport {
        let total = CoreTimes::default();
        let runs = Vec::new();
        let returned = Default::default();
        report(Doing::Work { cores, recent, total, runs, unable: None, returned })
    }

    fn unable() -> HostReport {
        let mut report = work(4, [0.0, 0.0, 40.0, 0.0, 0.0]);
        if let Doing::Work { unable, .. } = &mut report.doing {
            *unable = Some("no threads".into());
        }
        report
    }

    fn sink(parts: [f64; 3]) -> HostReport {
        report(Doing::Sink {
            recent: parts.into(),
            total: SinkTimes::default(),
            rows_per_second: 1000.0,
            left: None,
            left_passes: Vec::new(),
            holds: Vec::new(),
            waits: Vec::new(),
        })
    }

    fn produce(parts: [f64; 2]) -> HostReport {
        report(Doing::Produce { run: "a".into(), recent: parts.into(), total: ProduceTimes::default() })
    }

    #[test]
    fn each_bottleneck_has_its_sentence() {
        let running = Scene { pending: 100, in_flight: 4, ..Scene::default() };
        let publishing = Scene { publishing: true, ..running };
        let idle_sink = || sink([9.0, 0.5, 0.5]);
        let table = [
            (
                vec![],
                running,
                "no worker computes: 104 batches wait, and no worker reports; start `work` on a host",
            ),
            (
                vec![unable(), idle_sink()],
                running,
                "no worker computes: 104 batches wait, and none of 1 worker can compute: `unable` says why",
            ),
            (
                vec![work(4, [40.0, 0.0, 0.0, 0.0, 0.0])],
                Scene { rows_to_store: 700, ..running },
                "no sink stores: about 700 rows wait, and no sink reports; start `sink` on a host",
            ),
            (
                vec![work(4, [38.0, 1.0, 1.0, 0.0, 0.0]), work(2, [19.0, 0.5, 0.5, 0.0, 0.0]), idle_sink()],
                running,
                "compute-bound: 2 hosts with 6 cores are 98 % busy; adding hosts will help",
            ),
            (
                vec![work(4, [10.0, 25.0, 5.0, 0.0, 0.0]), idle_sink()],
                running,
                "encode-bound: 4 cores 88 % busy, 62 % of the time with writing and compressing rows; smaller rows or more \
                 hosts will help",
            ),
            (
                vec![work(4, [20.0, 2.0, 2.0, 16.0, 0.0]), sink([1.0, 0.2, 8.8])],
                running,
                "store-bound: sinks spend 90 % of their time in ClickHouse, workers wait 40 % for capacity; a faster \
                 ClickHouse will help, more workers will not",
            ),
            (
                vec![work(4, [40.0, 0.0, 0.0, 0.0, 0.0]), sink([1.0, 0.0, 9.0])],
                Scene { rows_to_store: 60_000, ..running },
                "store-bound: sinks spend 90 % of their time in ClickHouse, and 60 s of rows wait for them; a faster \
                 ClickHouse will help, more workers will not",
            ),
            (
                vec![work(4, [12.0, 4.0, 24.0, 0.0, 0.0]), sink([1.7, 0.3, 8.0])],
                Scene { ended: true, ..Scene::default() },
                "store-bound: sinks spent 83 % of their time in ClickHouse, while cores were 40 % busy; a faster \
                 ClickHouse will help, more workers will not",
            ),
            (
                vec![work(4, [20.0, 2.0, 2.0, 16.0, 0.0]), idle_sink()],
                running,
                "broker-bound: workers wait 40 % for NATS to take their rows, while sinks store 10 % of their time; \
                 larger batches (--batch), or a faster disk and network of NATS, will help",
            ),
            (
                vec![work(4, [16.0, 0.0, 24.0, 0.0, 0.0]), idle_sink(), produce([9.5, 0.5])],
                publishing,
                "starved: workers wait for ids 60 % of their time; the producer spends 95 % waiting for its input; a \
                 faster input will help",
            ),
            (
                vec![work(4, [0.0, 0.0, 24.0, 16.0, 0.0]), idle_sink(), produce([2.0, 8.0])],
                publishing,
                "starved: workers wait for ids 60 % of their time; the producer spends 80 % waiting for NATS; look at \
                 the disk and network of NATS",
            ),
            (
                vec![work(4, [16.0, 0.0, 24.0, 0.0, 0.0]), idle_sink()],
                publishing,
                "starved: workers wait for ids 60 % of their time, and no producer reports; start `produce` again with \
                 the same command",
            ),
            (
                vec![work(4, [16.0, 0.0, 24.0, 0.0, 0.0]), idle_sink()],
                running,
                "broker-bound: batches wait for workers, and workers wait for ids 60 % of their time; larger batches \
                 (--batch) or a nearer NATS will help",
            ),
            (
                vec![work(4, [4.0, 0.0, 0.0, 0.0, 36.0]), idle_sink()],
                running,
                "rate-limited: cores wait 90 % of their time for the rate limit; `set RUN --rate N` changes it",
            ),
            (
                vec![work(4, [16.0, 0.0, 24.0, 0.0, 0.0]), idle_sink()],
                Scene { in_flight: 1, rows_to_store: 50, ..Scene::default() },
                "at its end: 1 batch with workers, about 50 rows to be stored, then the proof; 40 % busy",
            ),
            // The function hangs: no piece of a batch ends.
            (
                vec![work(4, [0.0, 40.0, 0.0, 0.0, 0.0]), idle_sink()],
                Scene { oldest_seconds: 65.0, ..running },
                "unknown so far: 4 cores 100 % busy, and no batch was finished lately, the oldest was received 65 s ago; its ids take \
                 that long, or hang: `hard_limit` would end them",
            ),
            (
                vec![worker(4, with_silent([10.0, 0.0, 10.0, 0.0, 0.0], 20.0)), idle_sink()],
                running,
                "unknown: for 50 % of the cores' time, processes with ids did not respond: they are stopped, or hang in the \
                 kernel (a slow disk, swapping); the worker replaces one after 30 s",
            ),
            (
                vec![work(4, [0.0, 0.0, 40.0, 0.0, 0.0]), idle_sink()],
                Scene { missing: 1000, ..Scene::default() },
                "not complete: 1000 ids have no row, and nothing of the run is on its way; a sink repairs what it can, and \
                 `verify RUN` names the batches and what helps",
            ),
            (
                vec![work(4, [0.0, 0.0, 40.0, 0.0, 0.0])],
                Scene::default(),
                "no sink proves: all batches are computed, and no sink reports; start `sink` on a host",
            ),
            (
                vec![work(4, [28.0, 1.0, 5.0, 6.0, 0.0]), idle_sink()],
                running,
                "no single bottleneck: cores compute 70 % of their time, encode 2 %, wait 12 % for ids and 15 % for \
                 capacity; sinks store 10 %",
            ),
        ];
        let run = "a".parse().expect("legal");
        for (hosts, scene, text) in table {
            assert_eq!(verdict(&hosts, &run, Span::Recent, &scene).text, text);
        }
    }
}
