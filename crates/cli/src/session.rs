//! The servers of one command: those that are named, and the local stack for the others.

use anyhow::Context as _;
use millstream::Spec;
use millstream_engine::error::attach;
use millstream_engine::{Broker, Error, NatsAddress, Session, Store, StoreAddress};

use crate::config::Config;
use crate::progress::Progress;
use crate::show;

/// Who opens the local stack, if it is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holder {
    /// `run`: for itself alone, until it ends.
    Run,
    /// A short command that makes something: attaches, or starts the stack for the moment.
    Maker,
    /// A short command about what is there: attaches to a stack that there is, or starts it for the moment.
    Moment,
    /// A short command that asks ClickHouse alone.
    Question,
    /// A service: attaches to a stack that is up, and never starts one.
    Service,
}

/// Addresses of both servers, and what keeps the local ones up.
pub(crate) struct Servers {
    /// NATS; none for a [`Holder::Question`].
    pub nats: Option<NatsAddress>,
    pub store: StoreAddress,
    /// Whether both were started for this command, so that no other process uses them.
    pub own: bool,
    /// Whether one of them was, so that no other process can come to it while this command lasts.
    pub started: bool,
    #[cfg(feature = "local")]
    stack: Option<millstream_local::Stack>,
}

impl Servers {
    /// Finds both servers, and starts those that are not named.
    pub async fn find(config: &Config, holder: Holder, progress: &Progress) -> anyhow::Result<Self> {
        match &config.clickhouse {
            Some(store) if config.nats.is_some() || holder == Holder::Question => Ok(Self {
                nats: config.nats.clone(),
                store: store.clone(),
                own: false,
                started: false,
                #[cfg(feature = "local")]
                stack: None,
            }),
            _ => Self::local(config, holder, progress).await,
        }
    }

    #[cfg(not(feature = "local"))]
    async fn local(_: &Config, _: Holder, _: &Progress) -> anyhow::Result<Self> {
        anyhow::bail!(
            "no servers are named, and this build has no local stack\nhint: name them with --nats and --clickhouse"
        )
    }

    #[cfg(feature = "local")]
    async fn local(config: &Config, holder: Holder, progress: &Progress) -> anyhow::Result<Self> {
        use millstream_local::Owner;

        let asks = matches!(holder, Holder::Moment | Holder::Question | Holder::Service);
        if asks && !millstream_local::is_there(&config.data) {
            return Err(no_stack(config, holder));
        }
        // Starting one to find that out would keep others from it meanwhile.
        if holder == Holder::Service && !millstream_local::is_held(&config.data) {
            return Err(no_stack(config, holder));
        }
        let owner = if holder == Holder::Run { Owner::Run } else { Owner::Moment };
        let needs = Needs {
            nats: config.nats.is_none() && holder != Holder::Question,
            clickhouse: config.clickhouse.is_none(),
        };
        let stack = open_stack(config, owner, needs, (0, 0), progress).await?;
        if holder == Holder::Service && !stack.attached() {
            stack.stop().await?;
            return Err(no_stack(config, holder));
        }
        let origin = format!("local stack in `{}`", config.data.display());
        let local_nats =
            |url: &str| NatsAddress { url: url.to_owned(), origin: origin.clone(), ..NatsAddress::default() };
        let nats = config.nats.clone().or_else(|| stack.nats_url().map(local_nats));
        let store = config.clickhouse.clone().unwrap_or_else(|| StoreAddress {
            url: stack.clickhouse_url().unwrap_or_default().to_owned(),
            user: String::new(),
            password: String::new(),
            environment: config.environment.clone(),
            origin: origin.clone(),
        });
        let started = !stack.attached();
        let own = started && needs.nats && needs.clickhouse;
        Ok(Self { nats, store, own, started, stack: Some(stack) })
    }

    /// The addresses alone, for the work that goes on while these are kept up.
    pub fn addresses(&self) -> Self {
        Self {
            nats: self.nats.clone(),
            store: self.store.clone(),
            own: self.own,
            started: self.started,
            #[cfg(feature = "local")]
            stack: None,
        }
    }

    /// Resolves when a local server cannot be kept up, with the reason.
    pub async fn failed(&mut self) -> anyhow::Error {
        #[cfg(feature = "local")]
        if let Some(stack) = &mut self.stack {
            return stack.failed().await.into();
        }
        std::future::pending().await
    }

    /// Connects to both.
    pub async fn connect(&self, spec: &Spec, role: &str) -> anyhow::Result<(Broker, Store)> {
        let nats = self.nats.as_ref().context("no NATS server is known to this command")?;
        let broker = Broker::connect(nats, spec.name, self.store.environment.clone(), role).await?;
        Ok((broker, Store::connect(spec, self.store.clone()).await?))
    }

    /// Stops what was started for this command.
    pub async fn close(self) -> anyhow::Result<()> {
        #[cfg(feature = "local")]
        if let Some(stack) = self.stack {
            stack.stop().await?;
        }
        Ok(())
    }
}

/// Why a command that makes no stack cannot go on without one.
#[cfg(feature = "local")]
fn no_stack(config: &Config, holder: Holder) -> anyhow::Error {
    let data = config.data.display();
    let named = match (&config.nats, &config.clickhouse) {
        (Some(_), None) => "ClickHouse is not named",
        (None, Some(_)) => "NATS is not named",
        _ => "no servers are named",
    };
    let text = match holder {
        Holder::Service => format!(
            "{named}, and the local stack of `{data}` is not up\nhint: start `up` in another terminal, or name \
             the servers with --nats and --clickhouse"
        ),
        _ => format!(
            "{named}, and there is no local stack in `{data}`\nhint: name the directory of one with --data, or \
             the servers with --nats and --clickhouse; `up`, `run` and `produce` make a stack"
        ),
    };
    crate::Usage(text).into()
}

/// Which servers the local stack is to provide.
#[cfg(feature = "local")]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Needs {
    pub nats: bool,
    pub clickhouse: bool,
}

#[cfg(feature = "local")]
pub(crate) async fn open_stack(
    config: &Config,
    owner: millstream_local::Owner,
    needs: Needs,
    (nats_port, clickhouse_port): (u16, u16),
    progress: &Progress,
) -> anyhow::Result<millstream_local::Stack> {
    let options = millstream_local::Options {
        data: config.data.clone(),
        nats_port,
        clickhouse_port,
        need_nats: needs.nats,
        need_clickhouse: needs.clickhouse,
        owner,
        exe: None,
    };
    let shown = progress.clone();
    Ok(millstream_local::open(options, std::sync::Arc::new(move |event| shown.stack_event(event))).await?)
}

/// Connects to both servers; `None` where nothing has been set up for this pipeline. A view that is missing is named,
/// and hinders its readers alone.
pub(crate) async fn find(servers: &Servers, spec: &Spec, role: &str) -> anyhow::Result<Option<Session>> {
    let (broker, store) = servers.connect(spec, role).await?;
    if !broker.is_set_up().await? {
        return Ok(None);
    }
    let missing = store.missing().await?;
    let needed = store.tables().needed_names();
    let (tables, others): (Vec<String>, Vec<String>) =
        missing.into_iter().partition(|name| needed.contains(name));
    if !tables.is_empty() {
        store.refuse_detached(tables.clone()).await?;
        let pipeline = spec.name.to_owned();
        let database = store.tables().database().to_owned();
        return Err(Error::TablesMissing { pipeline, database, missing: tables }.into());
    }
    let detached = store.detached(&others).await?;
    for name in others.iter().map(|name| store.tables().full_name(name)) {
        show::note(&if detached.contains(&name) {
            format!("{name} is detached: `{}` in ClickHouse brings it back", attach(&name))
        } else {
            format!("{name} is missing: `setup` makes it")
        });
    }
    Ok(Some(Session::open(broker, store).await?))
}

/// The same for a command about a run, which there cannot be where nothing has been set up.
pub(crate) async fn of_run(servers: &Servers, spec: &Spec, role: &str, run: &str) -> anyhow::Result<Session> {
    let found = find(servers, spec, role).await?;
    Ok(found.ok_or_else(|| Error::NoSuchRun { run: run.to_owned(), known: Vec::new() })?)
}

/// The same for a run whose tables may be gone: those are created.
pub(crate) async fn of_tables(
    servers: &Servers,
    spec: &Spec,
    role: &str,
    run: &str,
) -> anyhow::Result<Session> {
    let (broker, store) = servers.connect(spec, role).await?;
    if !broker.has_streams().await? {
        return Err(Error::NoSuchRun { run: run.to_owned(), known: Vec::new() }.into());
    }
    store.setup().await?;
    Ok(Session::open(broker, store).await?)
}

/// Connects to both servers and creates there what is missing.
pub(crate) async fn set_up(
    servers: &Servers,
    spec: &Spec,
    config: &Config,
    role: &str,
) -> anyhow::Result<Session> {
    let (broker, store) = servers.connect(spec, role).await?;
    // The table first: a pipeline whose columns do not fit leaves no streams behind.
    store.setup().await?;
    store.check_summary().await?;
    if matches!(role, "sink" | "run") {
        tell_views(&store).await?;
    }
    broker.setup(&config.limits).await?;
    Ok(Session::open(broker, store).await?)
}

/// Says what else sees rows as they are inserted, before there are any.
async fn tell_views(store: &Store) -> anyhow::Result<()> {
    let views = store.look_at_views().await?;
    if !views.is_empty() {
        tracing::info!(views = views.join(", "), "{}", show::FED);
    }
    for fault in store.broken_views(&views).await? {
        tracing::warn!("materialized view {fault}");
    }
    Ok(())
}
