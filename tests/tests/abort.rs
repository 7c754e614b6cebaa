//! A pipeline built with `panic = "abort"`: a panic ends the process that computes, and costs what it does elsewhere.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tests::guest::VARIABLE;
use tests::{Host, SOON};

/// The program of pipeline `guest` with that panic strategy.
///
/// It is linked from the libraries that this test was built with: for a profile of its own, cargo would compile every
/// dependency a second time. What counts is the strategy of the program, as it decides what a panic does.
fn program(directory: &Path) -> PathBuf {
    let this = std::env::current_exe().expect("this test's path");
    let libraries = this.parent().expect("its directory");
    let named = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("libtests-") && name.ends_with(".rlib")
    };
    let entries = fs::read_dir(libraries).expect("libraries").flatten().map(|entry| entry.path());
    let mut found: Vec<PathBuf> = entries.filter(named).collect();
    found.sort_by_key(|path| fs::metadata(path).and_then(|file| file.modified()).ok());
    let (source, program) = (directory.join("guest.rs"), directory.join("aborting-guest"));
    fs::write(&source, "fn main() -> std::process::ExitCode { tests::guest::main() }").expect("written");
    let mut said = String::new();
    // Earlier builds leave theirs beside the one that is meant.
    for library in found.iter().rev() {
        let mut dependencies = std::ffi::OsString::from("dependency=");
        dependencies.push(libraries);
        let mut external = std::ffi::OsString::from("tests=");
        external.push(library);
        let output = Command::new("rustc")
            .args(["--edition", "2024", "-C", "panic=abort", "-L"])
            .arg(dependencies)
            .arg("--extern")
            .arg(external)
            .arg("-o")
            .args([&program, &source])
            .output()
            .expect("`rustc` is there, as cargo is");
        if output.status.success() {
            return program;
        }
        said = String::from_utf8_lossy(&output.stderr).into_owned();
    }
    panic!("no program of {found:?}: {said}");
}

#[test]
fn a_pipeline_built_with_panic_abort_has_a_dead_letter_with_the_reason() {
    let built = tempfile::tempdir().expect("a directory");
    let program = program(built.path());
    let mut host = Host::new(&program.display().to_string());
    host.env.push((VARIABLE.to_owned(), "panics".to_owned()));
    let up = host.up();
    for (run, isolate) in [("pool", false), ("alone", true)] {
        fs::write(host.path().join("millstream.toml"), format!("[work]\nisolate = {isolate}\n"))
            .expect("written");
        let mut process = host.start(run, &["run", "--run", run, "--ids", "1..=12"]);
        assert_eq!(process.wait(SOON).code(), Some(3), "{}", host.log(run));
        let dead = format!("SELECT id, error FROM millstream.guest_dead WHERE run = '{run}' FORMAT TSVRaw");
        let dead = up.ask(&dead);
        // Unwound, it would be no crash but `panicked at`.
        assert!(dead.starts_with("3\tcrashed: signal 6: panicked at "), "{dead}");
        assert!(
            dead.trim_end().ends_with("the reason of id 3") && dead.trim_end().lines().count() == 1,
            "{dead}"
        );
        assert_eq!(host.verify(run)["ids"], 12);
    }
}
