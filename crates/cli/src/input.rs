//! Ids from flags, files, standard input and queries.
//!
//! What cannot be read twice (standard input, a pipe, a query's answer) is kept in a temporary file, so that every bad line
//! is found before anything is published, and memory does not depend on the number of ids. Whatever may wait for another
//! program is read on a thread that this process does not wait for.

mod spool;
mod words;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use millstream::Id;
use millstream_engine::Store;
use millstream_engine::error::Error;
use millstream_engine::produce::input::{Form, Input, Sample, Survey, aside};

use crate::args::{ProduceArgs, SourceArgs};
use crate::progress::Progress;
use crate::show;

pub(crate) use words::{Words, parse_range};

/// An input that was read once and found sound.
#[derive(Debug)]
pub(crate) struct Ids<I> {
    pub input: Input,
    pub survey: Survey,
    pub sample: Sample<I>,
}

impl Words {
    /// Reads the ids, unless ClickHouse has them: what is wrong with them is told before any server is started.
    pub async fn read<I: Id>(
        &self,
        args: &ProduceArgs,
        progress: &Progress,
    ) -> anyhow::Result<Option<Ids<I>>> {
        let input = match (&self.range, &args.source) {
            (Some(range), _) => range.clone(),
            (_, SourceArgs { query: Some(_), .. }) => return Ok(None),
            (_, SourceArgs { file: Some(path), .. }) => {
                let shown = format!("file `{}`", path.display());
                let _step = spool::is_read_once(path).then(|| progress.step(&format!("reading {shown}")));
                let path = path.clone();
                let form = self.form.clone();
                aside("input", move || spool::open(&path, shown, form)).await??
            }
            _ => {
                let _step = progress.step("reading standard input");
                let form = self.form.clone();
                aside("input", move || spool::stdin(form)).await??
            }
        };
        survey::<I>(input, args, progress).await.map(Some)
    }

    /// Reads the ids that ClickHouse has.
    pub async fn ask<I: Id>(
        &self,
        args: &ProduceArgs,
        store: &Store,
        progress: &Progress,
    ) -> anyhow::Result<Ids<I>> {
        let query = args.source.query.as_deref().unwrap_or_default();
        let (kept, value) = {
            let _step = progress.step("reading the query's answer");
            spool::query::<I>(query, store).await?
        };
        let shown = format!("query `{}`", query.split_whitespace().collect::<Vec<_>>().join(" "));
        let input = Input::File { file: kept.into(), shown, form: Form::Rows(value) };
        survey::<I>(input, args, progress).await
    }
}

async fn survey<I: Id>(input: Input, args: &ProduceArgs, progress: &Progress) -> anyhow::Result<Ids<I>> {
    let long = matches!(input, Input::File { .. });
    let _step = long.then(|| progress.step(&format!("checking {}", input.shown())));
    let surveyed = input.clone();
    let skip = args.skip_bad.clone();
    let (survey, sample) = aside("input", move || match skip {
        None => Ok(surveyed.survey::<I>()?),
        Some(list) => survey_past_bad(&surveyed, list.as_deref()),
    })
    .await??;
    tell_passed_over(&survey, progress);
    Ok(Ids { input, survey, sample })
}

/// Lists all lines that are passed over in a file, where one is named.
fn survey_past_bad<I: Id>(input: &Input, list: Option<&Path>) -> anyhow::Result<(Survey, Sample<I>)> {
    let Some(path) = list else { return Ok(input.survey_past_bad(|_, _| Ok(()))?) };
    let unwritten = |source| Error::ListBad {
        input: format!("bad lines of {} into `{}`", input.shown(), path.display()),
        source,
    };
    let mut list = BufWriter::new(list_beside(input, path).map_err(unwritten)?);
    let surveyed = input
        .survey_past_bad(|line, fault| writeln!(list, "{line}\t{}", show::cell(fault)).map_err(unwritten))?;
    list.flush().map_err(unwritten)?;
    Ok(surveyed)
}

/// An empty file for the list, which is not the input.
fn list_beside(input: &Input, path: &Path) -> std::io::Result<File> {
    let list = File::options().write(true).create(true).truncate(false).open(path)?;
    let about = list.metadata()?;
    if let Input::File { file, .. } = input {
        let of_input = file.metadata()?;
        if (of_input.dev(), of_input.ino()) == (about.dev(), about.ino()) {
            return Err(std::io::Error::other("it is the input itself"));
        }
    }
    // A pipe or a terminal cannot be cut.
    if about.is_file() {
        list.set_len(0)?;
    }
    Ok(list)
}

fn tell_passed_over(survey: &Survey, progress: &Progress) {
    if survey.blank > 0 {
        progress.note(&format!("passed over {}", show::counted(survey.blank, "empty line")));
    }
    if survey.bad > 0 {
        let mut text = format!("passed over {}:", show::counted(survey.bad, "bad line"));
        for (line, fault) in &survey.first_bad {
            text += &format!("\n  {line}: {fault}");
        }
        let more = survey.bad - survey.first_bad.len() as u64;
        if more > 0 {
            text += &format!("\n  … and {} more (--skip-bad=FILE lists all)", show::grouped(more));
        }
        progress.note(&text);
    }
}
