//! The views for readers, over the columns of the rows table.
//!
//! A ClickHouse view keeps the column types of its creation and casts to them for ever: after a column was
//! widened, readers would get values modulo 2^32. So each view is compared with its table, and recreated.

use millstream::schema::OWN_COLUMNS;

use super::{Column, Tables, identifier};

/// One of the views for readers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum View {
    /// Shows the ok rows of the newest sealed pass of each run.
    Sealed,
    /// Shows all rows, also those of unsealed passes.
    Live,
    /// Shows dead letters.
    Dead,
}

impl View {
    /// All three views.
    pub const ALL: [Self; 3] = [Self::Sealed, Self::Live, Self::Dead];

    fn suffix(self) -> &'static str {
        match self {
            Self::Sealed => "",
            Self::Live => "_live",
            Self::Dead => "_dead",
        }
    }

    /// The columns of Millstream's own that the view shows.
    fn own(self) -> &'static [&'static str] {
        match self {
            Self::Sealed => &["run", "id"],
            Self::Live => &["run", "pass", "batch", "id", "status", "error", "host", "build", "computed_at"],
            Self::Dead => &["run", "pass", "batch", "id", "error", "host", "build", "computed_at"],
        }
    }
}

impl Tables {
    /// A view's name without quotes.
    pub fn view_name(&self, view: View) -> String {
        format!("{}{}", self.pipeline, view.suffix())
    }

    /// The columns of a view over a rows table with the columns `table`: some of our own, then all others. The
    /// newest version of the pipeline or an operator may have added some of these.
    pub fn view_columns(&self, view: View, table: &[Column]) -> Vec<Column> {
        let own = view.own().iter().filter_map(|own| table.iter().find(|column| column.name == *own));
        let is_ours = |column: &&Column| OWN_COLUMNS.iter().any(|(own, _)| column.name == *own);
        let others = table.iter().filter(|column| column.is_readable() && !is_ours(column));
        let others = others.filter(|_| view != View::Dead);
        own.chain(others).map(|column| Column::plain(&column.name, &column.kind)).collect()
    }

    /// The statement that creates a view over a rows table with the columns `table`. With `in_place` it
    /// replaces the old view atomically: readers see one or the other.
    pub fn make_view(&self, view: View, table: &[Column], in_place: bool) -> String {
        let columns: Vec<String> =
            self.view_columns(view, table).iter().map(|column| identifier(&column.name)).collect();
        let columns = columns.join(", ");
        let rows = self.rows();
        let create = if in_place { "CREATE OR REPLACE VIEW" } else { "CREATE VIEW IF NOT EXISTS" };
        // Raw duplicates appear when a paused sink wakes, even after the seal; only FINAL hides them at all
        // times.
        let which = match view {
            View::Sealed => format!(
                " WHERE status = 'ok' AND (run, pass) IN (SELECT run, max(pass) FROM {} GROUP BY run)",
                self.passes()
            ),
            View::Live => String::new(),
            View::Dead => " WHERE status = 'dead'".to_owned(),
        };
        format!("{create} {} AS SELECT {columns} FROM {rows} FINAL{which}", self.table(view.suffix()))
    }
}
