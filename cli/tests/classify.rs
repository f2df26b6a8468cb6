//! `laneformer classify` on a tiny CLIP: its numbers, its output, and how bad input is refused.

mod common;

use std::fs;
use std::path::PathBuf;

use common::{Model, laneformer, parts, refused, words};
use image::{Rgb, RgbImage};
use laneformer::Context;
use laneformer_models::clip::Clip;
use laneformer_models::config::open;
use laneformer_models::conv::Images;
use laneformer_models::{Batch, Scratch};
use serde_json::{Value, json};

/// A CLIP of 20 x 20 pixels, which it takes as they are.
fn clip() -> Model {
    let model = Model::of("clip-quick-gelu", "clip", 40);
    model.write_json(
        "preprocessor_config.json",
        &json!({
            "size": { "shortest_edge": 20 }, "crop_size": { "height": 20, "width": 20 },
            "image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0],
        }),
    );
    model
}

fn picture(seed: u32) -> RgbImage {
    RgbImage::from_fn(20, 20, |x, y| Rgb([0, 1, 2].map(|c| (x * 37 + y * seed + c * 53 + x * y * 7) as u8)))
}

fn save(model: &Model, name: &str, image: &RgbImage) -> PathBuf {
    let path = model.path().join(name);
    image.save(&path).unwrap();
    path
}

/// The arguments for words between the first and the last token of a text.
fn args<'a>(model: &'a Model, images: &'a [PathBuf]) -> Vec<&'a str> {
    let images = images.iter().map(|image| image.to_str().unwrap());
    let args = ["classify", "--model", model.arg(), "--template", "w38 {} w39", "--image"];
    args.into_iter().chain(images).collect()
}

/// The scores of every image, in the order of the output.
fn scores(stdout: &str) -> Vec<Vec<(String, f32)>> {
    let line = |line: &str| {
        let record: Value = serde_json::from_str(line).expect("JSON");
        assert!(record["image"].as_str().unwrap().ends_with(".png"), "{record}");
        let score = |score: &Value| {
            (score["label"].as_str().unwrap().to_string(), score["score"].as_f64().unwrap() as f32)
        };
        record["scores"].as_array().unwrap().iter().map(score).collect()
    };
    stdout.lines().map(line).collect()
}

#[test]
fn scores_are_those_of_the_model_and_sorted() {
    let model = clip();
    let pictures = [picture(91), picture(11)];
    let paths = [save(&model, "a.png", &pictures[0]), save(&model, "b.png", &pictures[1])];
    let labels = ["w5", "w7 w8", "w30", "w2"];
    let labels_arg = labels.join(" , ");
    let all = [&args(&model, &paths)[..], &["--labels", &labels_arg, "--json", "--threads", "1"]].concat();
    let (status, stdout, stderr) = parts(&laneformer(&all, b""));
    assert_eq!(status, 0, "{stderr}");

    let clip = open(model.path(), Clip::load).unwrap();
    let (ctx, mut scratch) = (Context::serial(), Scratch::default());
    let ids = [38, 5, 39, 38, 7, 8, 39, 38, 30, 39, 38, 2, 39];
    let positions = [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 0, 1, 2];
    let texts =
        Batch { ids: &ids, type_ids: &[], positions: &positions, offsets: &[0, 3, 7, 10, 13], is_real: None };
    let states = clip.text.states(&mut scratch.with(ctx), texts).unwrap();
    let texts = clip.text.embed(ctx, texts, &states).unwrap();
    let all_scores = scores(&stdout);
    assert_eq!(all_scores.len(), 2);
    for (picture, scores) in pictures.iter().zip(all_scores) {
        let value = |c: usize, i: u32| f64::from(picture.get_pixel(i % 20, i / 20)[c]) * (1.0 / 255.0);
        let planes: Vec<_> = (0..3).flat_map(|c| (0..400).map(move |i| value(c, i) as f32)).collect();
        let images = Images::from_planes(&planes, [1, 3, 20, 20]).unwrap();
        let states = clip.image_states(&mut Scratch::default().with(ctx), &images).unwrap();
        let logits = clip.logits_per_image(ctx, &clip.embed_images(ctx, &states).unwrap(), &texts).unwrap();
        let mut expected: Vec<_> =
            labels.map(String::from).into_iter().zip(clip.probabilities(ctx, logits, 4).unwrap()).collect();
        expected.sort_by(|a, b| b.1.total_cmp(&a.1));
        assert_eq!(scores, expected);
        assert!((scores.iter().map(|(_, score)| score).sum::<f32>() - 1.0).abs() < 1e-6);
    }
}

#[test]
fn tables_name_the_image_and_other_sizes_are_brought_to_the_models() {
    let model = clip();
    let wide = RgbImage::from_fn(57, 23, |x, y| Rgb([x as u8, y as u8, 9]));
    let paths = [save(&model, "wide.png", &wide), save(&model, "exact.jpg", &picture(3))];
    let all = [&args(&model, &paths)[..], &["--labels", "w5,w6"]].concat();
    let (status, stdout, stderr) = parts(&laneformer(&all, b""));
    assert_eq!(status, 0, "{stderr}");
    for part in ["wide.png", "exact.jpg", "probability", "w5", "w6"] {
        assert!(stdout.contains(part), "{stdout}");
    }
    // The older forms of the fields mean the same.
    for (field, value) in [("size", json!(20)), ("crop_size", json!(20))] {
        model.set("preprocessor_config.json", field, value);
    }
    assert_eq!(parts(&laneformer(&all, b"")).1, stdout);
}

#[test]
fn the_template_makes_the_texts() {
    let model = clip();
    let image = [save(&model, "a.png", &picture(91))];
    let run = |template, labels| {
        let image = image[0].to_str().unwrap();
        let args = ["classify", "--model", model.arg(), "--image", image, "--json", "--labels", labels];
        let (status, stdout, stderr) = parts(&laneformer(&[&args[..], template].concat(), b""));
        assert_eq!(status, 0, "{stderr}");
        scores(&stdout).concat().into_iter().map(|(_, score)| score).collect::<Vec<_>>()
    };
    let bare = run(&["--template", "{}"], "w38 w5 w39,w38 w6 w39");
    assert_eq!(run(&["--template", "w38 {} w39"], "w5,w6"), bare);
    // Words that this tokenizer does not know are all the same: "This is a photo of w5." is five times w0 and "w5.".
    assert_eq!(run(&[], "w5,w6"), [0.5, 0.5]);
}

#[test]
fn bad_images_are_named() {
    let model = clip();
    let good = save(&model, "good.png", &picture(1));
    let refused = |image: &PathBuf, expected: &[&str]| {
        let images = [good.clone(), image.clone()];
        refused(&[&args(&model, &images)[..], &["--labels", "w5"]].concat(), expected);
    };
    refused(&model.path().join("none.png"), &["none.png: No such file"]);
    refused(&model.path().to_path_buf(), &[model.arg()]);
    let text = model.path().join("text.png");
    fs::write(&text, "no image").unwrap();
    refused(&text, &["text.png"]);
    let other = model.path().join("text.txt");
    fs::write(&other, "no image").unwrap();
    refused(&other, &["text.txt"]);
    for name in ["cut.png", "cut.jpg", "cut.webp"] {
        let path = save(&model, name, &picture(2));
        let data = fs::read(&path).unwrap();
        fs::write(&path, &data[..data.len() * 2 / 3]).unwrap();
        refused(&path, &[name]);
    }
    // A header that says 100000 x 100000, with its checksum.
    let path = save(&model, "large.png", &picture(2));
    let mut data = fs::read(&path).unwrap();
    data[16..20].copy_from_slice(&100_000u32.to_be_bytes());
    data[20..24].copy_from_slice(&100_000u32.to_be_bytes());
    let bits = data[12..29].iter().flat_map(|byte| (0..8).map(move |bit| u32::from(byte >> bit & 1)));
    let crc = bits.fold(u32::MAX, |crc, bit| crc >> 1 ^ if (crc ^ bit) & 1 == 1 { 0xedb8_8320 } else { 0 });
    data[29..33].copy_from_slice(&(!crc).to_be_bytes());
    fs::write(&path, data).unwrap();
    refused(&path, &["large.png", "imit"]);
    refused(&save(&model, "strip.png", &RgbImage::new(1, 9_000_000 / 20)), &["strip.png: cannot resize 1 x"]);
}

#[test]
fn directories_and_arguments_that_do_not_fit_are_refused() {
    let image = |model: &Model| [save(model, "a.png", &picture(1))];
    let refused = |model: &Model, more: &[&str], expected: &[&str]| {
        refused(&[&args(model, &image(model))[..], more].concat(), expected);
    };
    let model = clip();
    refused(&model, &["--labels", "w5,,w6"], &["--labels: a label is empty"]);
    refused(&model, &["--labels", " "], &["--labels: a label is empty"]);
    refused(&model, &[], &["--labels"]);
    let long = words(vec![5; 13]);
    refused(&model, &["--labels", &long], &[&long, "15 tokens, but the model has 14 positions"]);
    let no_place =
        ["classify", "--model", model.arg(), "--image", "a.png", "--labels", "x", "--template", "y"];
    common::refused(&no_place, &["--template", "\"y\""]);
    refused(
        &Model::of("bart-decode", "bart", 40),
        &["--labels", "w5"],
        &["config.json: model_type: expected \"clip\", got bart"],
    );
    let foreign = Model::of("clip-quick-gelu", "clip", 50);
    foreign.write_json("preprocessor_config.json", &json!({ "size": 20, "crop_size": 20 }));
    let expected = "\"w38 w44 w39\": token_embedding: index 44 at token 1";
    refused(&foreign, &["--labels", "w1,w44"], &[expected]);

    for (field, value, expected) in [
        ("crop_size", json!(24), "gives 24 x 24 pixels, but the model takes 20 x 20"),
        ("do_center_crop", json!(false), "gives 40 x 20 pixels, but the model takes 20 x 20"),
        ("resample", json!(1), "resample: expected 2 (bilinear) or 3 (bicubic), got 1"),
        ("size", json!({ "longest_edge": 20 }), "preprocessor_config.json"),
        ("size", json!(0), "preprocessor_config.json: size: expected edges of 1 to 8192 pixels"),
        ("crop_size", json!(8193), "preprocessor_config.json: crop_size: expected edges"),
        ("image_mean", json!([1e39, 0.0, 0.0]), "image_mean"),
        ("rescale_factor", json!(1e300), "expected numbers that make finite pixels"),
    ] {
        let model = clip();
        model.set("preprocessor_config.json", field, value);
        let image = [save(&model, "a.png", &RgbImage::new(40, 20))];
        common::refused(&[&args(&model, &image)[..], &["--labels", "w5"]].concat(), &[expected]);
    }
    let model = clip();
    model.lose_numbers();
    refused(&model, &["--labels", "w5"], &["a probability: not a number"]);
    let model = clip();
    fs::remove_file(model.path().join("preprocessor_config.json")).unwrap();
    refused(&model, &["--labels", "w5"], &["preprocessor_config.json: No such file"]);
    for (tower, field, value, expected) in [
        ("vision_config", "patch_size", json!(0), "patch_size: expected 1 to the image size 20, got 0"),
        (
            "vision_config",
            "hidden_act",
            json!("mish"),
            "vision_config.hidden_act: invalid value: string \"mish\", expected one of the activations",
        ),
        ("vision_config", "image_size", json!(25), "position_embedding.weight: expected shape [26, 50]"),
        ("text_config", "num_attention_heads", json!(0), "num_attention_heads: expected a divisor of"),
        ("text_config", "num_hidden_layers", json!(2), "no tensor text_model.encoder.layers.1"),
    ] {
        let model = clip();
        let path = model.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        config[tower][field] = value;
        model.write_json("config.json", &config);
        refused(&model, &["--labels", "w5"], &[expected]);
    }
}
