//! The scenarios, by what fails.

pub mod clickhouse;
pub mod cluster;
pub mod home;
pub mod machine;
pub mod merges;
pub mod namespaces;
pub mod nats;
pub mod net;
pub mod old_clickhouse;
pub mod outage;
pub mod power;
pub mod producer;
pub mod rows;
pub mod sealer;
pub mod sink;
pub mod steered;
pub mod streams;
pub mod worker;

use std::process::ExitCode;

/// The pipeline under test: squares, with ballast where a scenario needs large rows, or
/// with ids that are trouble; or one of the builds of `variant`.
pub fn pipeline() -> ExitCode {
    if std::env::var_os("TRIAL_ROGUE").is_some() {
        return millstream_cli::main(tests::Rogue);
    }
    if std::env::var_os(tests::variants::VARIABLE).is_some() {
        return tests::variants::main();
    }
    if std::env::var_os(crate::troubled::VARIABLE).is_some() {
        return millstream_cli::main(crate::troubled::Troubled);
    }
    match std::env::var("TRIAL_BALLAST").ok().and_then(|bytes| bytes.parse().ok()) {
        None | Some(0) => millstream_cli::main(tests::Trial),
        Some(bytes) => millstream_cli::main(heavy::Heavy { bytes }),
    }
}

mod heavy {
    //! Pipeline `trial` again, whose rows carry bytes that no compression makes smaller.

    use millstream::{Outcome, Pipeline};
    use serde::{Deserialize, Serialize};
    use tests::dice::Dice;

    pub struct Heavy {
        /// Of ballast in each row.
        pub bytes: usize,
    }

    #[derive(Debug, Serialize, Deserialize)]
    pub struct Row {
        squared: u64,
        ballast: String,
    }

    impl Pipeline for Heavy {
        const NAME: &'static str = tests::Trial::NAME;
        const COLUMNS: &'static [(&'static str, &'static str)] =
            &[("squared", "UInt64"), ("ballast", "String")];
        type Id = u64;
        type Row = Row;

        fn compute(&self, id: &u64) -> Outcome<Row> {
            let squared = tests::Trial.compute(id)?.squared;
            let mut dice = Dice::seeded(*id);
            let symbols = (0..self.bytes).map(|_| char::from(b' ' + dice.between(0, 95) as u8));
            Ok(Row { squared, ballast: symbols.collect() })
        }
    }
}
