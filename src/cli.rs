//! What was typed; touches no file and no device.

use clap::{ArgAction, Args, CommandFactory, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// tandem runs a Qwen model across all the GPUs, or CPU ranks, of an allocation.
#[derive(Debug, Parser)]
#[command(
    name = "tandem",
    version,
    max_term_width = 100,
    arg_required_else_help = true
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Say more on stderr (-v what happens, -vv every step)
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
}

/// Width of the residual stream where no model says it: Qwen2.5-72B's.
pub const DEFAULT_HIDDEN: usize = 8192;

/// Flags whose value is a text, which may begin with a hyphen.
const TEXTS: [&str; 4] = ["--prompt", "-p", "--system", "--stop"];

/// A flag that stands where the text of another one is missing: `--prompt --json`.
///
/// Such a text is possible, but far less likely than a forgotten one.
pub fn missing_text(args: &[String]) -> Option<String> {
    let command = Cli::command();
    let is_flag = |text: &str| {
        let name = text.split('=').next().unwrap_or("");
        let all = command
            .get_subcommands()
            .flat_map(clap::Command::get_arguments)
            .chain(command.get_arguments());
        let mut names = all.flat_map(|arg| {
            let long = arg.get_long().map(|name| format!("--{name}"));
            long.into_iter()
                .chain(arg.get_short().map(|c| format!("-{c}")))
        });
        names.any(|known| known == name)
    };
    let pairs = args.windows(2).map(|pair| (&pair[0], &pair[1]));
    let (flag, value) = pairs
        .filter(|(flag, _)| TEXTS.contains(&flag.as_str()))
        .find(|(_, value)| is_flag(value))?;
    let joined = if flag.starts_with("--") { "=" } else { "" };
    Some(format!(
        "{flag} {value}: the text is missing; if it is {value} itself, write {flag}{joined}{value}"
    ))
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Answer a prompt
    Generate(GenerateArgs),
    /// Talk with the model, turn by turn
    Chat(ChatArgs),
    /// Show what every rank would hold and how fast it should be, without loading anything
    Plan(PlanArgs),
    /// Show what this machine offers: CPU, memory, launcher, CUDA libraries, GPUs
    Doctor(DoctorArgs),
    /// Measure latency and throughput beside what the machine could give
    Bench(BenchArgs),
    /// Compile the GPU kernels ahead of time, on a machine without a GPU (a login node)
    Kernels(KernelsArgs),
    /// Print the completion script of a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// The GPUs when there are any, else the CPU
    Auto,
    /// The CPU cores of this process's affinity mask
    Cpu,
    /// One NVIDIA GPU a rank
    Cuda,
}

/// Where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Weights {
    /// The checkpoint in the model folder
    Checkpoint,
    /// Reproducible random numbers; --model may then name a shape (qwen2.5-72b)
    Random,
}

/// The model and the ranks that run it.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// Model folder as downloaded (config.json, *.safetensors, tokenizer.json)
    #[arg(short, long, value_name = "DIR")]
    pub model: PathBuf,
    /// Where to run
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    pub device: Device,
    /// Start this many ranks on this machine (under srun or mpirun the launcher decides)
    #[arg(long, value_name = "N")]
    pub ranks: Option<usize>,
    /// Where the weights come from
    #[arg(long, value_enum, default_value_t = Weights::Checkpoint)]
    pub weights: Weights,
    /// GPU memory that a rank may use, e.g. 36GiB [default: what is free]
    #[arg(long, value_name = "SIZE")]
    pub gpu_memory: Option<String>,
    /// Host memory that the ranks of a node may use together, e.g. 240GiB [default: what the job's limit leaves]
    #[arg(long, value_name = "SIZE")]
    pub host_memory: Option<String>,
    /// The part of the offloaded weights that the CPU cores multiply; 0 streams all [default: measured]
    #[arg(long, value_name = "FRACTION", hide = true)]
    pub host_share: Option<f64>,
    /// Seconds to wait for all ranks to arrive
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub rendezvous_timeout: u64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub rank: RankArgs,
}

/// Set by `--ranks` for the ranks it starts, or by hand where no launcher is known.
#[derive(Debug, Args)]
pub struct RankArgs {
    /// This process's rank
    #[arg(long, hide = true, requires = "world_size")]
    pub rank: Option<usize>,
    /// Number of ranks
    #[arg(long, hide = true, requires = "rank")]
    pub world_size: Option<usize>,
    /// Rank 0's address
    #[arg(long, hide = true, value_name = "HOST:PORT")]
    pub rendezvous: Option<String>,
}

/// How tokens are chosen; what is not given comes from the model's generation_config.json.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// Longest answer, in tokens [default: 1024, as far as the context and the model's own limit allow]
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<usize>,
    /// Randomness; 0 always takes the most likely token
    #[arg(long, value_name = "T")]
    pub temperature: Option<f32>,
    /// Choose among the K most likely tokens; 0 is all
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Choose among the most likely tokens that make up this probability
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,
    /// Drop tokens below this fraction of the most likely one's probability
    #[arg(long, value_name = "P")]
    pub min_p: Option<f32>,
    /// Make tokens already seen less likely; 1 changes nothing
    #[arg(long, value_name = "X")]
    pub repetition_penalty: Option<f32>,
    /// Seed of the random draws
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// End the answer before this text (may be repeated)
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub stop: Vec<String>,
    /// Go on past the model's stop tokens
    #[arg(long)]
    pub ignore_eos: bool,
}

/// `tandem generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// The prompt [default: stdin]
    #[arg(
        short,
        long,
        value_name = "TEXT",
        group = "source",
        allow_hyphen_values = true
    )]
    pub prompt: Option<String>,
    /// Read the prompt from a file (- is stdin)
    #[arg(long, value_name = "FILE", group = "source")]
    pub prompt_file: Option<PathBuf>,
    /// Read a conversation from a JSON file: a list of {"role", "content"} messages
    #[arg(long, value_name = "FILE", group = "source")]
    pub messages: Option<PathBuf>,
    /// Answer every line of a file as one batch; the output is one JSON object a line
    ///
    /// A line is a JSON object with "prompt", "messages" or "prompt_token_ids" (its other keys are copied to the output),
    /// a JSON string, or plain text. Token ids need no tokenizer. Answers are written as they finish, with the number of
    /// their line as "index", from 0; a file is in the order of the prompts at the end.
    #[arg(long, value_name = "FILE", group = "source", verbatim_doc_comment)]
    pub prompts: Option<PathBuf>,
    /// Use N made-up tokens as the prompt, to measure (needs no tokenizer)
    #[arg(long, value_name = "N", group = "source")]
    pub prompt_tokens: Option<usize>,
    /// Answer that many made-up prompts at a time
    #[arg(
        long,
        value_name = "N",
        requires = "prompt_tokens",
        default_value_t = 1
    )]
    pub batch: usize,
    /// Put the prompt through the model's chat template as the user's message
    #[arg(long)]
    pub chat: bool,
    /// System message (implies --chat)
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// Tools for the chat template: a JSON file with a list of function schemas (implies --chat)
    #[arg(long, value_name = "FILE")]
    pub tools: Option<PathBuf>,
    /// Let the model think first, where its template knows the switch (Qwen3)
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub enable_thinking: Option<bool>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub sampling: SamplingArgs,
    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// Add each token's log-probability to the JSON
    #[arg(long)]
    pub logprobs: bool,
    /// Answer one prompt after the other, as if each were alone
    #[arg(long, hide = true)]
    pub one_by_one: bool,
    /// Write the logits that each token was chosen from, answer after answer, as safetensors: "logits", f32,
    /// [tokens, vocabulary]
    #[arg(long, value_name = "FILE", hide = true)]
    pub logits: Option<PathBuf>,
}

/// `tandem chat`.
#[derive(Debug, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// System message
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// Let the model think first, where its template knows the switch (Qwen3)
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub enable_thinking: Option<bool>,
    /// Longest conversation, in tokens [default: the model's, as far as memory allows]
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub sampling: SamplingArgs,
}

/// `tandem plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Model folder, or a published shape such as qwen2.5-72b
    #[arg(short, long, value_name = "DIR|SHAPE")]
    pub model: PathBuf,
    /// Number of ranks
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub ranks: usize,
    /// What the ranks run on
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    pub device: Device,
    /// Memory of each GPU, e.g. 40GiB (implies --device cuda)
    #[arg(long, value_name = "SIZE")]
    pub gpu_memory: Option<String>,
    /// Host memory that the ranks of a node may fill together, e.g. 256GiB
    #[arg(long, value_name = "SIZE")]
    pub host_memory: Option<String>,
    /// Tokens of a sequence, prompt and answer together [default: 4096, or the model's limit]
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// Sequences at a time
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub batch: usize,
    /// Measure this machine with as many ranks first, and predict by its rates (takes seconds)
    #[arg(long)]
    pub measure: bool,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
}

/// `tandem doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Measure memory, links, products and sums over ranks too, one rank a GPU (takes seconds)
    #[arg(long)]
    pub measure: bool,
    /// Print JSON instead of text
    #[arg(long)]
    pub json: bool,
}

/// `tandem bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub command: BenchCommand,
}

/// The subcommands of `tandem bench`.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Prefill and decode, each beside its limit
    Latency(LatencyArgs),
    /// The model split over the ranks, offloaded on one, and both, beside what the plan predicts
    Compare(CompareArgs),
    /// The same as latency on several numbers of ranks: speed-up and efficiency
    Scaling(ScalingArgs),
    /// Measure the machine's ceilings alone
    #[command(hide = true)]
    Probe(ProbeArgs),
}

/// What every benchmark runs.
#[derive(Debug, Args)]
pub struct BenchModelArgs {
    /// Model folder, or a published shape such as qwen2.5-72b (with random weights)
    #[arg(short, long, value_name = "DIR|SHAPE")]
    pub model: PathBuf,
    /// Where to run
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    pub device: Device,
    /// GPU memory that a rank may use, e.g. 40GiB [default: what is free]
    #[arg(long, value_name = "SIZE")]
    pub gpu_memory: Option<String>,
    /// Host memory that a rank may use, e.g. 40GiB [default: what the job's limit leaves]
    #[arg(long, value_name = "SIZE")]
    pub host_memory: Option<String>,
    /// Tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_tokens: usize,
    /// Seconds that one run may take
    #[arg(long, value_name = "SECONDS", default_value_t = 1800)]
    pub time_limit: u64,
    /// Write everything that was measured to a file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw it
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

/// `tandem bench latency`.
#[derive(Debug, Args)]
pub struct LatencyArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: BenchModelArgs,
    /// Number of ranks [default: those that the launcher started, else 1]
    #[arg(long, value_name = "N")]
    pub ranks: Option<usize>,
    /// Tokens of a prompt, one run for each
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "1024"
    )]
    pub prompt_tokens: Vec<usize>,
    /// Sequences at a time, one run for each
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1")]
    pub batch: Vec<usize>,
}

/// `tandem bench compare`.
#[derive(Debug, Args)]
pub struct CompareArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: BenchModelArgs,
    /// Number of ranks to split over [default: those that the launcher started, else 2]
    #[arg(long, value_name = "N")]
    pub ranks: Option<usize>,
    /// Tokens of a prompt
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub prompt_tokens: usize,
    /// Sequences at a time
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub batch: usize,
}

/// `tandem bench scaling`.
#[derive(Debug, Args)]
pub struct ScalingArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: BenchModelArgs,
    /// Numbers of ranks, one run for each; under srun no more than it started
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "1,2"
    )]
    pub ranks: Vec<usize>,
    /// Tokens of a prompt, one run for each
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "1024"
    )]
    pub prompt_tokens: Vec<usize>,
    /// Sequences at a time, one run for each
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1")]
    pub batch: Vec<usize>,
}

/// `tandem bench probe`.
#[derive(Debug, Args)]
pub struct ProbeArgs {
    /// Where to run
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    pub device: Device,
    /// Start this many ranks on this machine
    #[arg(long, value_name = "N")]
    pub ranks: Option<usize>,
    /// Width of the residual stream in the sums over ranks
    #[arg(long, value_name = "N", default_value_t = DEFAULT_HIDDEN)]
    pub hidden: usize,
    /// Seconds to wait for all ranks to arrive
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub rendezvous_timeout: u64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub rank: RankArgs,
    /// Print JSON instead of text
    #[arg(long)]
    pub json: bool,
}

/// `tandem kernels`.
#[derive(Debug, Args)]
pub struct KernelsArgs {
    /// What to do with them.
    #[command(subcommand)]
    pub command: KernelsCommand,
}

/// The subcommands of `tandem kernels`.
#[derive(Debug, Subcommand)]
pub enum KernelsCommand {
    /// Fill the user's cache of compiled kernels; needs NVRTC, no GPU
    Build {
        /// GPU architectures, e.g. sm_80,sm_90a
        #[arg(long, value_name = "LIST", value_delimiter = ',', required = true)]
        arch: Vec<String>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_may_begin_with_a_hyphen_and_a_flag_is_not_taken_for_one() {
        for text in ["-5 degrees", "--", "- a", "-5", "--not-a-flag", "-vx"] {
            let typed = ["tandem", "generate", "-m", "d"];
            for flag in ["--prompt", "--system", "--stop", "-p"] {
                let args: Vec<String> = typed.iter().map(|s| s.to_string()).collect();
                let args = [args, vec![flag.into(), text.into()]].concat();
                assert_eq!(missing_text(&args), None);
                let Command::Generate(got) = Cli::try_parse_from(&args).unwrap().command else {
                    panic!("{args:?}")
                };
                let mut given = [got.prompt, got.system]
                    .into_iter()
                    .flatten()
                    .chain(got.sampling.stop);
                assert_eq!(given.next().as_deref(), Some(text), "{flag}");
            }
        }
        for args in [
            ["--prompt", "--json"],
            ["--stop", "--top-p=1"],
            ["-p", "-v"],
        ] {
            assert!(missing_text(&args.map(str::to_owned)).is_some(), "{args:?}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
