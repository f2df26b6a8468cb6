//! An output against the reference: the largest error, its limit, and special values.

use laneformer_models::Checkpoint;

use crate::Result;
use crate::case::{Case, OutputSpec};

/// How one output of a case came out.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// The case.
    pub case: String,
    /// The output.
    pub output: String,
    /// The largest error that passes.
    pub limit: f64,
    /// What happened.
    pub outcome: Outcome,
}

/// What happened to an output.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It was computed; the largest error over the entries that are compared.
    Computed {
        /// The largest absolute error; infinite where a special value met something else.
        max_abs_error: f64,
    },
    /// It was not computed, and why.
    Missing(String),
}

impl Verdict {
    /// Whether the output is within its limit.
    pub fn passed(&self) -> bool {
        matches!(self.outcome, Outcome::Computed { max_abs_error } if max_abs_error <= self.limit)
    }

    pub(crate) fn without_result(case: &Case, output: &str, spec: &OutputSpec, why: String) -> Verdict {
        let outcome = Outcome::Missing(why);
        Verdict { case: case.name().into(), output: output.into(), limit: spec.limit(), outcome }
    }
}

pub(crate) fn compare(case: &Case, output: &str, spec: &OutputSpec, actual: &[f32]) -> Result<Verdict> {
    let name = format!("out.{output}");
    let expected = if spec.is_integer() {
        case.io().i64(&name)?.iter().map(|&i| i as f32).collect()
    } else {
        case.io().f32(&name)?
    };
    let rows = match &spec.rows {
        Some(name) => mask(case.io(), name)?,
        None => vec![true],
    };
    if actual.len() != expected.len() || !expected.len().is_multiple_of(rows.len().max(1)) {
        let (expected, rows) = (expected.len(), rows.len());
        let why = format!("expected {expected} elements in {rows} rows, got {}", actual.len());
        return Ok(Verdict::without_result(case, output, spec, why));
    }
    let row_len = (expected.len() / rows.len().max(1)).max(1);
    let pairs = expected.chunks(row_len).zip(actual.chunks(row_len));
    let compared = rows.iter().zip(pairs).filter(|(row, _)| **row);
    let errors = compared.flat_map(|(_, (expected, actual))| expected.iter().zip(actual)).map(error);
    let outcome = Outcome::Computed { max_abs_error: errors.fold(0.0, f64::max) };
    Ok(Verdict { case: case.name().into(), output: output.into(), limit: spec.limit(), outcome })
}

/// Masks are bytes among the inputs, and may be integers among the outputs.
fn mask(io: &Checkpoint, name: &str) -> Result<Vec<bool>> {
    match io.u8(name) {
        Ok(mask) => Ok(mask.iter().map(|&real| real != 0).collect()),
        Err(_) => Ok(io.i64(name)?.iter().map(|&real| real != 0).collect()),
    }
}

/// The absolute error; a NaN must meet NaN, and an infinity the same infinity.
fn error((&expected, &actual): (&f32, &f32)) -> f64 {
    if expected == actual || (expected.is_nan() && actual.is_nan()) {
        0.0
    } else if expected.is_finite() && actual.is_finite() {
        (f64::from(expected) - f64::from(actual)).abs()
    } else {
        f64::INFINITY
    }
}

#[cfg(test)]
mod tests {
    use super::error;

    #[test]
    fn special_values_meet_their_like() {
        const INF: f32 = f32::INFINITY;
        for (expected, actual, passes) in [
            (f32::NAN, f32::NAN, true),
            (INF, INF, true),
            (-INF, -INF, true),
            (0.0, -0.0, true),
            (INF, -INF, false),
            (INF, f32::MAX, false),
            (1.0, f32::NAN, false),
            (f32::NAN, 1.0, false),
        ] {
            assert_eq!(error((&expected, &actual)) == 0.0, passes, "{expected} {actual}");
        }
        assert_eq!(error((&1.0, &1.5)), 0.5);
    }
}
