//! `tandem plan`: what every rank would hold and how fast it should be; no weights are read, and no GPU is needed unless it
//! is to be measured.

use crate::cli::{Device, PlanArgs};
use crate::config::{ModelConfig, SHAPES, named_shape};
use crate::model::check_tensors;
use crate::output::{write_json, write_stdout};
use crate::plan::{self, DeviceKind, Options, Plan, Rates};
use crate::session;
use crate::weights::{Checkpoint, Dtype};
use crate::{Error, Result};
use serde::Serialize;

/// Tokens of a sequence where `--context` does not say.
const DEFAULT_CONTEXT: usize = 4096;

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    plan: &'a Plan,
    options: &'a Options,
}

/// Runs the command.
///
/// # Errors
/// An unknown shape, a bad folder, sizes that cannot be read, a request that cannot fit, a measurement that fails.
pub fn run(args: &PlanArgs) -> Result<()> {
    let (config, dtype) = model_of(args)?;
    let size = |given: &Option<String>| given.as_deref().map(crate::bytes::parse).transpose();
    let (mut gpu_memory, host_memory) = (size(&args.gpu_memory)?, size(&args.host_memory)?);
    if args.ranks == 0 {
        return Err(Error::usage("--ranks 0: at least 1"));
    }
    let on_gpu =
        args.device == Device::Cuda || (args.device == Device::Auto && gpu_memory.is_some());
    let mut device = if on_gpu {
        DeviceKind::Cuda
    } else {
        DeviceKind::Cpu
    };
    let mut rates = Rates::assumed(device, gpu_memory);
    if args.measure {
        // A budget of GPU memory speaks of GPUs: without any, there is nothing to measure.
        let on = if on_gpu { Device::Cuda } else { args.device };
        let probe = super::doctor::probe_args(on, args.ranks);
        let Some(measured) = session::probe(&probe)? else {
            // Another rank: rank 0 says it all.
            return Ok(());
        };
        (device, rates) = (measured.device(), measured.rates());
        if device == DeviceKind::Cuda {
            gpu_memory = gpu_memory.or(measured.ranks.iter().map(|r| r.memory).min());
        }
    }
    let request = plan::Request {
        dtype,
        max_seqs: args.batch,
        context: args
            .context
            .unwrap_or(DEFAULT_CONTEXT.min(config.max_position_embeddings)),
        gpu_memory,
        host_memory,
        rates,
        ..plan::Request::new(
            &args.model.display().to_string(),
            &config,
            device,
            args.ranks,
        )
    };
    let plan = Plan::for_run(&config, &request)?;
    let options = Options::new(&plan);
    if args.json {
        write_json(&Report {
            plan: &plan,
            options: &options,
        })
    } else {
        write_stdout(&format!("{plan}\n{options}"))
    }
}

/// The shape, and what its weights are stored as.
fn model_of(args: &PlanArgs) -> Result<(ModelConfig, Dtype)> {
    match args.model.to_str().and_then(named_shape) {
        Some(config) if !args.model.exists() => {
            let dtype = config.dtype;
            Ok((config, dtype))
        }
        _ if args.model.is_dir() => {
            let mut config = ModelConfig::from_dir(&args.model)?;
            let dtype = check_tensors(&mut config, &mut Checkpoint::open(&args.model)?)?;
            Ok((config, dtype))
        }
        _ => {
            let known = SHAPES.join(", ");
            let what = format!("neither a model folder nor a known shape ({known})");
            Err(Error::file(&args.model, what))
        }
    }
}
