//! VideoBERT (Sun et al. 2019, <https://arxiv.org/abs/1904.01766>): a clip of a video becomes a token, the nearest centroid of
//! its features, and BERT runs over `[CLS] text [>] video [SEP]` with one vocabulary of words and centroids.

use std::path::Path;

use laneformer::{Activation, Context, Epilogue, Linear, Norm};
use serde::Deserialize;

use crate::attend::project;
use crate::bert::{self, Bert};
use crate::checkpoint::Checkpoint;
use crate::generate::argmax;
use crate::weights::{Weights, linear, normalize_rows};
use crate::{Error, Result};

/// BERT's configuration, and what the video adds to it.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the field's own terms")]
pub struct Config {
    #[serde(flatten)]
    pub bert: bert::Config,
    pub num_centroids: usize,
    pub video_feature_dim: usize,
    pub sep_token_id: u32,
    pub mask_token_id: u32,
}

/// BERT over the joint vocabulary, with its heads.
#[derive(Debug)]
pub struct VideoBert {
    config: Config,
    /// The encoder; centroid `c` is the token `vocab_size + c`.
    pub bert: Bert,
    centroids: Linear,
    transform: (Linear, Norm),
    predictions: Linear,
    alignment: Linear,
}

impl VideoBert {
    /// Packs the weights of a checkpoint; `path` is for messages.
    pub fn load(path: &Path, config: Config, checkpoint: &Checkpoint) -> Result<VideoBert> {
        config.bert.check(path)?;
        let (d, n, n_features) = (config.bert.hidden_size, config.num_centroids, config.video_feature_dim);
        let w = Weights::new(checkpoint, "");
        let mut bert = Bert::load(path, config.bert.clone(), checkpoint)?;
        bert.vocabulary().extend(&w.tensor("video_embeddings.weight", &[n, d])?);

        // |f - c|^2 is least where f.c - |c|^2 / 2 is largest: a product with a bias.
        let centroids = w.tensor("centroids", &[n, n_features])?;
        let square = |c: &[f32]| c.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
        let bias = centroids.chunks_exact(n_features.max(1)).map(|c| (square(c) / -2.0) as f32);
        let centroids = linear(&centroids, n_features, n, Some(&bias.collect::<Vec<_>>()))?;

        let head = w.at("cls.predictions");
        let bias = head.tensor("bias", &[config.bert.vocab_size + n])?;
        let norm = head.at("transform.LayerNorm").layer_norm(d, config.bert.layer_norm_eps)?;
        Ok(VideoBert {
            centroids,
            transform: (head.at("transform.dense").linear(d, d)?, norm),
            predictions: bert.vocabulary().as_linear(Some(&bias))?,
            alignment: w.at("cls.seq_relationship").linear(d, 2)?,
            bert,
            config,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The nearest centroid of every clip, from its features [clips, video_feature_dim].
    pub fn video_ids(&self, ctx: Context<'_>, features: &[f32]) -> Result<Vec<u32>> {
        let scores = project(ctx, &self.centroids, features, &Epilogue::NONE)?;
        Ok(scores
            .chunks_exact(self.config.num_centroids.max(1))
            .map(|scores| argmax(scores) as u32)
            .collect())
    }

    /// The tokens and types of a sequence: the text, the clips (masked ones as `[MASK]`), and `[SEP]`.
    ///
    /// # Errors
    /// [`Error::Index`] for a text token that is not a word.
    pub fn joint_sequence(
        &self,
        text: &[u32],
        video_ids: &[u32],
        masked: &[bool],
    ) -> Result<(Vec<u32>, Vec<u32>)> {
        let words = self.config.bert.vocab_size;
        if let Some(at) = text.iter().position(|&id| id as usize >= words) {
            return Err(Error::Index { table: "word_embeddings", index: text[at], at, rows: words });
        }
        let clip = |(&id, &masked): (&u32, &bool)| {
            if masked { self.config.mask_token_id } else { words as u32 + id }
        };
        let clips = video_ids.iter().zip(masked).map(clip);
        let ids: Vec<_> = text.iter().copied().chain(clips).chain([self.config.sep_token_id]).collect();
        let types = (0..ids.len()).map(|i| u32::from(i >= text.len())).collect();
        Ok((ids, types))
    }

    /// The logits over words, then centroids, for rows of the last hidden state.
    pub fn logits(&self, ctx: Context<'_>, hidden: &[f32]) -> Result<Vec<f32>> {
        let (dense, norm) = &self.transform;
        let mut x = project(ctx, dense, hidden, &Epilogue::activation(Activation::GeluErf))?;
        normalize_rows(ctx, norm, &mut x)?;
        project(ctx, &self.predictions, &x, &Epilogue::NONE)
    }

    /// Whether text and video belong together, as two logits per row of the pooler's output.
    pub fn alignment_logits(&self, ctx: Context<'_>, pooled: &[f32]) -> Result<Vec<f32>> {
        project(ctx, &self.alignment, pooled, &Epilogue::NONE)
    }
}
