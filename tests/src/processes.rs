//! What runs on this machine, as `/proc` tells it.

/// Process ids of all that runs.
fn pids() -> impl Iterator<Item = u32> {
    let entries = std::fs::read_dir("/proc").expect("/proc").flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Children of process `of` whose command line has this word.
pub fn children(of: u32, word: &str) -> Vec<u32> {
    let is_child = |pid: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok());
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        parent == Some(of) && line.contains(word)
    };
    pids().filter(is_child).collect()
}

/// Programs `sleep` that sleep for so many seconds: a number that one test alone uses.
pub fn sleeps(seconds: &str) -> Vec<u32> {
    let is_one = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        words.contains(&&b"sleep"[..]) && words.contains(&seconds.as_bytes())
    };
    pids().filter(is_one).collect()
}
