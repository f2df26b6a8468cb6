//! `laneformer verify`: its lines and its exit status.

mod common;

use std::fs;
use std::path::Path;

use common::{golden, laneformer, parts};

fn verify(args: &[&str]) -> (i32, String, String) {
    parts(&laneformer(&[&["verify"][..], args].concat(), b""))
}

fn copy_case(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for name in ["case.json", "io.safetensors", "weights.safetensors"] {
        fs::copy(from.join(name), to.join(name)).unwrap();
    }
}

fn edit(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from));
    fs::write(path, text.replace(from, to)).unwrap();
}

#[test]
fn a_case_passes_with_a_line_per_output() {
    let case = golden("bert-right-pad");
    let (status, stdout, stderr) = verify(&[case.to_str().unwrap(), "--threads", "2"]);
    assert_eq!(status, 0, "{stdout}{stderr}");
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(lines.len(), 3, "{stdout}");
    assert!(lines[0].starts_with("PASS  bert-right-pad  last_hidden_state"), "{stdout}");
    assert!(lines[1].starts_with("PASS  bert-right-pad  pooler_output"), "{stdout}");
    assert_eq!(lines[2], "2 passed, 0 failed");
}

#[test]
fn directories_are_walked_and_every_isa_by_name_works() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["op-softmax-odd", "norms-post-layernorm"] {
        copy_case(&golden(name), &dir.path().join("some/where").join(name));
    }
    for isa in laneformer::Isa::available() {
        let (status, stdout, stderr) = verify(&[dir.path().to_str().unwrap(), "--isa", isa.name()]);
        assert_eq!(status, 0, "{isa}: {stdout}{stderr}");
        assert!(stdout.ends_with("2 passed, 0 failed\n"), "{isa}: {stdout}");
    }
}

#[test]
fn failures_are_status_1() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let (status, stdout, stderr) = verify(&[path]);
    assert_eq!((status, stdout.as_str()), (1, "0 passed, 0 failed\n"), "no case: {stderr}");

    let case = dir.path().join("unknown");
    copy_case(&golden("bert-right-pad"), &case);
    edit(&case.join("case.json"), r#""system": "bert""#, r#""system": "perceiver""#);
    let case = dir.path().join("wrong");
    copy_case(&golden("op-relu-odd"), &case);
    edit(&case.join("case.json"), r#""op": "relu""#, r#""op": "silu""#);
    let case = dir.path().join("broken");
    copy_case(&golden("op-relu-odd"), &case);
    fs::write(case.join("io.safetensors"), "").unwrap();
    let (status, stdout, _) = verify(&[path]);
    assert_eq!(status, 1);
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(lines.len(), 5, "{stdout}");
    assert!(lines[0].starts_with("FAIL  broken  -") && lines[0].contains("io.safetensors"), "{stdout}");
    assert!(lines[1].contains("not built yet: system perceiver"), "{stdout}");
    assert!(lines[3].starts_with("FAIL  wrong  y"), "{stdout}");
    assert_eq!(lines[4], "0 passed, 4 failed");
}

#[test]
fn a_directory_that_is_not_there_is_bad_input() {
    let (status, _, stderr) = verify(&["nowhere/at/all"]);
    assert_eq!(status, 2);
    assert!(stderr.contains("nowhere/at/all"), "{stderr}");
}
