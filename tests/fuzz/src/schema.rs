//! The text form of a schema, which rows of another build bring along.

use millstream::schema::{MAX_TEXT, Schema};

/// Reads the input as a schema's text. What is accepted has one form: written again it is read as equal, with the same
/// fingerprint and columns.
pub fn schema(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let schema = match Schema::from_text(text) {
        Ok(schema) => schema,
        Err(faults) => {
            assert!(!faults.is_empty(), "refused without a reason");
            faults.iter().for_each(|fault| assert!(!fault.to_string().is_empty()));
            return;
        }
    };
    assert!(text.len() <= MAX_TEXT, "{} bytes are accepted", text.len());
    let again = schema.to_text();
    match Schema::from_text(&again) {
        Ok(read) => {
            assert_eq!(read, schema, "`{text}` is `{again}`");
            assert_eq!(read.to_text(), again);
            assert_eq!(read.fingerprint(), schema.fingerprint());
        }
        // Its own form may be longer than what was read, which no table has had.
        Err(faults) => assert!(again.len() > MAX_TEXT, "`{text}` is `{again}`: {faults:?}"),
    }
    assert_eq!(schema.hash_arguments().len(), schema.columns().len());
}
