//! `tune`: how fast this machine computes, by threads and by the size of batches.

use std::time::Duration;

use millstream::Id;
use millstream_engine::compute::Function;
use millstream_engine::observe::tune::{Measured, tune as measure};
use millstream_engine::produce::input::Sample;
use millstream_engine::produce::sample::{Choice, Limits, choose};
use millstream_engine::{Error, Stop};
use serde_json::json;

use super::Context;
use crate::args::{ProduceArgs, SampledArgs, SourceArgs, TuneArgs};
use crate::input::{Ids, Words};
use crate::{Ended, Usage, show};

/// What a server takes in one message where none is asked: the local stack's limit, and that of `deploy/`.
const MAX_PAYLOAD: usize = 8 << 20;
/// Symbols of the longest bar.
const BAR: f64 = 40.0;

pub(super) async fn tune<I: Id>(
    context: &Context,
    function: &Function<I>,
    args: &TuneArgs,
) -> anyhow::Result<Ended> {
    let TuneArgs { sampled: SampledArgs { ids, file }, column, r#for: time, json, .. } = args.clone();
    let source = SourceArgs { ids, file, ..SourceArgs::default() };
    let given =
        ProduceArgs { source, column, run: None, batch: "auto".to_owned(), json, ..ProduceArgs::default() };
    let read = Words::check(&given)?.read::<I>(&given, &context.progress).await?;
    let Some(ids) = read else { return Err(Usage("--ids or --file is needed".to_owned()).into()) };
    let stop = Stop::new();
    let progress = context.progress.clone();
    context.on_signal(&stop, move |_| progress.note("stopping; a second signal leaves at once"));
    let mut cells = Vec::new();
    let outcome = look(context, function, &ids, time, &stop, &mut cells).await;
    let choice = match outcome {
        Ok(choice) => Some(choice),
        Err(Error::Stopped) => None,
        Err(error) => return Err(error.into()),
    };
    report(context.spec.name, &ids.input.shown(), &cells, choice.as_ref(), json);
    Ok(if choice.is_some() { Ended::Well } else { Ended::Interrupted })
}

/// Measures, and chooses what `--batch auto` would.
async fn look<I: Id>(
    context: &Context,
    function: &Function<I>,
    ids: &Ids<I>,
    time: Duration,
    stop: &Stop,
    cells: &mut Vec<Measured>,
) -> Result<Choice, Error> {
    let Context { config, progress, .. } = context;
    let (plan, sample): (_, &Sample<I>) = (&config.work, &ids.sample);
    let _step = progress.step("computing a sample at several sizes of batches");
    measure(function, plan, sample, time, stop, |cell| cells.push(cell)).await?;
    let limits = Limits { ids: ids.survey.ids, threads: plan.threads, max_payload: MAX_PAYLOAD };
    choose(function, plan, sample.clone(), &limits, stop).await
}

fn report(pipeline: &str, source: &str, cells: &[Measured], choice: Option<&Choice>, as_json: bool) {
    let best = cells.iter().max_by(|a, b| a.ids_per_second.total_cmp(&b.ids_per_second));
    if as_json {
        return show::json(&json!({
            "pipeline": pipeline, "source": source, "measured": cells, "best": best, "auto": choice,
        }));
    }
    let Some(best) = best else { return show::line("nothing was measured: no id was done in the time") };
    show::line(&format!("`{pipeline}` on {source}, computed and encoded, nothing stored\n"));
    show::line(&plot(cells, best.ids_per_second));
    show::line(&format!(
        "\nbest: {}, batches of {}: {} ids/s",
        show::counted(best.threads as u64, "thread"),
        show::counted(u64::from(best.batch_ids), "id"),
        show::grouped(best.ids_per_second as u64),
    ));
    if let Some(choice) = choice {
        show::line(&format!("--batch auto: {}", show::choice(choice)));
    }
}

/// A table with a bar for each figure.
fn plot(cells: &[Measured], most: f64) -> String {
    let rows: Vec<Vec<String>> = cells
        .iter()
        .map(|cell| {
            let Measured { threads, batch_ids, ids_per_second, .. } = *cell;
            // As a worker has it: all threads on one batch.
            let batch = f64::from(batch_ids) / ids_per_second * 1e9;
            vec![
                threads.to_string(),
                show::grouped(u64::from(batch_ids)),
                show::grouped(ids_per_second as u64),
                show::nanos(batch as u64),
                "█".repeat((ids_per_second / most * BAR).round() as usize),
            ]
        })
        .collect();
    show::table(&["threads", "ids a batch", "ids/s", "a batch", ""], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plot_has_a_bar_for_each_figure() {
        let cell = |batch_ids, ids_per_second| Measured { threads: 2, batch_ids, ids_per_second, batches: 9 };
        let shown = plot(&[cell(1, 500.0), cell(1_024, 2_000.0)], 2_000.0);
        let expected = format!(
            "threads  ids a batch  ids/s  a batch\n      2            1    500   2.0 ms  {}\n      2        1,024  2,000   512 ms  {}",
            "█".repeat(10),
            "█".repeat(40)
        );
        assert_eq!(shown, expected);
    }
}
