//! Keeping one server up.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep};

use crate::data;
use crate::error::Error;
use crate::event::{Event, Progress, Server};
use crate::nats::{self, Health};
use crate::program::{Program, Ready, Running};

const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// A server that dies sooner after its first answer counts as a start that failed.
const CAME_UP: Duration = Duration::from_secs(1);
const MOST_FAILURES: u32 = 10;
const PROBE_EVERY: Duration = Duration::from_secs(30);

/// One server and what is needed to start it again.
pub(crate) struct Keeper {
    pub(crate) program: Program,
    /// JetStream's directory, for nats-server.
    pub(crate) store: Option<PathBuf>,
    pub(crate) exe: PathBuf,
    pub(crate) progress: Progress,
    pub(crate) stop: watch::Receiver<bool>,
}

/// Why a server is not running any more.
enum End {
    Asked,
    Died(String),
}

impl Keeper {
    pub(crate) async fn start(&self) -> Result<Running, Error> {
        self.program.start(&self.exe).await
    }

    /// Restarts the server whenever it dies, until told to stop; ends with an error when it does not come up any more.
    pub(crate) async fn keep(mut self, mut running: Running) -> Result<(), Error> {
        let mut failures = 0;
        loop {
            let since = Instant::now();
            let why = match self.watch(&mut running).await {
                End::Asked => return Ok(()),
                End::Died(why) => why,
            };
            failures = if since.elapsed() >= CAME_UP { 0 } else { failures + 1 };
            tracing::warn!(server = %self.program.server, why, "died, starting it again");
            (self.progress)(Event::Died { server: self.program.server, why: why.clone() });
            let died = Error::Start { server: self.program.server, how: why, log: self.program.tail() };
            running = match self.restart(&mut failures, died).await? {
                Some(running) => running,
                None => return Ok(()),
            };
            (self.progress)(Event::Restarted { server: self.program.server });
        }
    }

    /// `None` when told to stop.
    async fn restart(&mut self, failures: &mut u32, mut last: Error) -> Result<Option<Running>, Error> {
        loop {
            if *failures >= MOST_FAILURES {
                let server = self.program.server;
                return Err(Error::KeepUp { server, attempts: *failures, last: Box::new(last) });
            }
            if self.stops_within(backoff(*failures)).await {
                return Ok(None);
            }
            let started = tokio::select! {
                started = self.program.start(&self.exe) => started,
                () = stopped(&mut self.stop) => return Ok(None),
            };
            match started {
                Ok(running) => return Ok(Some(running)),
                Err(error) => {
                    *failures += 1;
                    tracing::warn!(server = %self.program.server, failures, "failed to {error}");
                    let why = error.to_string();
                    (self.progress)(Event::NotRestarted { server: self.program.server, why });
                    last = error;
                }
            }
        }
    }

    async fn stops_within(&mut self, wait: Duration) -> bool {
        tokio::select! {
            () = sleep(wait) => false,
            () = stopped(&mut self.stop) => true,
        }
    }

    async fn watch(&mut self, running: &mut Running) -> End {
        let mut probes = interval_at(Instant::now() + PROBE_EVERY, PROBE_EVERY);
        probes.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                why = running.ended() => return End::Died(why),
                () = stopped(&mut self.stop) => {
                    running.stop().await;
                    return End::Asked;
                }
                _ = probes.tick() => if let Some(why) = self.probe().await {
                    running.stop().await;
                    return End::Died(why);
                }
            }
        }
    }

    /// Why the server must be restarted, if it must.
    async fn probe(&self) -> Option<String> {
        if let Err(error) = data::bound(&self.program.log) {
            tracing::warn!(log = %self.program.log.display(), %error, "cannot bound the log");
        }
        let (Some(store), Ready::Nats { http, .. }) = (&self.store, &self.program.ready) else { return None };
        match nats::health(*http, store).await {
            Health::Fine => None,
            Health::Frozen { why, restart: true } => Some(why),
            Health::Frozen { why, restart: false } => {
                let why =
                    format!("{why}; it is started again once {} MB are free", nats::FREE_FOR_RESTART >> 20);
                tracing::warn!(server = %Server::Nats, why, "stuck until there is space on the disk");
                (self.progress)(Event::Stuck { server: Server::Nats, why });
                None
            }
        }
    }
}

/// Resolves when the stack is being stopped, or its handle is gone.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone, which asks for the same.
    drop(stop.wait_for(|stop| *stop).await);
}

fn backoff(failures: u32) -> Duration {
    (FIRST_WAIT * 2_u32.pow(failures.min(MOST_FAILURES))).min(LONGEST_WAIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_ten_seconds() {
        let waits: Vec<u128> = (0..8).map(|failures| backoff(failures).as_millis()).collect();
        assert_eq!(waits, [200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
    }
}
