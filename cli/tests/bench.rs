//! `laneformer bench` and `laneformer info`: their output and their exit status.

mod common;

use common::{laneformer, parts};
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
}

#[test]
fn info_names_the_machine_and_its_roofs() {
    let (status, stdout, stderr) = parts(&laneformer(&["info", "--threads", "2"], b""));
    assert_eq!(status, 0, "{stderr}");
    for part in ["CPU", "features", "caches", "FMA peak", "read bandwidth", "scalar", "2 threads", "DRAM"] {
        assert!(stdout.contains(part), "{part} in {stdout}");
    }
}
