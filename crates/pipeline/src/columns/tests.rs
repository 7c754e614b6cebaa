use serde::Serialize;

use super::*;

#[derive(Serialize)]
struct Peak {
    steps: u32,
    peak: u128,
}

fn schema(columns: &[(&str, &str)]) -> Schema {
    Schema::parse(columns).expect("columns")
}

fn peaks() -> Schema {
    schema(&[("steps", "UInt32"), ("peak", "UInt128")])
}

#[test]
fn golden_bytes_of_two_rows() {
    let schema = peaks();
    let mut columns = Columns::of(&schema);
    columns.push(&schema, &Peak { steps: 7, peak: 1 << 64 }).expect("a row");
    columns.push_blank(&schema);
    let mut out = Vec::new();
    columns.write_native(&schema, &mut out);
    let mut want = b"\x05steps\x06UInt32\x07\0\0\0\0\0\0\0\x04peak\x07UInt128".to_vec();
    want.extend_from_slice(&(1u128 << 64).to_le_bytes());
    want.extend_from_slice(&[0; 16]);
    assert_eq!(out, want);
    assert!(columns.is_sound(&schema, 2));
    assert_eq!((columns.rows(), columns.bytes()), (2, 40));
}
