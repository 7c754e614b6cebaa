//! Calls that `--help` shows of each command.

use clap::CommandFactory;

use super::Cli;

/// Calls that show how a command is used, by command, without the binary's name before them.
const EXAMPLES: &[(&str, &[&str])] = &[
    (
        "run",
        &[
            "run --ids 1..=10000000",
            "run --file ids.txt --run friday",
            "run --file users.csv --column id --skip-bad=bad.txt",
        ],
    ),
    (
        "produce",
        &[
            "produce --ids 1..=1000000 --run a",
            "produce --query \"SELECT id FROM users\"",
            "seq 100 | {} produce --stdin",
            "tail -f ids.log | {} produce --stdin --follow --run feed",
        ],
    ),
    ("work", &["work --nats nats://nats.internal:4222 --clickhouse http://clickhouse.internal:8123"]),
    ("up", &["up --nats-port 4222 --clickhouse-port 8123"]),
    ("status", &["status friday --watch", "status --json"]),
    ("verify", &["verify friday", "verify friday --repair --json"]),
    ("pause", &["pause friday"]),
    ("cancel", &["cancel friday"]),
    ("set", &["set friday --priority 3", "set friday --rate 500", "set friday --rate none"]),
    ("dead", &["dead friday --limit 1000", "dead friday --error 'timed out'", "dead friday --host b"]),
    (
        "replay",
        &[
            "replay friday",
            "replay friday --dead --error 'timed out'",
            "replay friday --where \"status = 'dead' OR id < 1000\"",
            "replay friday --where \"host = 'b' AND computed_at > '2026-11-25 18:00:00'\"",
            "replay friday --since 2h",
            "replay friday --batches 100..=199",
        ],
    ),
    ("rebuild", &["rebuild friday", "rebuild friday --database restored"]),
    ("forget", &["forget friday", "forget friday --pass 1"]),
    ("sql", &["sql \"SELECT count() FROM {}\"", "sql \"SELECT * FROM {}_dead FORMAT CSVWithNames\""]),
    ("tune", &["tune --ids 1..=10000000", "tune --file ids.txt --for 1m --json"]),
    ("setup", &["setup", "setup --yes"]),
    ("doctor", &["doctor --acknowledge", "doctor --nats nats://nats.internal:4222"]),
];

/// The command line of a pipeline's binary, with examples that can be typed as they stand.
pub(crate) fn command_line(name: &'static str) -> clap::Command {
    EXAMPLES.iter().fold(Cli::command().name(name).bin_name(name), |command, (of, calls)| {
        let calls = calls.iter().map(|call| {
            let call = call.replace("{}", name);
            if call.contains(" | ") { format!("\n  {call}") } else { format!("\n  {name} {call}") }
        });
        let examples = format!("Examples:{}", calls.collect::<String>());
        command.mut_subcommand(of, |command| command.after_help(examples))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        command_line("trial").debug_assert();
    }
}
