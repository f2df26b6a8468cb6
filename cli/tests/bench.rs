//! `laneformer bench` and `laneformer info`: their output and their exit status.

mod common;

use common::{Model, laneformer, parts, refused};
use serde_json::Value;

#[test]
fn json_lines_have_every_field() {
    let args = ["bench", "m1n768k768", "--json", "--threads", "2", "--isa", "portable"];
    let (status, stdout, stderr) = parts(&laneformer(&args, b""));
    assert_eq!(status, 0, "{stdout}{stderr}");
    let lines: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines.len(), 1, "{stdout}");
    let row = &lines[0];
    assert_eq!((&row["name"], &row["isa"]), (&"gemm/f32/m1n768k768".into(), &"portable".into()));
    assert_eq!((&row["threads"], &row["flops"]), (&2.into(), &(2 * 768 * 768).into()));
    assert_eq!(row["bytes"], 4 * (768 * 768 + 2 * 768));
    let number = |field: &str| row[field].as_f64().unwrap_or_else(|| panic!("{field} in {stdout}"));
    for field in ["median_ns", "min_ns", "gflops", "gbps", "peak_gflops", "peak_gbps", "of_peak", "max_err"] {
        assert!(number(field) > 0.0, "{field} in {stdout}");
    }
    let (rate, peak) = if row["bound"] == "fma" { ("gflops", "peak_gflops") } else { ("gbps", "peak_gbps") };
    assert!((number(rate) / number(peak) / number("of_peak") - 1.0).abs() < 1e-9);
    assert!(row.get("ns_per_element").is_none());
}

#[test]
fn elementwise_rows_are_counted_by_element() {
    let (status, stdout, stderr) =
        parts(&laneformer(&["bench", "softmax/f32/1536x128", "--json", "--threads", "1"], b""));
    assert_eq!(status, 0, "{stdout}{stderr}");
    let row: Value = serde_json::from_str(&stdout).expect("one line");
    assert_eq!(row["bound"], "read");
    let ns = row["median_ns"].as_f64().expect("a number") / f64::from(1536 * 128);
    assert!((row["ns_per_element"].as_f64().expect("a number") / ns - 1.0).abs() < 1e-9);
}

#[test]
fn the_table_has_a_line_per_row() {
    let (status, stdout, stderr) = parts(&laneformer(&["bench", "layernorm", "--threads", "1"], b""));
    assert_eq!(status, 0, "{stdout}{stderr}");
    assert!(stdout.contains("threads 1") && stdout.contains("of peak"), "{stdout}");
    assert_eq!(stdout.matches("layernorm/f32/").count(), 2, "{stdout}");
}

/// The rows of a run with `--json`, all of which must have succeeded.
fn rows(args: &[&str]) -> Vec<Value> {
    let (status, stdout, stderr) = parts(&laneformer(args, b""));
    assert_eq!(status, 0, "{stdout}{stderr}");
    stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn number(row: &Value, field: &str) -> f64 {
    row[field].as_f64().unwrap_or_else(|| panic!("{field} in {row}"))
}

#[test]
fn a_causal_graph_is_held_against_a_full_one() {
    let rows = rows(&["bench", "graph", "causal", "--json", "--threads", "1"]);
    let names: Vec<&str> = rows.iter().filter_map(|row| row["name"].as_str()).collect();
    assert_eq!(names, ["graph/f32/bert-base/full/b1s2048", "graph/f32/bert-base/causal/b1s2048"]);
    for (row, edges) in rows.iter().zip([2048 * 2048, 2048 * 2049 / 2]) {
        assert_eq!((&row["edges"], &row["flops"]), (&edges.into(), &(4_u64 * 768 * edges).into()));
        assert_eq!(row["bound"], "fma");
        assert!(number(row, "max_err") > 0.0 && number(row, "of_peak") > 0.0);
        assert!((number(row, "ns_per_token") * 2048.0 / number(row, "median_ns") - 1.0).abs() < 1e-9);
        // Keys and values, and no square of the sequence.
        let stored = 2.0 * 2048.0 * 768.0 * 4.0;
        assert!((stored..stored + f64::from(1 << 20)).contains(&number(row, "workspace_bytes")));
    }
    assert_eq!(number(&rows[0], "edges_computed"), 1.0);
    assert!((0.8..1.0).contains(&number(&rows[1], "edges_computed")));
    let ratio = number(&rows[1], "median_ns") / number(&rows[0], "median_ns");
    assert!((number(&rows[1], "of_full") / ratio - 1.0).abs() < 1e-9);
}

#[test]
fn windows_cost_their_edges() {
    let rows = rows(&["bench", "graph", "s4096", "--json", "--threads", "2"]);
    let names: Vec<&str> = rows.iter().filter_map(|row| row["name"].as_str()).collect();
    let window = "graph/f32/bert-base/window512+16/b1s4096";
    assert_eq!(names, [window, &format!("{window}/stored-first"), &format!("{window}/stored-keys")]);
    // A stream keeps what windows see and no more.
    assert!(number(&rows[0], "workspace_bytes") < 0.6 * number(&rows[1], "workspace_bytes"));
    for row in &rows {
        assert!(number(row, "edges") < 530.0 * 4096.0 && number(row, "max_err") > 0.0);
        assert!(row.get("of_full").is_none());
    }
}

#[test]
fn decoding_reads_weights_and_cache() {
    let args = ["bench", "decode", "--json", "--threads", "2", "--layers", "1", "--context", "64"];
    let rows = rows(&args);
    let names: Vec<&str> = rows.iter().filter_map(|row| row["name"].as_str()).collect();
    let attention = "attention/h32kv8l1b8c64";
    let shapes = ["gpt2/l1b1c64", "gpt2+head/l1b1c64", "gpt2/l1b8c8-64", "gpt2+head/l1b8c8-64", attention];
    assert_eq!(names, shapes.map(|shape| format!("decode/f32/{shape}")));
    let expected = [(1, 64 * 768), (1, 64 * 768), (8, 288 * 768), (8, 288 * 768), (8, 8 * 64 * 512)];
    for (row, (tokens, cached)) in rows.iter().zip(expected) {
        assert_eq!((&row["tokens"], &row["cache_bytes"]), (&tokens.into(), &(cached * 2 * 4).into()));
        assert_eq!(number(row, "bytes"), number(row, "weight_bytes") + number(row, "cache_bytes"));
        let is_attention = row["name"].as_str().is_some_and(|name| name.ends_with(attention));
        let has_error = number(row, "max_err") > 0.0;
        assert_eq!(has_error, is_attention, "the bits of a pass without a cache, or f64");
        let per_second = f64::from(tokens) * 1e9 / number(row, "median_ns");
        assert!((number(row, "tokens_per_s") / per_second - 1.0).abs() < 1e-9);
    }
    let layer = 4 * (12 * 768 * 768);
    assert!(number(&rows[0], "weight_bytes") >= f64::from(layer));
    assert!(number(&rows[1], "weight_bytes") >= f64::from(layer + 4 * 50257 * 768));
}

#[test]
fn every_system_runs() {
    let rows = rows(&["bench", "systems", "--small", "--json", "--threads", "2"]);
    let names: Vec<&str> = rows.iter().filter_map(|row| row["name"].as_str()).collect();
    assert_eq!(names.len(), 10, "{names:?}");
    for system in
        ["bert", "prefill", "decode", "longformer", "xl", "xlnet", "clip", "encoder", "resnet", "bart"]
    {
        assert!(names.iter().any(|name| name.contains(system)), "{system} in {names:?}");
    }
    for row in &rows {
        assert_eq!(number(row, "max_err"), 0.0, "the bits of another instruction set on one thread: {row}");
        let per_second = number(row, "items") * 1e9 / number(row, "median_ns");
        assert!((number(row, "items_per_s") / per_second - 1.0).abs() < 1e-9);
        assert!(["tokens", "images"].iter().any(|unit| row["unit"] == *unit), "{row}");
    }
}

/// Where no Python peers can be installed, their columns say so, and ours are measured.
fn compare(args: &[&str]) -> (i32, String, String) {
    let dir = tempfile::tempdir().expect("a directory");
    let args = [&["compare"], args].concat();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_laneformer"))
        .args(args)
        .current_dir(dir.path())
        .output()
        .expect("the program runs");
    assert!(std::fs::read_dir(dir.path()).expect("a directory").next().is_none(), "a part is no report");
    parts(&output)
}

#[test]
fn systems_are_compared() {
    let args = ["systems/", "--small", "--rounds", "1", "--round-ms", "1", "--threads", "2", "--json"];
    let (status, stdout, stderr) = compare(&args);
    assert_eq!(status, 0, "{stderr}");
    assert!(stderr.contains("no Python peers"), "{stderr}");
    let rows: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(rows.len(), 10, "{stdout}");
    for row in &rows {
        assert!(number(row, "ns") > 0.0 && number(row, "flops") > 0.0 && number(row, "items") > 0.0, "{row}");
        assert_eq!(
            (&row["peers"][0][0], &row["peers"][0][1]["absent"]),
            (&"PyTorch".into(), &"not installed".into())
        );
    }
}

#[test]
fn attention_is_compared() {
    let (status, stdout, stderr) =
        compare(&["attention/f32/bert-base/b8s128", "--rounds", "1", "--round-ms", "1", "--threads", "1"]);
    assert_eq!(status, 0, "{stderr}");
    assert!(stdout.contains("| attention/f32/bert-base/b8s128 | 1 |"), "{stdout}");
}

#[test]
fn sentences_need_a_model() {
    let (status, stdout, stderr) = compare(&["sentences"]);
    assert_eq!(status, 0, "{stderr}");
    assert!(stdout.contains("`sentences/f32`: not measured: --model"), "{stdout}");
    let (status, stdout, stderr) = compare(&["sentences", "--model", "nowhere"]);
    assert_eq!((status, stdout.as_str()), (2, ""), "{stderr}");
    assert!(stderr.contains("nowhere"), "{stderr}");
}

#[test]
fn sentences_are_compared() {
    let model = Model::new();
    let args = ["sentences", "--small", "--rounds", "1", "--threads", "2", "--json", "--model", model.arg()];
    let (status, stdout, stderr) = compare(&args);
    assert_eq!(status, 0, "{stderr}");
    let row: Value = serde_json::from_str(&stdout).expect("one line");
    assert_eq!((&row["items"], &row["unit"]), (&64.into(), &"sentences".into()));
    assert!(number(&row, "ns") > 0.0 && number(&row, "flops") > 0.0);
}

#[test]
fn bad_arguments() {
    for (args, message) in [
        (["bench", "no-such-row"], "no row contains"),
        (["bench", "--isa=sse9"], "unknown name"),
        (["bench", "--threads=0"], "--threads"),
        (["info", "--isa=sse9"], "unknown name"),
    ] {
        let (status, stdout, stderr) = parts(&laneformer(&args, b""));
        assert_eq!((status, stdout.as_str()), (2, ""), "{stderr}");
        assert!(stderr.contains(message), "{stderr}");
    }
    for (args, message) in [
        (["bench", "graph", "no-such-row"], "no row contains"),
        (["bench", "decode", "no-such-row"], "no row contains"),
        (["bench", "systems", "no-such-row"], "no row contains"),
        (["compare", "--small", "no-such-row"], "no task contains"),
        (["bench", "decode", "--context=0"], "--context"),
        (["bench", "decode", "--layers=0"], "--layers"),
    ] {
        let (status, stdout, stderr) = parts(&laneformer(&args, b""));
        assert_eq!((status, stdout.as_str()), (2, ""), "{stderr}");
        assert!(stderr.contains(message), "{stderr}");
    }
}

#[test]
fn info_names_the_machine_and_its_roofs() {
    let (status, stdout, stderr) = parts(&laneformer(&["info", "--threads", "2"], b""));
    assert_eq!(status, 0, "{stderr}");
    for part in ["CPU", "features", "caches", "FMA peak", "read bandwidth", "scalar", "2 threads", "DRAM"] {
        assert!(stdout.contains(part), "{part} in {stdout}");
    }
}

#[test]
fn places_and_sizes_that_make_no_sense_are_refused_before_anything_is_measured() {
    for (args, expected) in [
        (&["bench", "scaling", "--svg", "no/such/directory/x.svg"][..], "no/such/directory/x.svg"),
        (&["bench", "scaling", "--longest", "63"], "64..=1048576"),
        (&["bench", "--json", "decode"], "options stand behind the subcommand: bench decode [OPTIONS]"),
        (&["bench", "scaling", "--largest", "0"], "1..=65536"),
        (
            &["bench", "softmax", "--threads", "1025"],
            "invalid value '1025' for '--threads <N>': expected at most 1024",
        ),
        (
            &["compare", "--threads", "1,1025"],
            "invalid value '1025' for '--threads <N>': expected at most 1024",
        ),
        (&["compare", "--out", "/dev/null/x"], "/dev/null/x/docs/img"),
    ] {
        refused(args, &[expected]);
    }
}
