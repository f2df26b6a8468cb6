//! What is compared: an operation, its shape, and the operands that everybody gets.

use anyhow::Result;
use serde::Serialize;

use crate::bench::data::Buffer;
use crate::bench::layer::{BERT_BASE, Dims};
use crate::bench::ops::RowKind;
use crate::bench::rows::{self, Cost, Kind, Row};
use crate::compare::sentences::Sentences;
use crate::systems::{self, Items, System};

/// A line of the tables.
pub struct Task {
    pub name: String,
    pub cost: Cost,
    pub spec: Spec,
    /// What is counted beside the time, if anything is.
    pub items: Option<Items>,
}

/// The operation, as the peers' workers read it.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Spec {
    /// Post-norm encoder layers, one after another.
    Layers {
        layers: usize,
        d_model: usize,
        n_heads: usize,
        d_ff: usize,
        batch: usize,
        seq_len: usize,
    },
    /// `x W^T`; the weight may be packed before.
    Gemm {
        m: usize,
        n: usize,
        k: usize,
    },
    /// Tokens in, tokens out: the heads are columns.
    Attention {
        d_model: usize,
        n_heads: usize,
        batch: usize,
        seq_len: usize,
    },
    Softmax {
        rows: usize,
        cols: usize,
    },
    LayerNorm {
        rows: usize,
        cols: usize,
    },
    GeluErf {
        rows: usize,
        cols: usize,
    },
    GeluTanh {
        rows: usize,
        cols: usize,
    },
    /// A whole model with random weights.
    System(System),
    /// Lines of text to vectors, with a model from a directory.
    Sentences(Sentences),
}

/// A named operand.
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub data: Buffer,
}

/// The rows of `bench`, a long sequence, stacks, whose weights do not fit a cache, and whole systems; `small` ones show that
/// everything runs.
pub fn all(small: bool) -> Result<Vec<Task>> {
    let mut tasks: Vec<Task> = rows::all().iter().map(Task::of).collect();
    let long = tasks.iter().take_while(|task| task.name.starts_with("layer/f32/bert-base")).count();
    tasks.insert(long, Task::layers(BERT_BASE, 1, 1, 4096));
    tasks.extend([16, 128].map(|seq_len| Task::layers(BERT_BASE, 12, 1, seq_len)));
    for system in systems::all(small) {
        let (name, cost, items) = (system.name.clone(), system.cost()?, Some(system.items()));
        tasks.push(Task { name, cost, spec: Spec::System(system), items });
    }
    Ok(tasks)
}

impl Task {
    fn of(row: &Row) -> Task {
        let spec = match row.kind {
            Kind::Layer { dims, batch, seq_len } => Spec::layers(dims, 1, batch, seq_len),
            Kind::Gemm { m, n, k } => Spec::Gemm { m, n, k },
            Kind::Attention { dims: Dims { d_model, n_heads, .. }, batch, seq_len } => {
                Spec::Attention { d_model, n_heads, batch, seq_len }
            }
            Kind::Rows { kind, rows, cols } => match kind {
                RowKind::Softmax => Spec::Softmax { rows, cols },
                RowKind::LayerNorm => Spec::LayerNorm { rows, cols },
                RowKind::GeluErf => Spec::GeluErf { rows, cols },
                RowKind::GeluTanh => Spec::GeluTanh { rows, cols },
            },
        };
        Task { name: row.name.clone(), cost: row.cost, spec, items: None }
    }

    fn layers(dims: Dims, layers: usize, batch: usize, seq_len: usize) -> Task {
        let floats = layers * dims.parameters() + batch * seq_len * dims.d_model;
        let flops = layers as u64 * dims.flops(batch, seq_len);
        let cost = Cost { flops, bytes: floats * size_of::<f32>(), elements: None };
        let what = if layers == 1 { "layer".to_owned() } else { format!("stack{layers}") };
        let name = format!("{what}/f32/{}/b{batch}s{seq_len}", dims.name);
        Task { name, cost, spec: Spec::layers(dims, layers, batch, seq_len), items: None }
    }
}

impl Spec {
    fn layers(dims: Dims, layers: usize, batch: usize, seq_len: usize) -> Spec {
        let Dims { d_model, n_heads, d_ff, .. } = dims;
        Spec::Layers { layers, d_model, n_heads, d_ff, batch, seq_len }
    }

    /// The operands, the same in every run; those of a system are its model's.
    pub fn tensors(&self) -> Vec<Tensor> {
        let mut make = Make::default();
        match *self {
            Spec::Layers { layers, d_model: d, d_ff, batch, seq_len, .. } => {
                make.uniform("x", &[batch * seq_len, d], 1.0);
                for i in 0..layers {
                    for part in ["q", "k", "v", "out"] {
                        make.linear(&format!("{i}.{part}"), d, d);
                    }
                    make.linear(&format!("{i}.up"), d_ff, d);
                    make.linear(&format!("{i}.down"), d, d_ff);
                    for norm in 0..2 {
                        make.uniform(&format!("{i}.norm{norm}.gain"), &[d], 1.0);
                        make.uniform(&format!("{i}.norm{norm}.bias"), &[d], 0.2);
                    }
                }
            }
            Spec::Gemm { m, n, k } => {
                make.uniform("x", &[m, k], 1.0);
                make.uniform("weight", &[n, k], unit_scale(k));
            }
            Spec::Attention { d_model, batch, seq_len, .. } => {
                for name in ["x", "k", "v"] {
                    make.uniform(name, &[batch * seq_len, d_model], 1.0);
                }
            }
            Spec::LayerNorm { rows, cols } => {
                make.uniform("x", &[rows, cols], 4.0);
                make.uniform("gain", &[cols], 1.0);
                make.uniform("bias", &[cols], 1.0);
            }
            Spec::Softmax { rows, cols } | Spec::GeluErf { rows, cols } | Spec::GeluTanh { rows, cols } => {
                make.uniform("x", &[rows, cols], 4.0);
            }
            Spec::System(_) | Spec::Sentences(_) => {}
        }
        make.0
    }
}

/// Weights in plus or minus this keep the variance of what they multiply.
fn unit_scale(inputs: usize) -> f32 {
    (3.0 / inputs as f32).sqrt()
}

#[derive(Default)]
struct Make(Vec<Tensor>);

impl Make {
    fn uniform(&mut self, name: &str, shape: &[usize], scale: f32) {
        let seed = 1 + self.0.len() as u64;
        let data = Buffer::uniform(shape.iter().product(), scale, seed);
        self.0.push(Tensor { name: name.to_owned(), shape: shape.to_vec(), data });
    }

    fn linear(&mut self, name: &str, outputs: usize, inputs: usize) {
        self.uniform(&format!("{name}.weight"), &[outputs, inputs], unit_scale(inputs));
        self.uniform(&format!("{name}.bias"), &[outputs], 0.2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_are_the_rows_and_more() -> Result<()> {
        let (tasks, systems) = (all(false)?, systems::all(false).len());
        assert_eq!(tasks.len(), rows::all().len() + 3 + systems);
        assert_eq!(tasks[4].name, "layer/f32/bert-base/b1s4096");
        let stack = &tasks[tasks.len() - systems - 1];
        assert_eq!(stack.name, "stack12/f32/bert-base/b1s128");
        assert_eq!(stack.cost.flops, 12 * BERT_BASE.flops(1, 128));
        assert!(tasks[tasks.len() - systems..].iter().all(|task| task.name.starts_with("systems/")));
        Ok(())
    }

    #[test]
    fn a_spec_names_its_operation() {
        let json = serde_json::to_value(Spec::Gemm { m: 1, n: 2, k: 3 }).expect("json");
        assert_eq!(json, serde_json::json!({ "op": "gemm", "m": 1, "n": 2, "k": 3 }));
        let system = serde_json::to_value(Spec::System(systems::all(true).swap_remove(2))).expect("json");
        assert_eq!((&system["op"], &system["system"]), (&"system".into(), &"gpt_decode".into()));
        assert_eq!((&system["context"], &system["config"]["n_layer"]), (&63.into(), &1.into()));
    }
}
