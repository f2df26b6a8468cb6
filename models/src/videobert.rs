//! VideoBERT (Sun et al. 2019, <https://arxiv.org/abs/1904.01766>): a clip of a video becomes a token, the nearest centroid of
//! its features, and BERT runs over `[CLS] text [>] video [SEP]` with one vocabulary of words and centroids.

use std::path::Path;

use laneformer::{Context, Linear};
use serde::Deserialize;
use serde_json::Value;

use crate::bert::{self, Bert};
use crate::config::from_value;
use crate::error::{check_indices, check_numbers, check_size};
use crate::head::{Head, argmax};
use crate::run::project;
use crate::weights::linear;
use crate::{Checkpoint, Result, Weights};

/// What the video adds to BERT's configuration.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the field's own terms")]
pub struct Config {
    pub num_centroids: usize,
    pub video_feature_dim: usize,
    pub sep_token_id: u32,
    pub mask_token_id: u32,
}

/// BERT over the joint vocabulary, with its heads.
#[derive(Debug)]
pub struct VideoBert {
    /// The configuration.
    pub config: Config,
    /// The encoder; centroid `c` is the token `vocab_size + c`.
    pub bert: Bert,
    /// From the pooler's output to two logits: whether text and video belong together.
    pub alignment: Linear,
    centroids: Linear,
    predictions: Head,
}

impl VideoBert {
    /// Packs the weights of a checkpoint; `path` is for messages.
    pub fn load(path: &Path, json: &Value, checkpoint: &Checkpoint) -> Result<VideoBert> {
        let (bert, config): (_, Config) = (bert::Config::part(path, json)?, from_value(path, json)?);
        let (d, n, n_features) = (bert.hidden_size, config.num_centroids, config.video_feature_dim);
        let w = Weights::new(checkpoint, "");
        let mut bert = Bert::new(path, bert, checkpoint)?;
        let words = &mut bert.encoder.embeddings.words;
        words.extend(&w.tensor("video_embeddings.weight", &[n, d])?);

        let centroids = nearest(&w.tensor("centroids", &[n, n_features])?, n_features, n)?;

        let head = w.at("cls.predictions");
        let bias = head.tensor("bias", &[bert.config.vocab_size + n])?;
        let predictions = Head {
            dense: head.at("transform.dense").linear(d, d)?,
            norm: head.at("transform.LayerNorm").layer_norm(d, bert.config.layer_norm_eps)?,
            out: words.as_linear(Some(&bias))?,
        };
        let alignment = w.at("cls.seq_relationship").linear(d, 2)?;
        Ok(VideoBert { config, bert, centroids, predictions, alignment })
    }

    /// The nearest centroid of every clip, from its features [clips, video_feature_dim].
    pub fn video_ids(&self, ctx: Context<'_>, features: &[f32]) -> Result<Vec<u32>> {
        let scores = project(ctx, &self.centroids, features)?;
        check_numbers("a distance to a centroid", &scores)?;
        let clips = scores.chunks_exact(self.config.num_centroids.max(1));
        Ok(clips.map(|scores| argmax(scores) as u32).collect())
    }

    /// The tokens and types of a sequence: the text, of words alone, the clips (masked ones as `[MASK]`), and `[SEP]`.
    pub fn joint_sequence(
        &self,
        text: &[u32],
        video_ids: &[u32],
        masked: &[bool],
    ) -> Result<(Vec<u32>, Vec<u32>)> {
        let words = self.bert.config.vocab_size;
        check_indices("word_embeddings", words, text)?;
        check_indices("centroids", self.config.num_centroids, video_ids)?;
        check_size("masked", video_ids.len(), masked.len())?;
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
        self.predictions.forward(ctx, hidden)
    }
}

/// A product whose largest output is that of the nearest of `n` centroids: |f - c|^2 is least where f.(c - m) - (|c|^2 - |m|^2) / 2 is
/// largest, for any m. With their mean the terms are no larger than the centroids lie apart.
fn nearest(centroids: &[f32], n_features: usize, n: usize) -> Result<Linear> {
    let rows = || centroids.chunks_exact(n_features.max(1));
    let mut mean = vec![0.0f64; n_features];
    for c in rows() {
        mean.iter_mut().zip(c).for_each(|(mean, &c)| *mean += f64::from(c) / n as f64);
    }
    let from_mean =
        |c: &[f32]| c.iter().zip(&mean).map(|(&c, m)| (f64::from(c) - m) as f32).collect::<Vec<_>>();
    // |c|^2 - |m|^2 as the sum of (c - m)(c + m), of the c - m that is multiplied.
    let bias = rows().map(|c| {
        let terms = c.iter().zip(&mean).zip(from_mean(c));
        (terms.map(|((&c, m), d)| f64::from(d) * (f64::from(c) + m)).sum::<f64>() / -2.0) as f32
    });
    let weight: Vec<f32> = rows().flat_map(from_mean).collect();
    linear(&weight, n_features, n, Some(&bias.collect::<Vec<_>>()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Centroids a little apart and far from 0: |c|^2 / 2 is a million, what tells them from one another 0.03.
    #[test]
    fn the_nearest_of_distant_centroids_is_found() -> Result<()> {
        let (n, n_features) = (7, 1024);
        let centroid = |c: usize| (0..n_features).map(move |i| 50.0 + ((i * (c + 3)) % 11) as f32 / 700.0);
        let centroids: Vec<f32> = (0..n).flat_map(centroid).collect();
        let scores = project(Context::serial(), &nearest(&centroids, n_features, n)?, &centroids)?;
        let found: Vec<usize> = scores.chunks_exact(n).map(argmax).collect();
        assert_eq!(found, (0..n).collect::<Vec<_>>());
        Ok(())
    }
}
