//! The models of the models crate with their inputs.

use std::path::Path;

use anyhow::{Context as _, Result};
use laneformer::Context;
use laneformer_models::bart::Bart;
use laneformer_models::bert::Bert;
use laneformer_models::clip::Clip;
use laneformer_models::conv::Images;
use laneformer_models::detr::{Detr, sine_positions};
use laneformer_models::encoder::Decoding;
use laneformer_models::gpt::{self, Gpt};
use laneformer_models::longformer::Longformer;
use laneformer_models::ragged::Ragged;
use laneformer_models::run::project;
use laneformer_models::transformer_xl::{Memory, TransformerXl};
use laneformer_models::xlnet::{self, XlNet};
use laneformer_models::{Batch, Checkpoint, Scratch};

use crate::bench::data::Buffer;
use crate::systems::{Kind, Size, System};

/// A named input: name, shape, values.
pub type Input = (String, Vec<usize>, Vec<f32>);

/// A model, and an input of some size.
pub trait Model {
    /// Makes the input of this size, and what is computed once before it.
    fn prepare(&mut self, ctx: Context<'_>, size: &Size) -> Result<()>;

    /// From the input to the answer. Of a model that remembers, the second run goes on where the first has ended.
    fn run(&mut self, ctx: Context<'_>) -> Result<Vec<f32>>;

    /// The first answer to an input of this size in another way, which has to give the same bits.
    fn otherwise(&mut self, ctx: Context<'_>, size: &Size) -> Result<Vec<f32>> {
        self.prepare(ctx, size)?;
        self.run(ctx)
    }

    /// The input, for others who are to answer too; tokens are whole numbers in floats.
    fn inputs(&self) -> Vec<Input>;
}

/// Packs the weights; `path` is for messages.
pub fn load(system: &System, path: &Path, checkpoint: &Checkpoint) -> Result<Box<dyn Model>> {
    let config = &system.config;
    Ok(match system.kind {
        Kind::Bert => {
            let model = Bert::load(path, config, checkpoint)?;
            let vocab_size = model.config.vocab_size;
            text(vocab_size, move |ctx, text, _, scratch| {
                Ok(model.forward(&mut scratch.with(ctx), text.batch())?)
            })
        }
        Kind::GptPrefill => {
            let model = Gpt::load(path, config, checkpoint)?;
            let gpt::Config { vocab_size, n_positions, n_embd, .. } = model.config;
            let caches = model.decoder.layers.caches(1, n_positions)?;
            let mut state = Decoding { caches, ..Decoding::default() };
            text(vocab_size, move |ctx, text, _, scratch| {
                state.caches.iter_mut().try_for_each(|cache| cache.truncate(0, 0))?;
                let hidden = model.decoder.decode(&mut scratch.with(ctx), text.batch(), &mut state)?;
                Ok(project(ctx, &model.head, &hidden[hidden.len() - n_embd..])?)
            })
        }
        Kind::GptDecode => {
            let model = Gpt::load(path, config, checkpoint)?;
            let (text, state, scratch) = (Text::default(), Decoding::default(), Scratch::default());
            Box::new(GptDecode { model, text, state, scratch })
        }
        Kind::Longformer => {
            let model = Longformer::load(path, config, checkpoint)?;
            let (vocab_size, globals) = (model.config.vocab_size, system.size.context);
            text(vocab_size, move |ctx, text, _, scratch| {
                let positions = model.positions(&text.ids);
                let batch = Batch { positions: &positions, ..text.batch() };
                let is_global: Vec<bool> = (0..text.ids.len()).map(|i| i < globals).collect();
                Ok(model.forward(&mut scratch.with(ctx), batch, &is_global)?)
            })
        }
        Kind::TransformerXl => {
            let model = TransformerXl::load(path, config, checkpoint)?;
            Box::new(Xl {
                memory: model.memory(1),
                model,
                text: Text::default(),
                mems: vec![],
                scratch: Scratch::default(),
            })
        }
        Kind::Xlnet => {
            let model = XlNet::load(path, config, checkpoint)?;
            let vocab_size = model.config.vocab_size;
            let mut placed = None;
            text(vocab_size, move |ctx, text, _, scratch| {
                let (run, tokens) = (&mut scratch.with(ctx), text.ids.len());
                let positions = match placed.take() {
                    Some((n, positions)) if n == tokens => positions,
                    _ => model.positions(run, tokens, 0)?,
                };
                let segments: Vec<u32> = (0..tokens).map(|i| u32::from(i >= tokens / 2)).collect();
                let batch = xlnet::Batch {
                    sequences: 1,
                    ids: &text.ids,
                    segments: Some(&segments),
                    ..xlnet::Batch::default()
                };
                let output = model.forward(run, &batch, &positions)?;
                placed = Some((tokens, positions));
                Ok(output.content)
            })
        }
        Kind::Clip => {
            let model = Clip::load(path, config, checkpoint)?;
            let channels = model.config.vision_config.num_channels;
            image(channels, move |ctx, images, scratch| {
                let states = model.image_states(&mut scratch.with(ctx), images)?;
                Ok(model.embed_images(ctx, &states)?)
            })
        }
        Kind::DetrEncoder => {
            let model = Detr::load(path, config, checkpoint)?;
            let d = model.config.d_model;
            let channels = model.config.backbone_config.hidden_sizes.last().copied().unwrap_or(0);
            let mut placed = (vec![], [0, 0]);
            image(channels, move |ctx, features, scratch| {
                let grid = [features.height, features.width];
                let mask = vec![true; grid[0] * grid[1]];
                if placed.1 != grid {
                    placed = (sine_positions(&mask, grid, d), grid);
                }
                Ok(model.encode(
                    &mut scratch.with(ctx),
                    features,
                    &Ragged::from_mask(&mask, mask.len()),
                    &placed.0,
                )?)
            })
        }
        Kind::Detr => {
            let model = Detr::load(path, config, checkpoint)?;
            let (d, channels) = (model.config.d_model, model.config.backbone_config.num_channels);
            image(channels, move |ctx, pixels, scratch| {
                let features = model.backbone.forward(&mut scratch.with(ctx), pixels)?;
                let grid = [features.height, features.width];
                let mask = vec![true; grid[0] * grid[1]];
                let (tokens, positions) =
                    (Ragged::from_mask(&mask, mask.len()), sine_positions(&mask, grid, d));
                Ok(model.encode(&mut scratch.with(ctx), &features, &tokens, &positions)?)
            })
        }
        Kind::Bart => {
            let model = Bart::load(path, config, checkpoint)?;
            let vocab_size = model.config.vocab_size;
            let mut writing = Scratch::default();
            text(vocab_size, move |ctx, text, source, scratch| {
                let memory = model.encoder.encode(&mut scratch.with(ctx), source.batch())?;
                let mut decoding = model.decoder.layers.begin(ctx, &memory, &source.offsets, 0)?;
                let hidden = model.decoder.decode(&mut writing.with(ctx), text.batch(), &mut decoding)?;
                Ok(project(ctx, &model.head, &hidden)?)
            })
        }
    })
}

/// Tokens of one sequence.
#[derive(Default)]
struct Text {
    ids: Vec<u32>,
    type_ids: Vec<u32>,
    positions: Vec<u32>,
    offsets: Vec<usize>,
}

/// Tokens below have a meaning in most vocabularies.
const FIRST_ID: usize = 10;

impl Text {
    /// Tokens `first..first + len` of a text that is the same in every run.
    fn new(vocab_size: usize, first: usize, len: usize) -> Text {
        let id = |i: usize| (FIRST_ID + i * 7919 % vocab_size.saturating_sub(FIRST_ID).max(1)) as u32;
        Text {
            ids: (first..first + len).map(id).collect(),
            type_ids: vec![0; len],
            positions: (first as u32..(first + len) as u32).collect(),
            offsets: vec![0, len],
        }
    }

    fn batch(&self) -> Batch<'_> {
        let Text { ids, type_ids, positions, offsets } = self;
        Batch { ids, type_ids, positions, offsets, is_real: None }
    }

    fn input(&self, name: &str) -> Input {
        let ids = self.ids.iter().map(|&id| id as f32).collect();
        (name.to_owned(), vec![1, self.ids.len()], ids)
    }
}

/// A model that remembers nothing. `F` gets the text, and the text before it or beside it.
struct Texts<F> {
    vocab_size: usize,
    text: Text,
    source: Text,
    scratch: Scratch,
    forward: F,
}

fn text<F>(vocab_size: usize, forward: F) -> Box<dyn Model>
where
    F: FnMut(Context<'_>, &Text, &Text, &mut Scratch) -> Result<Vec<f32>> + 'static,
{
    let (text, source, scratch) = (Text::default(), Text::default(), Scratch::default());
    Box::new(Texts { vocab_size, text, source, scratch, forward })
}

impl<F> Model for Texts<F>
where
    F: FnMut(Context<'_>, &Text, &Text, &mut Scratch) -> Result<Vec<f32>>,
{
    fn prepare(&mut self, _: Context<'_>, size: &Size) -> Result<()> {
        self.text = Text::new(self.vocab_size, 0, size.tokens);
        self.source = Text::new(self.vocab_size, size.tokens, size.context);
        self.source.positions = (0..size.context as u32).collect();
        Ok(())
    }

    fn run(&mut self, ctx: Context<'_>) -> Result<Vec<f32>> {
        (self.forward)(ctx, &self.text, &self.source, &mut self.scratch)
    }

    fn inputs(&self) -> Vec<Input> {
        vec![self.text.input("input.ids"), self.source.input("input.source")]
    }
}

/// A model over images or feature maps.
struct Pictures<F> {
    channels: usize,
    planes: Vec<f32>,
    images: Option<Images>,
    scratch: Scratch,
    forward: F,
}

fn image<F>(channels: usize, forward: F) -> Box<dyn Model>
where
    F: FnMut(Context<'_>, &Images, &mut Scratch) -> Result<Vec<f32>> + 'static,
{
    Box::new(Pictures { channels, planes: vec![], images: None, scratch: Scratch::default(), forward })
}

impl<F> Model for Pictures<F>
where
    F: FnMut(Context<'_>, &Images, &mut Scratch) -> Result<Vec<f32>>,
{
    fn prepare(&mut self, _: Context<'_>, size: &Size) -> Result<()> {
        let [height, width] = size.grid;
        let planes = size.batch * self.channels * height * width;
        self.planes = Buffer::uniform(planes, 1.0, 2).to_vec();
        self.images = Some(Images::from_planes(&self.planes, [size.batch, self.channels, height, width])?);
        Ok(())
    }

    fn run(&mut self, ctx: Context<'_>) -> Result<Vec<f32>> {
        let images = self.images.as_ref().context("no images")?;
        (self.forward)(ctx, images, &mut self.scratch)
    }

    fn inputs(&self) -> Vec<Input> {
        let input = |x: &Images| {
            let shape = vec![x.batch, x.channels, x.height, x.width];
            ("input.pixels".to_owned(), shape, self.planes.clone())
        };
        self.images.iter().map(input).collect()
    }
}

/// One more token of a text whose keys and values are in a cache.
struct GptDecode {
    model: Gpt,
    text: Text,
    state: Decoding,
    scratch: Scratch,
}

impl GptDecode {
    fn vocab_size(&self) -> usize {
        self.model.config.vocab_size
    }
}

impl Model for GptDecode {
    fn prepare(&mut self, ctx: Context<'_>, size: &Size) -> Result<()> {
        self.state.caches = self.model.decoder.layers.caches(1, size.context + size.tokens)?;
        let before = Text::new(self.vocab_size(), 0, size.context);
        let (mut scratch, before) = (Scratch::default(), before.batch());
        self.model.decoder.decode(&mut scratch.with(ctx), before, &mut self.state)?;
        self.text = Text::new(self.vocab_size(), size.context, size.tokens);
        Ok(())
    }

    fn run(&mut self, ctx: Context<'_>) -> Result<Vec<f32>> {
        let context = self.text.positions.first().map_or(0, |&first| first as usize);
        self.state.caches.iter_mut().try_for_each(|cache| cache.truncate(0, context))?;
        let hidden =
            self.model.decoder.decode(&mut self.scratch.with(ctx), self.text.batch(), &mut self.state)?;
        Ok(project(ctx, &self.model.head, &hidden)?)
    }

    /// As the last row of a pass over the whole text, without a cache.
    fn otherwise(&mut self, ctx: Context<'_>, size: &Size) -> Result<Vec<f32>> {
        let whole = Text::new(self.vocab_size(), 0, size.context + size.tokens);
        let hidden = self.model.decoder.decode(
            &mut Scratch::default().with(ctx),
            whole.batch(),
            &mut Decoding::default(),
        )?;
        Ok(project(ctx, &self.model.head, &hidden[size.context * self.model.config.n_embd..])?)
    }

    fn inputs(&self) -> Vec<Input> {
        let end = self.text.positions.last().map_or(0, |&last| last as usize + 1);
        vec![Text::new(self.vocab_size(), 0, end).input("input.ids")]
    }
}

/// The next segment of a text, with a memory of random rows.
struct Xl {
    model: TransformerXl,
    text: Text,
    mems: Vec<Vec<f32>>,
    memory: Memory,
    scratch: Scratch,
}

impl Model for Xl {
    fn prepare(&mut self, ctx: Context<'_>, size: &Size) -> Result<()> {
        let config = &self.model.config;
        self.text = Text::new(config.vocab_size, 0, size.tokens);
        let rows = size.context * config.d_model;
        // As what a norm gives: a mean square of one.
        let layer = |i: usize| Buffer::uniform(rows, 3_f32.sqrt(), 10 + i as u64).to_vec();
        self.mems = (0..config.n_layer).map(layer).collect();
        self.memory = self.model.memory_of(ctx, &self.mems, 1)?;
        Ok(())
    }

    fn run(&mut self, ctx: Context<'_>) -> Result<Vec<f32>> {
        Ok(self.model.forward(&mut self.scratch.with(ctx), &self.text.ids, &mut self.memory)?)
    }

    fn inputs(&self) -> Vec<Input> {
        let d = self.model.config.d_model;
        let memory = |(i, mems): (usize, &Vec<f32>)| {
            (format!("input.mems.{i}"), vec![1, mems.len() / d, d], mems.clone())
        };
        [self.text.input("input.ids")].into_iter().chain(self.mems.iter().enumerate().map(memory)).collect()
    }
}
