//! What readers see: views that follow their table, and whether a pass is seen through them.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use clickhouse::Row;
use serde::{Deserialize, Serialize};

use super::{ANSWER_WITHIN, PROOF_WITHIN, Store, within};
use crate::clickhouse::sql::{Tables, View};
use crate::error::{Code, Error, StoreFault, full_cause};

/// Whether readers see a pass.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Sight {
    /// Whether the view gives its rows.
    pub sees: bool,
    /// Whether that view shows other columns or types than its table has.
    pub lags: bool,
    /// What stands in the way, and what helps; or what is wrong with a view although it gives them.
    pub why: Option<String>,
}

/// Rows of a pass that one build computed.
#[derive(Debug, Clone, PartialEq, Eq, Row, Serialize, Deserialize)]
pub struct BuildRows {
    /// The build.
    pub build: String,
    /// Its rows, raw duplicates counted.
    pub rows: u64,
    /// The hosts that it ran on.
    pub hosts: Vec<String>,
}

impl Store {
    /// Remembers whether an INSERT of rows fills materialized views of the operator's.
    pub(super) fn note_fed(&self, is_fed: bool) {
        self.feeds_views.store(is_fed, Ordering::Relaxed);
    }

    /// Materialized views of the operator's that read the rows table, in quotes. Inserts are given more time from then on
    /// if there are any.
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

    /// Materialized views that cannot be filled, as their target table is gone or has other columns: what is wrong with each.
    ///
    /// # Errors
    /// [`Error::Store`] when the server does not answer.
    pub async fn broken_views(&self, views: &[String]) -> Result<Vec<String>, Error> {
        let mut broken = Vec::new();
        for view in views {
            match self.answer::<u8>(&Tables::probe(view)).await {
                Ok(_) => {}
                // A sink may fill it without the right to read it.
                Err(fault) if fault.is_denied() => {}
                Err(fault @ StoreFault::Exception { .. }) => {
                    broken.push(format!("{view} cannot be filled, and gets no rows: {fault}"));
                }
                Err(fault) => return Err(self.failed("look at a materialized view", fault)),
            }
        }
        Ok(broken)
    }

    /// Creates views that are missing, and makes those anew that lag behind their table. Where this process may not, it
    /// says so once for each state of the table.
    ///
    /// # Errors
    /// [`Error::Store`], but not for a view that may not be made anew.
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
            let made = self.execute("make a view", &statement, ANSWER_WITHIN).await;
            match made {
                Ok(()) => {
                    if is_stale {
                        tracing::info!(
                            view = name,
                            "the view was made anew over the columns that its table has now"
                        );
                    }
                }
                Err(Error::Store { source, .. }) if is_stale && source.is_denied() => tracing::warn!(
                    view = name,
                    %source,
                    hint = "a user with more rights runs `setup`",
                    code = %Code::ViewLags,
                    "the view shows other columns or types than its table has, and cannot be made anew from here"
                ),
                Err(error) => {
                    self.tried.lock().unwrap_or_else(PoisonError::into_inner).remove(&view);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// The same where nothing depends on it: a failure is logged.
    pub(crate) async fn try_follow_views(&self) {
        if let Err(error) = self.follow_views().await {
            tracing::warn!(error = full_cause(&error), "whether views lag behind their table is not known");
        }
    }

    /// Whether readers see a pass of which `ok` rows are stored that are no dead letters: any of them, or `all`, which are counted.
    /// Asked from ClickHouse alone.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn sight(&self, run: &str, pass: u32, ok: u64, all: bool) -> Result<Sight, Error> {
        let found = self.look().await?;
        let hidden = |why: String| Ok(Sight { why: Some(why), ..Sight::default() });
        let lacking = self.tables.all_names().into_iter().filter(|name| !found.has(name));
        let lacking: Vec<String> = lacking.map(|name| self.tables.full_name(&name)).collect();
        let is_missing = |name: &str| lacking.iter().any(|lacking| lacking == name);
        if is_missing(&self.tables.view()) || is_missing(&self.tables.passes()) {
            return hidden(missing(&lacking));
        }
        let newest: u32 = self.one("look up sealed passes", &self.tables.newest_sealed(run)).await?;
        if newest != pass {
            let passes = self.tables.passes();
            return hidden(match newest {
                0 => format!("{passes} has no row of it; `verify {run} --repair` brings it back"),
                newest => format!("{passes} says that pass {newest} is the newest sealed one"),
            });
        }
        if ok > 0 {
            let seen = self.client.query_raw(&self.tables.is_seen(run, all)).fetch_one::<u64>();
            match within(PROOF_WITHIN, seen).await {
                Ok(0) => return hidden(format!("view {} gives no row of it", self.tables.view())),
                Ok(seen) if all && seen != ok => {
                    return hidden(format!(
                        "view {} gives {seen} of its {ok} rows: it is another than ours; `setup` makes it anew",
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

    /// What is wrong with views that lag behind their table.
    pub fn lag(&self, stale: &[View]) -> String {
        let names: Vec<String> =
            stale.iter().map(|view| self.tables.full_name(&self.tables.view_name(*view))).collect();
        let (show, it) = if names.len() == 1 { ("shows", "it") } else { ("show", "them") };
        format!(
            "{} {show} other columns or types than {} has; `setup` makes {it} anew",
            names.join(", "),
            self.tables.rows()
        )
    }

    /// The builds that computed rows of a pass.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn build_names(&self, run: &str, pass: u32) -> Result<Vec<String>, Error> {
        let asked = self.client.query_raw(&self.tables.build_names(run, pass)).fetch_all();
        within(PROOF_WITHIN, asked).await.map_err(|fault| self.failed("look up the builds of a pass", fault))
    }

    /// Rows of a pass by the build that computed them.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn builds(&self, run: &str, pass: u32) -> Result<Vec<BuildRows>, Error> {
        let asked = self.client.query_raw(&self.tables.builds(run, pass)).fetch_all();
        within(PROOF_WITHIN, asked).await.map_err(|fault| self.failed("count rows by build", fault))
    }
}

fn missing(names: &[String]) -> String {
    let are = if names.len() == 1 { "is" } else { "are" };
    format!("{} {are} missing; `setup` makes what is missing", names.join(", "))
}
