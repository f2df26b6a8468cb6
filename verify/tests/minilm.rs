//! all-MiniLM-L6-v2 on real sentences, against vectors that transformers computed in float64.
//!
//! The model is not in the repository: `scripts/fetch-minilm.sh DIR` gets it, `LANEFORMER_MINILM=DIR` names it here.
//! Without it the tests are shown as ignored; with `REQUIRE_MINILM=1` they fail.

mod common;

use std::path::Path;
use std::sync::{Arc, Mutex};

use common::{golden, on_every_isa};
use laneformer::{Context, Executor, Isa, Serial};
use laneformer_models::Checkpoint;
use laneformer_text::sentence::{Buffers, SentenceEncoder, Tokens};
use libtest_mimic::{Arguments, Failed, Trial};

/// The largest difference to the float64 vectors.
const LIMIT: f32 = 2e-6;

fn main() {
    let arguments = Arguments::from_args();
    libtest_mimic::run(&arguments, trials()).exit();
}

fn trials() -> Vec<Trial> {
    let Some(dir) = std::env::var_os("LANEFORMER_MINILM") else {
        let required = std::env::var("REQUIRE_MINILM").is_ok_and(|value| value == "1");
        eprintln!(
            "minilm: skipped, LANEFORMER_MINILM names no model directory (scripts/fetch-minilm.sh gets one)"
        );
        let missing = || Err(Failed::from("REQUIRE_MINILM is set, but LANEFORMER_MINILM is not"));
        return vec![Trial::test("minilm", missing).with_ignored_flag(!required)];
    };
    let model = Arc::new(SentenceEncoder::open(Path::new(&dir)).expect("the model loads"));
    let bits = Arc::new(Mutex::new(None));
    // Sentences per batch differ too: no bit may depend on them.
    let variants = [(1, 24), (2, 1), (3, 5)];
    let trials_of = |(threads, batch)| {
        let (model, bits) = (model.clone(), bits.clone());
        let test = move |isa| embed_and_compare(&model, &bits, isa, threads, batch);
        on_every_isa(&format!("threads-{threads}-batch-{batch}"), test)
    };
    variants.into_iter().flat_map(trials_of).collect()
}

fn embed_and_compare(
    model: &SentenceEncoder,
    first_bits: &Mutex<Option<Vec<u32>>>,
    isa: Isa,
    threads: usize,
    batch: usize,
) -> Result<(), Failed> {
    let sentences = std::fs::read_to_string(golden("minilm/sentences.txt"))?;
    let sentences: Vec<Tokens> =
        sentences.lines().map(|line| model.tokenize(line)).collect::<Result<_, _>>()?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let executor: &dyn Executor = if threads == 1 { &Serial } else { &pool };
    let (ctx, mut buffers) = (Context::new(isa, executor), Buffers::default());
    let mut actual = vec![];
    for sentences in sentences.chunks(batch) {
        actual.extend(model.embed(ctx, sentences, &mut buffers)?);
    }

    let file = Checkpoint::open(&golden("minilm/expected.safetensors"))?;
    let expected = file.f32("embeddings")?;
    assert_eq!(file.shape("embeddings")?, [sentences.len(), model.dim()]);
    assert_eq!(expected.len(), actual.len());
    let error = expected.iter().zip(&actual).map(|(e, a)| (e - a).abs()).fold(0.0, f32::max);
    if error.is_nan() || error > LIMIT {
        return Err(format!("largest difference {error:e}, limit {LIMIT:e}").into());
    }
    if isa.keeps_bits() {
        let bits: Vec<u32> = actual.iter().map(|x| x.to_bits()).collect();
        let mut first = first_bits.lock().map_err(|_| "another test failed")?;
        assert!(
            *first.get_or_insert_with(|| bits.clone()) == bits,
            "the bits differ from those of another run"
        );
    }
    Ok(())
}
