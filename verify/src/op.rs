//! Cases of one public operation each.

use laneformer::{
    Activation, Affine, BatchStats, Context, Epilogue, Function, MatMut, MatRef, batchnorm_train,
    elementwise, layernorm, rmsnorm, softmax,
};
use laneformer_models::weights::linear;
use serde::Deserialize;

use crate::attention::attention;
use crate::case::{Case, Outputs};
use crate::{Error, Result};

#[derive(Deserialize)]
struct Config {
    op: String,
    #[serde(default)]
    eps: f32,
    #[serde(default)]
    activation: Option<String>,
    #[serde(default)]
    training: bool,
    #[serde(default)]
    momentum: f32,
}

pub(crate) fn run(ctx: Context<'_>, case: &Case) -> Result<Outputs> {
    let config: Config = case.config()?;
    if config.op == "attention" {
        return attention(ctx, case);
    }
    let mut data = case.f32("x")?;
    // Whatever the number of dimensions, operations go along the last.
    let cols = case.io().shape("in.x")?.last().copied().unwrap_or(1);
    let rows = data.len().checked_div(cols).unwrap_or(0);
    let x = MatMut::contiguous(&mut data, rows, cols)?;
    match config.op.as_str() {
        "softmax" => softmax(ctx, x)?,
        "layernorm" => {
            layernorm(ctx, x, &case.f32("gain")?, case.f32_if_there("bias")?.as_deref(), config.eps)?;
        }
        "rmsnorm" => rmsnorm(ctx, x, &case.f32("gain")?, config.eps)?,
        "batchnorm" => return batchnorm(ctx, case, &config, data, cols),
        "linear" => data = linear_op(ctx, case, &config, x.as_ref())?,
        name => elementwise(ctx, function(name)?, x)?,
    }
    Ok(Outputs::from([("y".into(), data)]))
}

fn function(name: &str) -> Result<Function> {
    Ok(match name {
        "exp" => Function::Exp,
        "tanh" => Function::Tanh,
        "erf" => Function::Erf,
        "relu" => Function::Relu,
        "gelu_erf" => Function::GeluErf,
        "gelu_tanh" => Function::GeluTanh,
        "quick_gelu" => Function::QuickGelu,
        "silu" => Function::Silu,
        _ => return Err(Error::NotBuilt(format!("operation {name}"))),
    })
}

fn activation(name: Option<&str>) -> Result<Activation> {
    Ok(match name {
        None | Some("none") => Activation::None,
        Some("relu") => Activation::Relu,
        Some("gelu_erf") => Activation::GeluErf,
        Some("gelu_tanh") => Activation::GeluTanh,
        Some("quick_gelu") => Activation::QuickGelu,
        Some("silu") => Activation::Silu,
        Some("tanh") => Activation::Tanh,
        Some(name) => return Err(Error::NotBuilt(format!("activation {name}"))),
    })
}

fn linear_op(ctx: Context<'_>, case: &Case, config: &Config, x: MatRef<'_>) -> Result<Vec<f32>> {
    let [out_features, in_features] = case.shape("w")?;
    let bias = case.f32_if_there("bias")?;
    let linear = linear(&case.f32("w")?, in_features, out_features, bias.as_deref())?;
    let residual = case.f32_if_there("residual")?;
    let mut epilogue = Epilogue::activation(activation(config.activation.as_deref())?);
    if let Some(residual) = &residual {
        epilogue = epilogue.with_residual(1.0, MatRef::contiguous(residual, x.rows(), out_features)?);
    }
    let mut y = vec![0.0; x.rows() * out_features];
    linear.forward(ctx, x, &epilogue, MatMut::contiguous(&mut y, x.rows(), out_features)?)?;
    Ok(y)
}

fn batchnorm(
    ctx: Context<'_>,
    case: &Case,
    config: &Config,
    mut y: Vec<f32>,
    channels: usize,
) -> Result<Outputs> {
    let rows = y.len() / channels.max(1);
    let x = MatMut::contiguous(&mut y, rows, channels)?;
    let (gain, bias) = (case.f32("gain")?, case.f32("bias")?);
    let (mean, var) = (case.f32("running_mean")?, case.f32("running_var")?);
    if !config.training {
        Affine::from_running(&gain, &bias, &mean, &var, config.eps)?.apply(ctx, x)?;
        return Ok(Outputs::from([("y".into(), y)]));
    }
    let mut stats = BatchStats::new(mean, var, config.momentum)?;
    batchnorm_train(ctx, x, None, &gain, &bias, config.eps, &mut stats)?;
    Ok(Outputs::from([
        ("y".into(), y),
        ("running_mean".into(), stats.running_mean),
        ("running_var".into(), stats.running_var),
    ]))
}
