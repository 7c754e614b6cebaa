//! Counts how often each kind of trouble happened in a simulation.

/// Counts of events. A model in which nothing happens would prove nothing.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub deaths: u64,
    pub pauses: u64,
    pub redeliveries: u64,
    pub cuts_followed: u64,
    pub looks: u64,
    pub inserts_unclear: u64,
    pub lies: u64,
    pub doubled: u64,
    pub late_rows: u64,
}

impl Tally {
    fn each(&mut self) -> [&mut u64; 9] {
        let Self {
            deaths,
            pauses,
            redeliveries,
            cuts_followed,
            looks,
            inserts_unclear,
            lies,
            doubled,
            late_rows,
        } = self;
        [deaths, pauses, redeliveries, cuts_followed, looks, inserts_unclear, lies, doubled, late_rows]
    }

    pub fn add(&mut self, mut other: Self) {
        self.each().into_iter().zip(other.each()).for_each(|(sum, more)| *sum += *more);
    }

    pub fn each_is_more_than(&mut self, least: u64) -> bool {
        self.each().into_iter().all(|count| *count > least)
    }
}
