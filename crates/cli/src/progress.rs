//! One line of progress on a terminal; sparse log lines elsewhere.

use std::io::IsTerminal;
#[cfg(feature = "local")]
use std::sync::Arc;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use millstream::names::RunName;
#[cfg(feature = "local")]
use millstream_engine::error::Code;
use millstream_engine::model::record::RunState;
use millstream_engine::observe::status::Status;
use millstream_engine::produce::publish::Progress as Published;

use crate::show;

/// How often a line is logged where there is no terminal.
const SPARSE: Duration = Duration::from_secs(10);
/// The rate shown is that of about this long.
const RECENT: Duration = Duration::from_secs(3);
/// How often a line on a terminal moves.
const TICK: Duration = Duration::from_millis(100);
/// The bar takes what the text leaves, so that the line is one line.
const BAR: &str = "{wide_bar:.cyan/dim} {percent:>3}% {msg}";

/// Where progress is shown. Clones are the same.
#[derive(Clone)]
pub(crate) struct Progress {
    lines: MultiProgress,
    terminal: bool,
    #[cfg(feature = "local")]
    download: Arc<Mutex<Option<ProgressBar>>>,
}

impl Progress {
    pub fn new() -> Self {
        Self {
            lines: MultiProgress::new(),
            terminal: std::io::stderr().is_terminal(),
            #[cfg(feature = "local")]
            download: Arc::default(),
        }
    }

    /// For the logs, which must not tear the line.
    pub fn lines(&self) -> &MultiProgress {
        &self.lines
    }

    /// Tells the person something on stderr, and does not tear the line.
    pub fn note(&self, text: &str) {
        self.lines.suspend(|| show::note(text));
    }

    /// Says what is being done until the answer is dropped.
    pub fn step(&self, doing: &str) -> Line {
        if !self.terminal {
            tracing::info!("{doing}");
        }
        let line = self.line("{spinner:.cyan} {wide_msg}");
        if let Some(bar) = &line.0 {
            bar.set_message(show::plain(doing).into_owned());
            bar.enable_steady_tick(TICK);
        }
        line
    }

    /// Begins a page of lines that is drawn again and again.
    pub fn page(&self) -> Line {
        self.line("{msg}")
    }

    /// Begins the line of a run.
    pub fn run(&self) -> RunLine {
        RunLine {
            line: self.line(BAR),
            sparse: Sparse::default(),
            recent: Recent::default(),
            most: Most::default(),
        }
    }

    /// Begins the line of a run that is only published.
    pub fn publishing(&self, run: &RunName, ids: u64) -> PublishLine {
        let line = self.line(BAR);
        if let Some(bar) = &line.0 {
            bar.set_length(ids.max(1));
        }
        PublishLine { line, sparse: Mutex::default(), recent: Mutex::default(), run: run.clone(), ids }
    }

    fn line(&self, template: &str) -> Line {
        let style =
            || ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        Line(self.terminal.then(|| self.lines.add(ProgressBar::new(1).with_style(style()))))
    }

    /// Shows what the local stack is doing.
    #[cfg(feature = "local")]
    pub fn stack_event(&self, event: millstream_local::Event) {
        use millstream_local::Event;
        match event {
            Event::Fetching { server, bytes, total, elapsed } => {
                if self.terminal {
                    let mut bar = self.download.lock().unwrap_or_else(PoisonError::into_inner);
                    let bar = bar.get_or_insert_with(|| {
                        let style =
                            ProgressStyle::with_template("{wide_bar:.cyan/dim} {bytes}/{total_bytes} {msg}");
                        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
                        self.lines.add(ProgressBar::new(total).with_style(style))
                    });
                    bar.set_length(total);
                    bar.set_position(bytes);
                    bar.set_message(format!(
                        "fetching {server} once, {}",
                        show::duration(elapsed.as_secs_f64())
                    ));
                } else if elapsed < Duration::from_millis(500) {
                    tracing::info!("fetching {server} once into the cache");
                }
            }
            Event::Fetched { server, elapsed } => {
                if let Some(bar) = self.download.lock().unwrap_or_else(PoisonError::into_inner).take() {
                    bar.finish_and_clear();
                }
                tracing::info!("fetched {server} in {}", show::duration(elapsed.as_secs_f64()));
            }
            Event::PassedOver { program, why } => {
                tracing::info!("`{}` is passed over: it {why}", program.display())
            }
            Event::Waiting { what } => tracing::info!("waiting for {what}"),
            Event::Started { server, url } => tracing::debug!("{server} answers at {url}"),
            Event::Died { server, why } => {
                tracing::warn!(code = %Code::ServerEnded, "{server} ended ({why}), starting it again")
            }
            Event::Restarted { server } => tracing::info!("{server} answers again"),
            Event::NotRestarted { server, why } => {
                tracing::warn!(code = %Code::ServerEnded, "{server} could not be started again: {why}")
            }
            Event::Stuck { server, why } => {
                tracing::error!(code = %Code::ServerEnded, "{server} refuses work: {why}")
            }
            Event::Attached { holder } => {
                tracing::debug!(pid = holder.pid, "using the servers of another process")
            }
            _ => {}
        }
    }
}

/// A line on a terminal, taken away when it is dropped; nothing elsewhere.
pub(crate) struct Line(Option<ProgressBar>);

impl Line {
    /// Replaces what it says.
    pub fn say(&self, text: &str) {
        if let Some(bar) = &self.0 {
            bar.set_message(show::plain(text).into_owned());
            bar.tick();
        }
    }

    /// Takes it away.
    pub fn clear(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.clear();
    }
}

/// The line of one run.
pub(crate) struct RunLine {
    line: Line,
    sparse: Sparse,
    recent: Recent,
    most: Most,
}

impl RunLine {
    /// Shows where the run stands.
    pub fn show(&mut self, status: &Status) {
        let done = self.most.of(status);
        let rate = self.recent.rate(done.ids);
        match &self.line.0 {
            Some(bar) => {
                bar.set_length(status.ids.max(1));
                bar.set_position(done.ids);
                bar.set_message(described(status, done, rate, show::short, show::clock));
            }
            None if self.sparse.is_due() => {
                let percent = done.ids * 100 / status.ids.max(1);
                let text = described(status, done, rate, show::grouped, show::duration);
                tracing::info!("{percent} % of run `{}`: {text}", status.run);
            }
            None => {}
        }
    }
}

/// The line of a run that is only published.
pub(crate) struct PublishLine {
    line: Line,
    sparse: Mutex<Sparse>,
    recent: Mutex<Recent>,
    run: RunName,
    ids: u64,
}

impl PublishLine {
    /// Shows how far it is.
    pub fn show(&self, done: Published) {
        let number = if self.line.0.is_some() { show::short } else { show::grouped };
        let told = |rate: f64| {
            let Published { batches, ids } = done;
            format!(
                "{}/{} ids in {} batches, {} ids/s",
                number(ids),
                number(self.ids),
                number(batches),
                number(rate as u64)
            )
        };
        match &self.line.0 {
            Some(bar) => {
                bar.set_position(done.ids);
                if self.sparse.lock().unwrap_or_else(PoisonError::into_inner).is_due_after(TICK) {
                    bar.set_message(told(
                        self.recent.lock().unwrap_or_else(PoisonError::into_inner).rate(done.ids),
                    ));
                }
            }
            None if self.sparse.lock().unwrap_or_else(PoisonError::into_inner).is_due() => {
                let rate = self.recent.lock().unwrap_or_else(PoisonError::into_inner).rate(done.ids);
                tracing::info!("publishing run `{}`: {}", self.run, told(rate));
            }
            None => {}
        }
    }
}

/// When something was last told.
#[derive(Debug, Default)]
struct Sparse(Option<Instant>);

impl Sparse {
    fn is_due(&mut self) -> bool {
        self.is_due_after(SPARSE)
    }

    fn is_due_after(&mut self, pause: Duration) -> bool {
        let due = self.0.is_none_or(|told| told.elapsed() >= pause);
        if due {
            self.0 = Some(Instant::now());
        }
        due
    }
}

/// Moments with what was done then, over the last few seconds.
#[derive(Debug, Default)]
struct Recent(Vec<(Instant, u64)>);

impl Recent {
    fn rate(&mut self, done: u64) -> f64 {
        let now = Instant::now();
        self.0.push((now, done));
        // The oldest moment that is still recent enough, and the one before it.
        while self.0.len() > 2 && now - self.0[1].0 > RECENT {
            self.0.remove(0);
        }
        let (then, before) = self.0[0];
        let seconds = (now - then).as_secs_f64();
        if seconds > 0.0 { done.saturating_sub(before) as f64 / seconds } else { 0.0 }
    }
}

/// What is done of a pass at most, as it was shown: rows that are merged away, or counted a moment later, do not take it back.
#[derive(Debug, Default)]
pub(crate) struct Most {
    pass: u32,
    done: Done,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Done {
    pub ids: u64,
    batches: u64,
}

impl Most {
    /// What was done at most, this look at the run among them.
    pub fn of(&mut self, status: &Status) -> Done {
        if self.pass != status.pass {
            *self = Self { pass: status.pass, done: Done::default() };
        }
        let Done { ids, batches } = Done::of(status);
        self.done = Done { ids: ids.max(self.done.ids), batches: batches.max(self.done.batches) };
        self.done
    }
}

impl Done {
    /// While ids are being published, most batches are neither done nor waiting: those that are done are told by their rows.
    fn of(status: &Status) -> Self {
        let Status { ids, done, batches, .. } = status;
        let unfinished = status.in_flight + status.pending + status.to_store;
        let finished = match status.state {
            RunState::Publishing => {
                (u128::from(*done) * u128::from(*batches) / u128::from((*ids).max(1))) as u64
            }
            // The two counts are of two moments; no batch is done without an id of it.
            _ => batches.saturating_sub(unfinished).min(*done),
        };
        Self { ids: *done, batches: finished }
    }
}

fn described(
    status: &Status,
    done: Done,
    rate: f64,
    number: fn(u64) -> String,
    time: fn(f64) -> String,
) -> String {
    let Status { ids, batches, dead, state, .. } = status;
    let eta = match rate {
        _ if *state != RunState::Running => state.to_string(),
        _ if done.ids >= *ids && *ids > 0 => "proving".to_owned(),
        rate if rate > 0.0 => format!("ETA {}", time(ids.saturating_sub(done.ids) as f64 / rate)),
        _ => "ETA ?".to_owned(),
    };
    format!(
        "{}/{} ids, {}/{} batches, {} ids/s, {eta}, {} dead",
        number(done.ids),
        number(*ids),
        number(done.batches),
        number(*batches),
        number(rate as u64),
        number(*dead),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Status {
        Status {
            run: "a".parse().expect("legal"),
            pass: 1,
            state: RunState::Running,
            source: String::new(),
            batches: 9_999,
            ids: 9_994_999_999,
            done: 9_984_999_999,
            dead: 9_999,
            dead_sealed: None,
            in_flight: 0,
            pending: 0,
            redelivered: 0,
            to_store: 0,
            lag_rows: 0,
            lag_bytes: 0,
            ids_per_second: 0.0,
            ids_per_second_now: 0.0,
            eta_seconds: None,
            eta_range_seconds: None,
            seconds: 0.0,
            oldest_batch_seconds: None,
            priority: 0,
            rate: None,
            max_dead: None,
            paused_for: None,
            asking: 0,
            asking_why: None,
            hosts: Vec::new(),
            summary: None,
            summary_fault: None,
            base_gone: None,
            verdict: None,
            readers_see: false,
            readers: None,
            builds: Vec::new(),
            view_faults: Vec::new(),
            view_faults_unknown: None,
            stuck: Vec::new(),
            forgetting: false,
            sealed_at_ms: None,
            rows_sealed: None,
            missing: 0,
        }
    }

    #[test]
    fn the_line_fits_eighty_columns_at_its_longest() {
        let status = status();
        let text = described(&status, Done::of(&status), 1000.0, show::short, show::clock);
        assert_eq!(text, "9.98G/9.99G ids, 9,999/9,999 batches, 1,000 ids/s, ETA 2:46:40, 9,999 dead");
        assert!(" 100% ".len() + text.len() <= 80, "{text}");
    }

    /// At 10^9 ids the line said "14,063/15,385 batches" at first, then 12,798, 10,254, 722.
    #[test]
    fn the_line_never_runs_backwards_while_ids_are_published() {
        let mut most = Most::default();
        let mut shown = Vec::new();
        for published in 1..=100 {
            let status = Status {
                state: if published < 100 { RunState::Publishing } else { RunState::Running },
                ids: 100_000,
                batches: 100,
                done: published * 300,
                pending: published * 7 / 10,
                ..status()
            };
            shown.push(most.of(&status));
            let text = described(&status, most.done, 1000.0, show::grouped, show::duration);
            assert_eq!(text.contains("publishing"), published < 100, "{text}");
        }
        assert!(shown.is_sorted_by_key(|done| done.batches), "{shown:?}");
        assert_eq!((shown[0].batches, shown[98].batches), (0, 29));
        let fewer =
            most.of(&Status { state: RunState::Running, done: 10, batches: 100, pending: 90, ..status() });
        assert_eq!(fewer, most.done);
    }
}
