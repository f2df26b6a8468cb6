//! laneformer's turn.

use anyhow::{Context as _, Result, bail};
use laneformer::{
    Activation, Context, Epilogue, Ffn, Function, Graph, Heads, KeyStore, Layer, Linear, MatMut, MatRef,
    Norm, PackedMatrix, Placement, QkvProjection, QueryRows, SelfAttention, Stack, SubLayer, Terms,
    Workspace, elementwise_into, layernorm_into, softmax_into,
};

use crate::bench::data::Buffer;
use crate::compare::contest::Engine;
use crate::compare::sentences;
use crate::compare::task::{Spec, Task, Tensor};
use crate::systems::{Model, System};

/// The operands, by name.
pub struct Operands<'a>(pub &'a [Tensor]);

impl Operands<'_> {
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.0.iter().find(|t| t.name == name).with_context(|| format!("no operand {name}"))
    }

    pub fn get(&self, name: &str) -> Result<&[f32]> {
        Ok(&self.tensor(name)?.data)
    }

    /// Operand `name` in a buffer of its own.
    fn copy(&self, name: &str) -> Result<Buffer> {
        Ok(Buffer::copy_of(self.get(name)?))
    }

    fn packed(&self, name: &str) -> Result<PackedMatrix> {
        let Tensor { shape, data, .. } = self.tensor(name)?;
        Ok(PackedMatrix::from_out_in(MatRef::contiguous(data, shape[0], shape[1])?)?)
    }

    fn linear(&self, name: &str) -> Result<Linear> {
        Ok(Linear::new(self.packed(&format!("{name}.weight"))?, Some(self.get(&format!("{name}.bias"))?))?)
    }

    fn layer(&self, i: usize, heads: Heads) -> Result<Layer> {
        let linear = |part: &str| self.linear(&format!("{i}.{part}"));
        let post = |norm: usize| -> Result<Placement> {
            let vector =
                |what: &str| Ok::<_, anyhow::Error>(self.get(&format!("{i}.norm{norm}.{what}"))?.to_vec());
            Ok(Placement::post(Norm::LayerNorm {
                gain: vector("gain")?,
                bias: Some(vector("bias")?),
                eps: 1e-12,
            }))
        };
        let qkv = QkvProjection::new(linear("q")?, linear("k")?, linear("v")?, heads)?;
        let attention = SelfAttention::new(qkv, linear("out")?)?;
        let ffn = Ffn::new(linear("up")?, Activation::GeluErf, linear("down")?)?;
        Ok(Layer::new(vec![SubLayer::self_attention(attention, post(0)?)?, SubLayer::ffn(ffn, post(1)?)?])?)
    }
}

/// The library on `task`, in `ctx`, and the operands that everybody gets.
pub fn prepare<'a>(ctx: Context<'a>, task: &Task) -> Result<(Box<dyn Engine + 'a>, Vec<Tensor>)> {
    Ok(match &task.spec {
        Spec::System(system) => Whole::prepare(ctx, system)?,
        Spec::Sentences(sentences) => (Box::new(sentences::Encoder::open(ctx, sentences)?), vec![]),
        _ => {
            let tensors = task.spec.tensors();
            (engine(ctx, &task.spec, &tensors)?, tensors)
        }
    })
}

fn engine<'a>(ctx: Context<'a>, spec: &Spec, tensors: &[Tensor]) -> Result<Box<dyn Engine + 'a>> {
    let operands = Operands(tensors);
    let x = operands.copy("x")?;
    let out = |rows: usize, cols: usize| Buffer::filled(rows * cols, 0.0);
    let offsets = |batch: usize, seq_len: usize| (0..=batch).map(|i| i * seq_len).collect();
    Ok(match *spec {
        Spec::Layers { layers, d_model, n_heads, batch, seq_len, .. } => {
            let heads = Heads::new(n_heads, d_model / n_heads)?;
            let layers = (0..layers).map(|i| operands.layer(i, heads)).collect::<Result<_>>()?;
            let stack = Stack::new(layers)?;
            let workspace = stack.workspace(batch * seq_len, batch, ctx.members())?;
            let y = out(batch * seq_len, d_model);
            Box::new(Layers { ctx, stack, workspace, offsets: offsets(batch, seq_len), x, y })
        }
        Spec::Gemm { m, n, .. } => {
            Box::new(Gemm { ctx, m, x, linear: Linear::new(operands.packed("weight")?, None)?, y: out(m, n) })
        }
        Spec::Attention { d_model, n_heads, batch, seq_len } => {
            let heads = Heads::new(n_heads, d_model / n_heads)?;
            Box::new(Attention {
                ctx,
                heads,
                offsets: offsets(batch, seq_len),
                x,
                k: operands.copy("k")?,
                v: operands.copy("v")?,
                store: KeyStore::new(&heads, batch * seq_len, batch)?,
                y: out(batch * seq_len, d_model),
            })
        }
        Spec::Softmax { rows, cols } => {
            Box::new(Rows { ctx, op: RowOp::Softmax, cols, x, y: out(rows, cols) })
        }
        Spec::LayerNorm { rows, cols } => {
            let op = RowOp::LayerNorm { gain: operands.copy("gain")?, bias: operands.copy("bias")? };
            Box::new(Rows { ctx, op, cols, x, y: out(rows, cols) })
        }
        Spec::GeluErf { rows, cols } => {
            let op = RowOp::Elementwise(Function::GeluErf);
            Box::new(Rows { ctx, op, cols, x, y: out(rows, cols) })
        }
        Spec::GeluTanh { rows, cols } => {
            let op = RowOp::Elementwise(Function::GeluTanh);
            Box::new(Rows { ctx, op, cols, x, y: out(rows, cols) })
        }
        Spec::System(_) | Spec::Sentences(_) => bail!("no operation on tensors"),
    })
}

struct Layers<'a> {
    ctx: Context<'a>,
    stack: Stack,
    workspace: Workspace,
    offsets: Vec<usize>,
    x: Buffer,
    y: Buffer,
}

impl Engine for Layers<'_> {
    /// The layers run in place; the copy of the input is timed, since the others leave it as it is.
    fn run(&mut self) -> Result<()> {
        self.y.copy_from_slice(&self.x);
        let d = self.stack.d_model();
        let tokens = self.y.len() / d;
        let y = MatMut::contiguous(&mut self.y, tokens, d)?;
        Ok(self.stack.forward(self.ctx, y, &self.offsets, &Graph::full(), &mut self.workspace)?)
    }

    fn output(&self) -> &[f32] {
        &self.y
    }
}

struct Gemm<'a> {
    ctx: Context<'a>,
    m: usize,
    x: Buffer,
    linear: Linear,
    y: Buffer,
}

impl Engine for Gemm<'_> {
    fn run(&mut self) -> Result<()> {
        let x = MatRef::contiguous(&self.x, self.m, self.linear.in_features())?;
        let y = MatMut::contiguous(&mut self.y, self.m, self.linear.out_features())?;
        Ok(self.linear.forward(self.ctx, x, &Epilogue::NONE, y)?)
    }

    fn output(&self) -> &[f32] {
        &self.y
    }
}

struct Attention<'a> {
    ctx: Context<'a>,
    heads: Heads,
    offsets: Vec<usize>,
    x: Buffer,
    k: Buffer,
    v: Buffer,
    /// Kept between runs, as the others keep their memory: a run stores keys and values by head and attends.
    store: KeyStore,
    y: Buffer,
}

impl Engine for Attention<'_> {
    fn run(&mut self) -> Result<()> {
        let cols = self.heads.query_cols();
        let tokens = self.x.len() / cols;
        let mat = |x| MatRef::contiguous(x, tokens, cols);
        let (q, k, v) = (mat(&self.x)?, mat(&self.k)?, mat(&self.v)?);
        let y = MatMut::contiguous(&mut self.y, tokens, cols)?;
        self.store.set(self.ctx, k, v, &self.offsets)?;
        let queries = QueryRows::new(q, &self.offsets);
        Ok(self.store.attend(self.ctx, &self.heads, &queries, &Graph::full(), &Terms::default(), y)?)
    }

    fn output(&self) -> &[f32] {
        &self.y
    }
}

enum RowOp {
    Softmax,
    LayerNorm { gain: Buffer, bias: Buffer },
    Elementwise(Function),
}

struct Rows<'a> {
    ctx: Context<'a>,
    op: RowOp,
    cols: usize,
    x: Buffer,
    y: Buffer,
}

impl Engine for Rows<'_> {
    /// From `x` to `y`, as the others do it.
    fn run(&mut self) -> Result<()> {
        let (ctx, cols) = (self.ctx, self.cols);
        let rows = self.x.len() / cols;
        let x = MatRef::contiguous(&self.x, rows, cols)?;
        let y = MatMut::contiguous(&mut self.y, rows, cols)?;
        match &self.op {
            RowOp::Softmax => softmax_into(ctx, x, y)?,
            RowOp::LayerNorm { gain, bias } => layernorm_into(ctx, x, gain, Some(bias), 1e-5, y)?,
            RowOp::Elementwise(function) => elementwise_into(ctx, *function, x, y)?,
        }
        Ok(())
    }

    fn output(&self) -> &[f32] {
        &self.y
    }
}

/// A system.
struct Whole<'a> {
    ctx: Context<'a>,
    model: Box<dyn Model>,
    /// Of the first run: a model that remembers goes on, and the others begin anew each time.
    answer: Option<Vec<f32>>,
}

impl<'a> Whole<'a> {
    /// The weights are those that the model has asked for.
    fn prepare(ctx: Context<'a>, system: &System) -> Result<(Box<dyn Engine + 'a>, Vec<Tensor>)> {
        let (mut model, checkpoint) = system.load()?;
        model.prepare(ctx, &system.size)?;
        let mut tensors = vec![];
        for (name, shape) in checkpoint.asked() {
            let data = Buffer::copy_of(&checkpoint.tensor(&name, &shape)?);
            tensors.push(Tensor { name, shape, data });
        }
        let input = |(name, shape, data): (String, _, Vec<f32>)| {
            let data = Buffer::copy_of(&data);
            Tensor { name, shape, data }
        };
        tensors.extend(model.inputs().into_iter().map(input));
        Ok((Box::new(Whole { ctx, model, answer: None }), tensors))
    }
}

impl Engine for Whole<'_> {
    fn run(&mut self) -> Result<()> {
        let answer = self.model.run(self.ctx)?;
        self.answer.get_or_insert(answer);
        Ok(())
    }

    fn output(&self) -> &[f32] {
        self.answer.as_deref().unwrap_or(&[])
    }
}
