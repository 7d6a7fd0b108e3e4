//! Peak memory as the operating system saw it.

use crate::support::{assets, golden, tandem};
use serde_json::Value;
use std::path::Path;
use std::process::Stdio;

/// What a rank may take beside its weights and its KV cache: program, tokenizer, step buffers, read buffers.
const ALLOWANCE: u64 = 200 << 20;

/// Runs `size` ranks, each a process of its own, and returns rank 0's answer and every rank's peak resident bytes.
fn peaks(model: &Path, size: usize) -> (Value, Vec<u64>) {
    let address = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    let children: Vec<_> = (0..size)
        .map(|r| {
            let mut run = tandem();
            run.args([
                "generate",
                "--json",
                "--temperature",
                "0",
                "--max-tokens",
                "40",
                "--prompt",
            ]);
            run.arg("The lighthouse sang in the fog. ".repeat(8))
                .arg("--model")
                .arg(model);
            run.args([
                "--rank",
                &r.to_string(),
                "--world-size",
                &size.to_string(),
                "--rendezvous",
                &address,
            ]);
            run.stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let mut answer = Value::Null;
    let mut peak = Vec::new();
    for (rank, mut child) in children.into_iter().enumerate() {
        let mut text = String::new();
        std::io::Read::read_to_string(child.stdout.as_mut().unwrap(), &mut text).unwrap();
        if rank == 0 {
            answer = serde_json::from_str(&text).unwrap();
        }
        // SAFETY: a C struct of integers, for which zeros are a value.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        let mut status = 0;
        // SAFETY: the child is ours and not waited for yet; both pointers are valid for the call.
        let waited = unsafe { libc::wait4(child.id() as i32, &mut status, 0, &mut usage) };
        assert_eq!((waited, status), (child.id() as i32, 0));
        peak.push(usage.ru_maxrss as u64 * 1024);
    }
    (answer, peak)
}

fn within_allowance(model: &Path) {
    for size in [1, 2] {
        let (answer, peaks) = peaks(model, size);
        for (rank, peak) in answer["ranks"].as_array().unwrap().iter().zip(peaks) {
            let held =
                rank["bytes"]["weights"].as_u64().unwrap() + rank["bytes"]["kv"].as_u64().unwrap();
            assert!(
                peak < held + ALLOWANCE,
                "{} of {size}: peak {peak}, holds {held}",
                rank["rank"]
            );
        }
    }
}

#[test]
fn a_tiny_rank_stays_within_its_allowance() {
    within_allowance(&golden("models/qwen3-sharded"));
}

#[test]
#[ignore = "needs TANDEM_TEST_ASSETS"]
fn assets_smollm2_stays_within_its_allowance() {
    within_allowance(&assets("smollm2"));
}
