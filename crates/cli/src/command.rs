//! One file a command, and what they share: the context, the signals.

mod dead;
mod doctor;
mod finish;
mod follow;
mod forget;
mod produce;
mod rebuild;
mod replay;
mod run;
mod runs;
mod service;
mod setup;
mod sql;
mod status;
mod steer;
mod tune;
#[cfg(feature = "local")]
mod up;
mod verify;

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use millstream::names::{NameFault, RunName};
use millstream::{Id, Spec};
use millstream_engine::compute::{AnyFunction, Function};
use millstream_engine::{Metrics, Stop};
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{Cli, Command};
use crate::config::Config;
use crate::progress::Progress;
use crate::session::{Holder, Servers};
use crate::{Ended, Usage};

/// What every command has.
pub(crate) struct Context {
    pub spec: Arc<Spec>,
    pub config: Config,
    pub progress: Progress,
    /// Where this process counts what it does.
    pub metrics: Metrics,
    /// What a command on the same servers begins with.
    pub typed: String,
    signals: Signals,
}

/// What the first signal does; nothing once it came.
type First = Box<dyn FnOnce(Signal) + Send>;

/// What a signal does. Before a command has something to finish, it ends the process at once.
#[derive(Clone, Default)]
struct Signals(Arc<Mutex<Option<First>>>);

/// Which signal asked to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    /// Ctrl-C.
    Interrupt,
    /// What a service supervisor sends.
    Terminate,
}

impl Context {
    /// Reads the configuration and starts logging.
    pub fn start(spec: Arc<Spec>, cli: &Cli) -> anyhow::Result<Self> {
        let threads = match &cli.command {
            Command::Run(args) => args.work.threads,
            Command::Work(args) => args.threads,
            Command::Tune(args) => args.threads,
            _ => None,
        };
        let config = Config::read(&cli.options, threads, spec.limits)?;
        let progress = Progress::new();
        // Short commands have a result to show; what the log would say of the way there is noise.
        let quiet = matches!(
            cli.command,
            Command::Runs(_)
                | Command::Status(_)
                | Command::Verify(_)
                | Command::Dead(_)
                | Command::Pause(_)
                | Command::Resume(_)
                | Command::Cancel(_)
                | Command::Set(_)
                | Command::Replay(_)
                | Command::Forget(_)
                | Command::Rebuild(_)
                | Command::Sql(_)
                | Command::Doctor(_)
                | Command::Tune(_)
        );
        let filter =
            if quiet && cli.options.log.is_none() && config.log == "info" { "warn" } else { &config.log };
        crate::logs::start(filter, &progress.lines().clone());
        let typed = cli.options.typed();
        Ok(Self { spec, config, progress, metrics: Metrics::default(), typed, signals: Signals::default() })
    }

    /// Runs the command to its end.
    pub fn run(self, function: AnyFunction, command: &Command) -> anyhow::Result<Ended> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2) // it does I/O only: the cores belong to the compute pool
            .enable_all()
            .build()
            .context("failed to start the I/O threads")?;
        // As process 1 of a container it has no signals but those that it listens for.
        runtime.block_on(async { self.signals.listen() })?;
        match function {
            AnyFunction::Numbers(function) => runtime.block_on(Box::pin(self.dispatch(&function, command))),
            AnyFunction::Texts(function) => runtime.block_on(Box::pin(self.dispatch(&function, command))),
        }
    }

    /// From now on the first signal stops `stop`, and the second ends the process at once.
    pub fn on_signal(&self, stop: &Stop, first: impl FnOnce(Signal) + Send + 'static) {
        let stopping = stop.clone();
        let first = move |signal| {
            first(signal);
            stopping.stop_taking();
        };
        *self.signals.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(first));
    }

    async fn dispatch<I: Id>(&self, function: &Function<I>, command: &Command) -> anyhow::Result<Ended> {
        match command {
            Command::Run(args) => run::run(self, function, args).await,
            #[cfg(feature = "local")]
            Command::Up(args) => up::up(self, args).await,
            #[cfg(not(feature = "local"))]
            Command::Up(_) => Err(Usage("this build has no local stack".into()).into()),
            Command::Produce(args) if args.follow => follow::follow(self, function, args).await,
            Command::Produce(args) => produce::produce(self, function, args).await,
            Command::Work(_) => service::work(self, function).await,
            Command::Sink => service::sink::<I>(self).await,
            Command::Setup(args) => setup::setup(self, args).await,
            Command::Runs(args) => runs::runs(self, args.json).await,
            Command::Status(args) => status::status(self, args).await,
            Command::Pause(args) => steer::steer(self, args, steer::Word::Pause).await,
            Command::Resume(args) => steer::steer(self, args, steer::Word::Resume).await,
            Command::Cancel(args) => steer::steer(self, args, steer::Word::Cancel).await,
            Command::Set(args) => steer::set(self, args).await,
            Command::Verify(args) => verify::verify::<I>(self, args).await,
            Command::Dead(args) => dead::dead(self, args).await,
            Command::Replay(args) => replay::replay::<I>(self, args).await,
            Command::Forget(args) => forget::forget(self, args).await,
            Command::Rebuild(args) => rebuild::rebuild(self, args).await,
            Command::Sql(args) => sql::sql(self, args).await,
            Command::Doctor(args) => doctor::doctor(self, function, args).await,
            Command::Tune(args) => tune::tune(self, function, args).await,
        }
    }

    /// Finds the servers for a command, runs it on them, and closes what was opened. A local server that cannot be
    /// kept up ends the command.
    pub async fn on_servers<F>(
        &self,
        holder: Holder,
        work: impl FnOnce(ServersRef) -> F,
    ) -> anyhow::Result<Ended>
    where
        F: Future<Output = anyhow::Result<Ended>>,
    {
        let mut servers = {
            let local = self.config.nats.is_none() || self.config.clickhouse.is_none();
            let opening = || format!("opening the local stack in `{}`", self.config.data.display());
            let _step = local.then(|| self.progress.step(&opening()));
            Servers::find(&self.config, holder, &self.progress).await?
        };
        let shared = Arc::new(Servers::addresses(&servers));
        let ended = tokio::select! {
            ended = work(shared) => ended,
            error = servers.failed() => Err(error),
        };
        let closed = servers.close().await;
        let ended = ended?;
        closed?;
        Ok(ended)
    }
}

/// The name of a run as it was typed.
pub(crate) fn run_name(text: &str) -> Result<RunName, Usage> {
    text.parse().map_err(|fault: NameFault| Usage(fault.to_string()))
}

/// Addresses that a command uses while its servers are kept up elsewhere.
pub(crate) type ServersRef = Arc<Servers>;

impl Signals {
    /// Listens for as long as the process lives.
    fn listen(&self) -> anyhow::Result<()> {
        let mut interrupt = signal(SignalKind::interrupt()).context("failed to listen for Ctrl-C")?;
        let mut terminate = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
        let first = self.0.clone();
        // Not tracked: it must outlive every shutdown to hear the second signal, and ends with the process.
        #[expect(clippy::disallowed_methods, reason = "what ends with the process cannot be waited for")]
        drop(tokio::spawn(async move {
            let came = next_signal(&mut interrupt, &mut terminate).await;
            let first = first.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(first) = first {
                first(came);
                next_signal(&mut interrupt, &mut terminate).await;
            }
            crate::show::note("stopped at once");
            std::process::exit(130);
        }));
        Ok(())
    }
}

async fn next_signal(
    interrupt: &mut tokio::signal::unix::Signal,
    terminate: &mut tokio::signal::unix::Signal,
) -> Signal {
    tokio::select! {
        _ = interrupt.recv() => Signal::Interrupt,
        _ = terminate.recv() => Signal::Terminate,
    }
}
