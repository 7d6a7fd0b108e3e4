//! Refusals, failures and lost devices end a run with their reason; kernels broken on purpose do not pass.

use super::*;
use crate::gpu::standin::Edit;
use std::time::Duration;

#[test]
fn a_refused_allocation_is_an_error_that_says_what_for() {
    let mut refused = Vec::new();
    for n in 1.. {
        let options = Options {
            refuse_alloc: Some(n),
            ..Options::default()
        };
        match run_with(options) {
            Ok(_) => break,
            Err(e) => refused.push(e.to_string()),
        }
    }
    for what in [
        "weights",
        "step buffers",
        "KV cache",
        "host memory for weights on their way",
        "logits on the host",
    ] {
        let said = refused.iter().any(|e| e.starts_with(&format!("{what}: ")));
        assert!(said, "{what}: {refused:#?}");
    }
    assert!(
        refused.iter().all(
            |e| (e.contains("out of memory") || e.contains("ulimit -l")) && e.contains("bytes")
        ),
        "{refused:#?}"
    );
}

#[test]
fn whatever_fails_on_the_device_ends_the_run_with_its_reason() {
    let baseline = Arc::new(Standin::new(Options::default()));
    let parts = Parts::standin(&baseline, None, 0).unwrap();
    let dir = models().join("qwen2-tied");
    let mut rank = Rank::load(&dir, 1, 0, parts, LIMITS).unwrap();
    logits(&mut rank, &Golden::open(&dir).ids("short.ids"), 36, 6).unwrap();
    let (launches, _, copies) = baseline.counts();
    assert!(launches > 100 && copies > 8);
    for n in (1..=copies).step_by(3) {
        let options = Options {
            fail_copy: Some(n),
            ..Options::default()
        };
        let e = run_with(options).unwrap_err().to_string();
        assert!(e.contains("a copy failed"), "copy {n}: {e}");
    }
    for n in (1..=launches).step_by(23) {
        let options = Options {
            lose_device_at_launch: Some(n),
            ..Options::default()
        };
        let e = run_with(options).unwrap_err().to_string();
        assert!(e.contains("the device is lost"), "launch {n}: {e}");
    }
}

/// What two ranks say when one's device is lost at its `launch`-th launch.
fn lost_at(launch: u64) -> Vec<String> {
    let dir = models().join("qwen2-untied");
    let golden = Golden::open(&dir);
    let outcomes = ThreadRanks::each(2, |comm| {
        let rank = comm.rank;
        let options = Options {
            lose_device_at_launch: (rank == 1).then_some(launch),
            patience: Duration::from_secs(2),
            ..Options::default()
        };
        let hidden = ModelConfig::from_dir(&dir)?.hidden_size;
        let standin = Arc::new(Standin::new(options));
        let parts = Parts::standin(&standin, Some(Box::new(comm)), hidden)?;
        both_prompts(&mut Rank::load(&dir, 2, rank, parts, LIMITS)?, &golden)
    });
    let error = |outcome: Result<_>| outcome.unwrap_err().to_string();
    outcomes.into_iter().map(error).collect()
}

#[test]
fn a_lost_device_ends_all_ranks() {
    // In the prefill, whose sums go through the ranks' sockets, and in a decode step, whose sums go over peer memory.
    let (prefill, decode) = (lost_at(5), lost_at(40));
    assert!(prefill[0].contains("a rank is gone"), "{prefill:?}");
    assert!(decode[0].contains("rank 1 did not take part"), "{decode:?}");
    assert!(prefill[1].contains("the device is lost") && decode[1].contains("the device is lost"));
}

/// Kernels broken on purpose: the emulation stops the run, or the logits are wrong.
#[test]
fn a_broken_kernel_does_not_pass() {
    let breaks = [
        // A barrier removed.
        ("gemv.cu", "__syncthreads();", ""),
        ("gemv_batch.cu", "__syncthreads();", ""),
        ("attention_prefill.cu", "__syncthreads();", ""),
        ("attention_decode.cu", "__syncthreads();", ""),
        // A wait for a copy removed.
        ("attention_prefill.cu", "cp_async_wait<0>();", ""),
        // A fence between copies and the tensor cores' reads removed.
        ("attention_prefill_wgmma.cu", "fence_async_proxy();", ""),
        // Off by one.
        ("embed.cu", "i < hidden;", "i <= hidden;"),
        // Past the end.
        ("gemv_batch.cu", "+ my_k, k - 8);", "+ my_k, k);"),
        ("attention_decode.cu", "2 * t + token < n_tokens && ", ""),
        ("attention_prefill.cu", "> sees[i / 2]", ">= sees[i / 2]"),
        ("attention_prefill_wgmma.cu", "> sees)", ">= sees)"),
        // A descriptor that does not say what the copies wrote.
        ("wgmma.cuh", "EIGHT_ROWS = 1024", "EIGHT_ROWS = 512"),
        ("rope.cuh", "slot / KV_BLOCK", "(slot + 1) / KV_BLOCK"),
        // An element that nobody writes.
        (
            "activation.cu",
            "if (i >= inter) return;",
            "if (i + 8 >= inter) return;",
        ),
        ("gemv.cu", "if (row + 8 < n) put", "if (row + 9 < n) put"),
        (
            "gemv_batch.cu",
            "pair + j < share.end(round)",
            "pair + j + 1 < share.end(round)",
        ),
    ];
    let golden = Golden::open(&models().join("qwen2-untied"));
    let want = &golden.floats("short.logits");
    let with = |edit: Option<Edit>| {
        let older = edit
            .as_ref()
            .is_some_and(|e| e.file == "attention_prefill.cu");
        let options = Options {
            compute: if older { AMPERE } else { HOPPER },
            edit,
            ..Options::default()
        };
        let parts = Parts::standin(&Arc::new(Standin::new(options)), None, 0)?;
        let mut rank = Rank::load(&models().join("qwen2-untied"), 1, 0, parts, LIMITS)?;
        logits(&mut rank, &golden.ids("short.ids"), 25, 6)
    };
    assert!(distance(&with(None).unwrap(), want, 300).0 < WORST_ROW);
    for (file, old, new) in breaks {
        match with(Some(Edit { file, old, new })) {
            Ok(got) => {
                let (worst, _) = distance(&got, want, 300);
                println!("{file}: {old:?} → {new:?}: worst row {worst:.4}");
                assert!(
                    worst.is_nan() || worst >= WORST_ROW,
                    "{file}: {old:?} → {new:?} went unnoticed"
                );
            }
            Err(e) => {
                println!("{file}: {old:?} → {new:?}: {e}");
                assert!(
                    e.to_string().contains("kernel "),
                    "{file}: {old:?} → {new:?}: {e}"
                );
            }
        }
    }
}
