//! One line of progress on a terminal; sparse log lines elsewhere.

use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use millstream_engine::status::Status;

use crate::show;

/// How often a line is logged where there is no terminal.
const SPARSE: Duration = Duration::from_secs(10);
/// The rate shown is that of about this long.
const RECENT: Duration = Duration::from_secs(3);

/// Where progress is shown. Clones are the same.
#[derive(Clone)]
pub(crate) struct Progress {
    lines: MultiProgress,
    terminal: bool,
    download: Arc<Mutex<Option<ProgressBar>>>,
}

impl Progress {
    pub fn new() -> Self {
        Self {
            lines: MultiProgress::new(),
            terminal: std::io::stderr().is_terminal(),
            download: Arc::default(),
        }
    }

    /// For the logs, which must not tear the line.
    pub fn lines(&self) -> &MultiProgress {
        &self.lines
    }

    /// Begins the line of a run.
    pub fn run(&self) -> RunLine {
        let bar = self.terminal.then(|| {
            let style = ProgressStyle::with_template("{bar:24.cyan/dim} {percent:>3}% {msg}");
            let bar = ProgressBar::new(1).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            self.lines.add(bar)
        });
        RunLine { bar, logged: None, recent: Vec::new() }
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
                        let style = ProgressStyle::with_template("{bar:24.cyan/dim} {bytes}/{total_bytes} {msg}");
                        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
                        self.lines.add(ProgressBar::new(total).with_style(style))
                    });
                    bar.set_length(total);
                    bar.set_position(bytes);
                    bar.set_message(format!("fetching {server} once, {}", show::duration(elapsed.as_secs_f64())));
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
            Event::PassedOver { program, why } => tracing::info!("`{}` is passed over: it {why}", program.display()),
            Event::Waiting { what } => tracing::info!("waiting for {what}"),
            Event::Started { server, url } => tracing::debug!("{server} answers at {url}"),
            Event::Died { server, why } => tracing::warn!("{server} ended ({why}), starting it again"),
            Event::Restarted { server } => tracing::info!("{server} answers again"),
            Event::NotRestarted { server, why } => tracing::warn!("{server} could not be started again: {why}"),
            Event::Stuck { server, why } => tracing::error!("{server} refuses work: {why}"),
            Event::Attached { holder } => tracing::debug!(pid = holder.pid, "using the servers of another process"),
            _ => {}
        }
    }
}

/// The line of one run.
pub(crate) struct RunLine {
    bar: Option<ProgressBar>,
    logged: Option<Instant>,
    /// Moments with what was done then, over the last few seconds.
    recent: Vec<(Instant, u64)>,
}

impl RunLine {
    /// Shows where the run stands.
    pub fn show(&mut self, status: &Status) {
        let rate = self.rate(status.done);
        let text = describe(status, rate);
        match &self.bar {
            Some(bar) => {
                bar.set_length(status.ids.max(1));
                bar.set_position(status.done);
                bar.set_message(text);
            }
            None if self.logged.is_none_or(|logged| logged.elapsed() >= SPARSE) => {
                self.logged = Some(Instant::now());
                let percent = status.done * 100 / status.ids.max(1);
                tracing::info!("{percent} % of run `{}`: {text}", status.run);
            }
            None => {}
        }
    }

    /// Takes the line away.
    pub fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn rate(&mut self, done: u64) -> f64 {
        let now = Instant::now();
        self.recent.push((now, done));
        // The oldest moment that is still recent enough, and the one before it.
        while self.recent.len() > 2 && now - self.recent[1].0 > RECENT {
            self.recent.remove(0);
        }
        let (then, before) = self.recent[0];
        let seconds = (now - then).as_secs_f64();
        if seconds > 0.0 { done.saturating_sub(before) as f64 / seconds } else { 0.0 }
    }
}

fn describe(status: &Status, rate: f64) -> String {
    let Status { ids, done, batches, dead, .. } = status;
    let unfinished = status.in_flight + status.pending + status.to_store;
    let eta = match rate {
        _ if done >= ids && *ids > 0 => "proving".to_owned(),
        rate if rate > 0.0 => format!("ETA {}", show::duration(ids.saturating_sub(*done) as f64 / rate)),
        _ => "ETA unknown".to_owned(),
    };
    format!(
        "{}/{} ids, {}/{} batches, {} ids/s, {eta}, {} dead",
        show::grouped(*done),
        show::grouped(*ids),
        show::grouped(batches.saturating_sub(unfinished)),
        show::grouped(*batches),
        show::grouped(rate as u64),
        show::grouped(*dead),
    )
}
