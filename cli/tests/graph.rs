//! `laneformer graph`: the picture, the figures beside it, and how it refuses bad input.

mod common;

use std::fs;
use std::path::Path;

use common::{laneformer, parts};

/// Draws into `dir` and returns the picture and what is printed.
fn draw(dir: &Path, args: &[&str]) -> (String, String) {
    let path = dir.join("graph.svg");
    let mut all = vec!["graph"];
    all.extend(args);
    all.extend(["--output", path.to_str().expect("UTF-8")]);
    let (status, stdout, stderr) = parts(&laneformer(&all, b""));
    assert_eq!((status, stderr.as_str()), (0, ""), "{args:?}");
    (fs::read_to_string(path).expect("a picture"), stdout)
}

/// The number of a line of the figures.
fn figure(stdout: &str, name: &str) -> usize {
    let line =
        stdout.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name} in {stdout}"));
    let number = line[name.len()..].split_whitespace().next().expect("a number");
    number.replace(',', "").parse().expect("a number")
}

#[test]
fn every_kind_has_its_edges() {
    let dir = tempfile::tempdir().expect("a directory");
    let table = "a>a,b; b>b; c>a,b,c";
    let cases: [(&[&str], usize); 10] = [
        (&["full"], 512 * 512),
        (&["full", "--seq-len", "1"], 1),
        (&["causal", "--seq-len", "100"], 5050),
        (&["causal", "--seq-len", "100", "--offset", "30"], 5050 + 3000),
        (&["window", "--seq-len", "100", "--left", "2", "--right", "1"], 4 * 100 - 1 - 3),
        (&["window-global", "--seq-len=100", "--left=2", "--right=1", "--global=10"], 396 + 97 + 9 * 96),
        (&["prefix", "--seq-len", "100", "--prefix", "10"], 5050 + 45),
        (&["ragged", "--lengths", "100,60,200"], 10000 + 3600 + 40000),
        (&["groups", "--groups", "a:40,b:60,c:30", "--table", table], 40 * 100 + 60 * 60 + 30 * 130),
        (&["padding", "--seq-len", "50", "--lengths", "20,50"], 50 * 20 + 50 * 50),
    ];
    for (args, edges) in cases {
        let (svg, stdout) = draw(dir.path(), args);
        assert_eq!(figure(&stdout, "edges"), edges, "{args:?}");
        assert!(figure(&stdout, "computed scores") >= edges, "{args:?}");
        for text in ["<svg", "</svg>", "key", "query", "skipped", "partial tiles"] {
            assert!(svg.contains(text), "{text} in the picture of {args:?}");
        }
        assert!(svg.contains(stdout.split(':').next().expect("a title")), "{args:?}");
    }
    assert_eq!(
        fs::read_dir(dir.path()).expect("a directory").count(),
        1,
        "nothing is left beside the picture"
    );
}

#[test]
fn tiles_are_full_partial_or_empty() {
    let dir = tempfile::tempdir().expect("a directory");
    let (svg, stdout) = draw(dir.path(), &["causal"]);
    assert!(["full tiles", "partial tiles", "empty tiles"].iter().all(|name| figure(&stdout, name) > 0));
    assert!(figure(&stdout, "computed scores") < 512 * 512 * 6 / 10);
    assert!(
        svg.contains("131,328") && svg.contains("50.1 % of the square"),
        "the figures are in the picture"
    );
    let (_, stdout) = draw(dir.path(), &["full"]);
    assert_eq!([figure(&stdout, "partial tiles"), figure(&stdout, "empty tiles")], [0, 0]);
}

#[test]
fn pictures_stay_small() {
    let dir = tempfile::tempdir().expect("a directory");
    for args in [
        &["causal", "--seq-len", "16384"][..],
        &["window-global", "--seq-len", "16384", "--left", "256", "--right", "256", "--global", "16"],
        &["window", "--seq-len", "720", "--left", "5", "--right", "5"],
    ] {
        let (svg, _) = draw(dir.path(), args);
        assert!(svg.len() < 150_000, "{} bytes for {args:?}", svg.len());
    }
}

#[test]
fn titles_and_names_are_text() {
    let dir = tempfile::tempdir().expect("a directory");
    let (svg, _) = draw(dir.path(), &["full", "--title", "a\u{1} <b> & \"c\""]);
    assert!(svg.contains("a &lt;b&gt; &amp; ") && !svg.contains("<b>"), "{svg}");
    let (svg, _) = draw(dir.path(), &["groups", "--groups", "text:9,image:9", "--table", "image>text"]);
    assert!(svg.contains("text\n") && svg.contains("image\n"), "{svg}");
}

#[test]
fn bad_input() {
    let dir = tempfile::tempdir().expect("a directory");
    let there = dir.path().join("x.svg");
    let there = there.to_str().expect("UTF-8");
    let window = ["window", "--seq-len", "10", "--left"];
    let with =
        |more: [&'static str; 3]| [window[0], window[1], window[2], window[3], more[0], more[1], more[2]];
    let groups = |groups: &'static str, table: &'static str| ["groups", "--groups", groups, "--table", table];
    let cases: [(&[&str], &str); 17] = [
        (&["circle"], "circle"),
        (&["full", "--seq-len", "0"], "--seq-len"),
        (&["full", "--seq-len", "99999"], "--seq-len 99999: expected at most 32768"),
        (&["full", "--left", "3"], "--left"),
        (&["causal", "--offset", "40000"], "40512 keys: expected at most 32768"),
        (&["causal", "--offset", "18446744073709551615"], "expected at most 32768"),
        (&with(["10", "--right", "0"]), "--left 10: expected less than the 10 tokens"),
        (&with(["0", "--right", "11"]), "--right 11"),
        (&["window", "--left", "3"], "--right"),
        (&["window-global", "--left=1", "--right=1", "--global=0"], "--global"),
        (&["prefix", "--prefix", "513"], "--prefix 513: expected at most the 512 tokens"),
        (&["ragged", "--lengths", "3,0"], "--lengths"),
        (&["ragged", "--lengths", "30000,30000"], "60000 queries"),
        (&["padding", "--lengths", "513"], "--lengths 513"),
        (&groups("a:3,b", "a>a"), "expected name:tokens, got \"b\""),
        (&groups("a:3,b:0", "a>a"), "tokens of b"),
        (&groups("a:3,b:2", "a>a,c"), "no group \"c\"; the groups are a, b"),
    ];
    for (args, message) in cases {
        let mut all = vec!["graph"];
        all.extend(args);
        all.extend(["--output", there]);
        let (status, stdout, stderr) = parts(&laneformer(&all, b""));
        assert_eq!((status, stdout.as_str()), (2, ""), "{args:?}: {stderr}");
        assert!(stderr.contains(message), "{args:?}: {stderr}");
    }
    for (output, message) in
        [("no/such/directory/x.svg", "cannot write no/such/directory/x.svg"), (".", "cannot write .")]
    {
        let (status, stdout, stderr) = parts(&laneformer(&["graph", "full", "--output", output], b""));
        assert_eq!((status, stdout.as_str()), (2, ""), "{stderr}");
        assert!(stderr.contains(message), "{stderr}");
    }
    let (status, _, stderr) = parts(&laneformer(&["graph", "full"], b""));
    assert_eq!(status, 2);
    assert!(stderr.contains("--output FILE.svg is missing"), "{stderr}");
    assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 0, "nothing is written");
}
