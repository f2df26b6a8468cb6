//! `laneformer bench systems`: whole models, from their input to their last hidden state or their logits.

use std::process::ExitCode;

use anyhow::Result;
use comfy_table::Table;
use laneformer::{Context, Isa, Serial};
use serde::Serialize;

use crate::bench::check::same_bits;
use crate::bench::measure::{Deviation, Workload};
use crate::bench::report::{Output, Record, aligned};
use crate::bench::{Item, measure, no_row};
use crate::runtime::RuntimeArgs;
use crate::systems::{self, Items, Model, System};

/// Arguments of `bench systems`.
#[derive(clap::Args)]
pub struct SystemsArgs {
    /// Only rows whose name contains this
    #[arg(value_name = "FILTER", default_value = "", hide_default_value = true)]
    filter: String,
    /// One layer, a small vocabulary and a short input: a look whether everything runs
    #[arg(long)]
    small: bool,
    /// One JSON object per row instead of the table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

/// What `--json` prints: the fields of every row of `bench`, and what is counted.
#[derive(Serialize)]
struct SystemRecord {
    #[serde(flatten)]
    record: Record,
    #[serde(flatten)]
    items: Items,
    items_per_s: f64,
}

/// Measures the rows; failure if an answer is wrong.
pub fn run(args: &SystemsArgs) -> Result<ExitCode> {
    let all = systems::all(args.small);
    let wanted: Vec<&System> = all.iter().filter(|system| system.name.contains(&args.filter)).collect();
    if wanted.is_empty() {
        return no_row(&args.filter, all.iter().map(|system| system.name.clone()));
    }
    let runtime = args.runtime.build()?;
    let ctx = runtime.context();
    let mut output = Output::new(args.json, wanted.len());
    for system in wanted {
        output.begin(&system.name);
        let (model, _) = system.load()?;
        let (cost, items) = (system.cost()?, system.items());
        let item = Item { name: system.name.clone(), cost, workload: Box::new(Whole { system, model }) };
        for (name, record) in measure(vec![item], ctx)? {
            let record = record.map(|record| SystemRecord {
                items,
                items_per_s: items.per_second(record.median_ns),
                record,
            });
            output.add(&name, record)?;
        }
    }
    output.finish(ctx, table)
}

/// A model and its input.
struct Whole<'a> {
    system: &'a System,
    model: Box<dyn Model>,
}

impl Workload for Whole<'_> {
    /// A small input in two ways, on another instruction set and one thread the second time: the bits have to be the same. Whether
    /// they are right is what the golden cases say. The whole input has to give numbers.
    fn check(&mut self, ctx: Context<'_>) -> Result<Deviation> {
        let Whole { system, model } = self;
        let other = other_isa(ctx.isa());
        model.prepare(ctx, &system.check)?;
        let got = model.run(ctx)?;
        let want = model.otherwise(Context::new(other, &Serial), &system.check)?;
        let deviation = same_bits(ctx.isa().keeps_bits() && other.keeps_bits(), &got, &want);
        model.prepare(ctx, &system.size)?;
        let are_numbers = model.run(ctx)?.iter().all(|x| x.is_finite());
        Ok(if are_numbers { deviation } else { Deviation { max_err: f64::INFINITY, ..deviation } })
    }

    fn run(&mut self, ctx: Context<'_>) -> Result<()> {
        self.model.run(ctx).map(drop)
    }
}

/// The widest of the others; the scalar one would take minutes.
fn other_isa(isa: Isa) -> Isa {
    let others = Isa::available().into_iter().rev();
    others.into_iter().find(|&other| other != isa && other != Isa::SCALAR).unwrap_or(isa)
}

fn table(records: &[SystemRecord]) -> Table {
    let header = ["name", "median", "min", "per second", "rate", "bound", "peak", "of peak", "max error"];
    aligned(
        header,
        records.iter().map(|r| r.record.cells_around([format!("{:.1} {}", r.items_per_s, r.items.unit)])),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer that differs in a bit, and one that is no number.
    struct Wrong(f32);

    impl Model for Wrong {
        fn prepare(&mut self, _: Context<'_>, _: &systems::Size) -> Result<()> {
            Ok(())
        }
        fn run(&mut self, _: Context<'_>) -> Result<Vec<f32>> {
            Ok(vec![1.0, self.0])
        }
        fn otherwise(&mut self, _: Context<'_>, _: &systems::Size) -> Result<Vec<f32>> {
            Ok(vec![1.0, 2.0])
        }
        fn inputs(&self) -> Vec<(String, Vec<usize>, Vec<f32>)> {
            vec![]
        }
    }

    #[test]
    fn wrong_answers_are_wrong() -> Result<()> {
        let ctx = Context::new(Isa::SCALAR, &Serial);
        let system = &systems::all(true)[0];
        let check = |x| Whole { system, model: Box::new(Wrong(x)) }.check(ctx);
        assert!(check(2.0)?.is_right());
        assert!(!check(f32::NAN)?.is_right());
        // Without another instruction set of the same bits there is a tolerance.
        let near = f32::from_bits(2.0_f32.to_bits() + 1);
        assert_eq!(check(near)?.is_right(), !other_isa(Isa::SCALAR).keeps_bits());
        Ok(())
    }
}
