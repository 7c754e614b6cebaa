//! The views for readers: they are kept in step with their table, and checked for a pass's rows.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use clickhouse::Row;
use serde::{Deserialize, Serialize};

use super::{ANSWER_WITHIN, PROOF_WITHIN, Store, within};
use crate::clickhouse::sql::{Tables, View};
use crate::error::{Code, Error, StoreFault, full_cause};

use millstream::names::PassId;

/// Whether readers see a pass.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Sight {
    /// Whether the view returns the rows of the pass.
    pub sees: bool,
    /// Whether the view shows other columns or types than its table has.
    pub lags: bool,
    /// Why readers do not see the pass, and what helps; or what is wrong with a view that does return the rows.
    pub why: Option<String>,
}

/// Rows of a pass that one build computed.
#[derive(Debug, Clone, PartialEq, Eq, Row, Serialize, Deserialize)]
pub struct BuildRows {
    /// The name of the build.
    pub build: String,
    /// The number of rows, with raw duplicates.
    pub rows: u64,
    /// The hosts that ran the build.
    pub hosts: Vec<String>,
}

impl Store {
    /// Remembers whether an INSERT of rows fills an operator's materialized views.
    pub(super) fn note_fed(&self, is_fed: bool) {
        self.feeds_views.store(is_fed, Ordering::Relaxed);
    }

    /// The operator's materialized views that read the rows table, quoted. If there are any, inserts get a
    /// longer time limit from now on.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn look_at_views(&self) -> Result<Vec<String>, Error> {
        let found = self.look().await?;
        Ok(found
            .fed()
            .iter()
            .map(|(database, name)| crate::clickhouse::sql::full_name(database, name))
            .collect())
    }

    /// The materialized views that cannot be filled, because their target table is gone or has other columns,
    /// each with its fault.
    ///
    /// # Errors
    /// [`Error::Store`] when the server does not answer.
    pub async fn broken_views(&self, views: &[String]) -> Result<Vec<String>, Error> {
        let mut broken = Vec::new();
        for view in views {
            match self.answer::<u8>(&Tables::probe(view)).await {
                Ok(_) => {}
                // A sink may fill the view without a right to read it.
                Err(fault) if fault.is_denied() => {}
                Err(fault @ StoreFault::Exception { .. }) => {
                    broken.push(format!("{view} cannot be filled, and gets no rows: {fault}"));
                }
                Err(fault) => return Err(self.failed("read a materialized view", fault)),
            }
        }
        Ok(broken)
    }

    /// Creates missing views, and recreates those that differ from their table. If this process may not, it
    /// logs that once for each state of the table.
    ///
    /// # Errors
    /// [`Error::Store`], except for a view that this process may not recreate.
    pub async fn follow_views(&self) -> Result<(), Error> {
        let found = self.look().await?;
        let stale = self.stale(&found);
        for view in View::ALL {
            let name = self.tables.view_name(view);
            let is_stale = stale.contains(&view);
            if !is_stale && found.has(&name) {
                continue;
            }
            let wanted = self.tables.view_columns(view, found.rows());
            let before =
                self.tried.lock().unwrap_or_else(PoisonError::into_inner).insert(view, wanted.clone());
            if is_stale && before.as_ref() == Some(&wanted) {
                continue;
            }
            let statement = self.tables.make_view(view, found.rows(), is_stale);
            let made = self.execute("create a view", &statement, ANSWER_WITHIN).await;
            match made {
                Ok(()) => {
                    if is_stale {
                        tracing::info!(
                            view = name,
                            "the view was recreated, because its table's columns have changed"
                        );
                    }
                }
                Err(Error::Store { source, .. }) if is_stale && source.is_denied() => tracing::warn!(
                    view = name,
                    %source,
                    hint = "run `setup` as a user with more rights",
                    code = %Code::ViewLags,
                    "the view shows other columns or types than its table has, and this user may not recreate it"
                ),
                Err(error) => {
                    self.tried.lock().unwrap_or_else(PoisonError::into_inner).remove(&view);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Calls [`Self::follow_views`] and logs a failure, for callers that do not depend on it.
    pub(crate) async fn try_follow_views(&self) {
        if let Err(error) = self.follow_views().await {
            tracing::warn!(error = full_cause(&error), "could not check whether the views match their table");
        }
    }

    /// Whether readers see a pass that has `ok` stored rows without dead letters. With `all` every row is
    /// counted, otherwise one is enough. Asks ClickHouse alone.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn sight(&self, pass: &PassId, ok: u64, all: bool) -> Result<Sight, Error> {
        let found = self.look().await?;
        let hidden = |why: String| Ok(Sight { why: Some(why), ..Sight::default() });
        let lacking = self.tables.all_names().into_iter().filter(|name| !found.has(name));
        let lacking: Vec<String> = lacking.map(|name| self.tables.full_name(&name)).collect();
        let is_missing = |name: &str| lacking.iter().any(|lacking| lacking == name);
        if is_missing(&self.tables.view()) || is_missing(&self.tables.passes()) {
            return hidden(missing(&lacking));
        }
        let newest: u32 = self.one("look up sealed passes", &self.tables.newest_sealed(&pass.run)).await?;
        if newest != pass.pass {
            let passes = self.tables.passes();
            let run = &pass.run;
            return hidden(match newest {
                0 => format!("{passes} has no row of it; `verify {run} --repair` brings it back"),
                newest => format!("{passes} says that pass {newest} is the newest sealed one"),
            });
        }
        if ok > 0 {
            let seen = self.client.query_raw(&self.tables.is_seen(&pass.run, all)).fetch_one::<u64>();
            match within(PROOF_WITHIN, seen).await {
                Ok(0) => return hidden(format!("view {} gives no row of it", self.tables.view())),
                Ok(seen) if all && seen != ok => {
                    return hidden(format!(
                        "view {} gives {seen} of its {ok} rows: it is not Millstream's view; `setup` recreates it",
                        self.tables.view()
                    ));
                }
                Ok(_) => {}
                Err(fault @ StoreFault::Exception { .. }) => {
                    return hidden(format!("view {} cannot be read: {fault}", self.tables.view()));
                }
                Err(fault) => return Err(self.failed("ask whether readers see a pass", fault)),
            }
        }
        let stale = self.stale(&found);
        let why = match (&stale[..], &lacking[..]) {
            ([], []) => None,
            ([], lacking) => Some(missing(lacking)),
            (stale, _) => Some(self.lag(stale)),
        };
        Ok(Sight { sees: true, lags: stale.contains(&View::Sealed), why })
    }

    /// Describes the views that differ from their table.
    pub fn lag(&self, stale: &[View]) -> String {
        let names: Vec<String> =
            stale.iter().map(|view| self.tables.full_name(&self.tables.view_name(*view))).collect();
        let (show, it) = if names.len() == 1 { ("shows", "it") } else { ("show", "them") };
        format!(
            "{} {show} other columns or types than {} has; `setup` recreates {it}",
            names.join(", "),
            self.tables.rows()
        )
    }

    /// The builds that computed rows of a pass.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn build_names(&self, pass: &PassId) -> Result<Vec<String>, Error> {
        let asked = self.client.query_raw(&self.tables.build_names(pass)).fetch_all();
        within(PROOF_WITHIN, asked).await.map_err(|fault| self.failed("look up the builds of a pass", fault))
    }

    /// Rows of a pass by the build that computed them.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn builds(&self, pass: &PassId) -> Result<Vec<BuildRows>, Error> {
        let asked = self.client.query_raw(&self.tables.builds(pass)).fetch_all();
        within(PROOF_WITHIN, asked).await.map_err(|fault| self.failed("count rows by build", fault))
    }
}

fn missing(names: &[String]) -> String {
    let are = if names.len() == 1 { "is" } else { "are" };
    format!("{} {are} missing; `setup` makes what is missing", names.join(", "))
}
