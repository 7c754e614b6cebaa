//! The number and identity of a set of ids in sixteen bytes, independent of their order.

use std::fmt;
use std::ops::AddAssign;

use millstream::Id;
use serde::{Deserialize, Serialize};

/// A set of ids, identified by their number and by a sum over them. Two lists of the same ids have equal digests in any
/// order; an id that occurs twice counts twice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdDigest {
    /// How many ids.
    pub ids: u64,
    /// Wrapping sum of `sipHash64(id)` over the ids, as ClickHouse computes it for stored rows.
    #[serde(with = "decimal")]
    pub digest: u64,
}

impl IdDigest {
    /// The digest of these ids.
    pub fn of<'a, I: Id>(ids: impl IntoIterator<Item = &'a I>) -> Self {
        ids.into_iter().fold(Self::default(), |mut sum, id| {
            sum.add(id);
            sum
        })
    }

    /// Counts one more id.
    pub fn add<I: Id>(&mut self, id: &I) {
        *self += Self { ids: 1, digest: id.sip_hash() };
    }
}

impl AddAssign for IdDigest {
    fn add_assign(&mut self, more: Self) {
        self.ids += more.ids;
        self.digest = self.digest.wrapping_add(more.digest);
    }
}

/// The fingerprint of a list: equal texts mean equal ids.
impl fmt::Display for IdDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ids with digest {:016x}", self.ids, self.digest)
    }
}

pub(super) mod decimal {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_does_not_count_and_repeats_do() {
        let ids = [3u64, 1, 2];
        let mut sum = IdDigest::of(&ids[..1]);
        sum += IdDigest::of(&ids[1..]);
        assert_eq!(sum, IdDigest::of(&[1u64, 2, 3]));
        assert_ne!(sum, IdDigest::of(&[1u64, 2, 3, 3]));
        assert_ne!(sum, IdDigest::of(&[1u64, 2, 4]));
    }
}
