//! `tandem bench` on CPU ranks: every configuration is a run of the program, and one that fails is a row.

use crate::support::{golden, signal, tandem};
use serde_json::Value;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;

/// What it measured, its table, and its last line on stderr where configurations failed.
fn bench(args: &[&str], dir: &std::path::Path) -> (Value, String, Option<String>) {
    let (json, svg) = (dir.join("bench.json"), dir.join("bench.svg"));
    let out = tandem()
        .arg("bench")
        .args(args)
        .args(["--device", "cpu", "--max-tokens", "6", "--json"])
        .arg(&json)
        .arg("--svg")
        .arg(&svg)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    let failed = match out.status.code() {
        Some(0) => None,
        code => {
            assert_eq!(code, Some(1), "{stderr}");
            stderr.lines().last().map(str::to_owned)
        }
    };
    let svg = std::fs::read_to_string(svg).unwrap();
    assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    let report = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    (report, String::from_utf8(out.stdout).unwrap(), failed)
}

#[test]
fn scaling_runs_every_size_and_reports_what_fails() {
    let dir = tempfile::tempdir().unwrap();
    let model = golden("models/qwen2-tied").display().to_string();
    let args = [
        "scaling",
        "--model",
        &model,
        "--ranks",
        "1,2",
        "--batch",
        "1,3",
        "--prompt-tokens",
        "20,9999",
    ];
    let (report, text, failed) = bench(&args, dir.path());
    assert_eq!(
        failed.as_deref(),
        Some("tandem: 4 of 8 configurations failed; the table says why")
    );
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 8);
    for row in rows {
        let size = &row["size"];
        if size["prompt_tokens"] == 9999 {
            let error = row["error"].as_str().unwrap();
            assert!(error.contains("the prompt has 9999 tokens"), "{error}");
            assert!(row["measured"].is_null());
            continue;
        }
        let m = &row["measured"];
        for key in [
            "load_s",
            "ready_s",
            "ttft_s",
            "tpot_p50_s",
            "tpot_p99_s",
            "tokens_per_s",
        ] {
            assert!(m[key].as_f64().unwrap() > 0.0, "{key} of {row}");
        }
        assert!(m["tpot_p50_s"].as_f64() <= m["tpot_p99_s"].as_f64());
        assert_eq!(
            m["ranks"].as_array().unwrap().len() as u64,
            size["ranks"].as_u64().unwrap()
        );
        for key in ["decode_s", "prefill_s"] {
            assert!(row["limits"][key].as_f64().unwrap() > 0.0, "{key} of {row}");
        }
    }
    // Two ranks read half of what one reads, but for the norms and this tiny model's uneven cuts: the limit is that of the
    // rank which its own measured rate makes the slower one, now rank 0 with the larger part, now rank 1.
    let bytes = |row: usize| rows[row]["limits"]["decode_bytes"].as_f64().unwrap();
    assert!(
        (0.4..0.8).contains(&(bytes(4) / bytes(0))),
        "{} {}",
        bytes(4),
        bytes(0)
    );
    let ceilings = report["ceilings"].as_array().unwrap();
    assert_eq!(ceilings.len(), 2);
    assert_eq!(
        ceilings[0]["ceilings"]["all_reduce"]
            .as_array()
            .unwrap()
            .len(),
        0
    );
    let sums = ceilings[1]["ceilings"]["all_reduce"].as_array().unwrap();
    assert!(sums.len() >= 8 && sums.iter().all(|s| s["library_us"].as_f64().unwrap() > 0.0));
    assert!(
        text.contains("ceilings of 2 ranks") && text.contains("ciency"),
        "{text}"
    );
    assert!(
        text.contains("2 ranks, prompt 9999, batch 3: failed: "),
        "{text}"
    );
}

#[test]
fn compare_holds_each_way_against_its_prediction() {
    let dir = tempfile::tempdir().unwrap();
    let model = golden("models/qwen3-tied").display().to_string();
    let args = ["compare", "--model", &model, "--prompt-tokens", "20"];
    let (report, text, failed) = bench(&args, dir.path());
    assert_eq!(failed, None);
    let ways = report["ways"].as_array().unwrap();
    let names: Vec<_> = ways.iter().map(|w| w["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["split over 2", "1 rank"]);
    for way in ways {
        assert!(
            way["measured"]["tpot_p50_s"].as_f64().unwrap() > 0.0,
            "{way}"
        );
        assert!(way["predicted"]["tpot_s"].as_f64().unwrap() > 0.0, "{way}");
        assert!(way["decode_limit_s"].as_f64().unwrap() > 0.0, "{way}");
    }
    assert!(text.contains("split over 2"), "{text}");
}

#[test]
fn a_budget_for_gpus_that_are_not_there_is_a_row() {
    let dir = tempfile::tempdir().unwrap();
    let model = golden("models/qwen3-tied").display().to_string();
    let args = [
        "compare",
        "--model",
        &model,
        "--prompt-tokens",
        "20",
        "--gpu-memory",
        "1GiB",
    ];
    let (report, _, failed) = bench(&args, dir.path());
    assert!(failed.unwrap().contains("2 of 3 configurations failed"));
    let errors: Vec<bool> = report["ways"]
        .as_array()
        .unwrap()
        .iter()
        .map(|w| w["error"].is_string())
        .collect();
    assert_eq!(errors, [false, true, true]);
}

#[test]
fn a_bench_of_which_nothing_runs_fails() {
    let out = tandem()
        .args([
            "bench",
            "latency",
            "--device",
            "cpu",
            "--prompt-tokens",
            "9999",
            "--model",
        ])
        .arg(golden("models/qwen2-tied"))
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(
        stderr.ends_with("none of the configurations ran\n"),
        "{stderr}"
    );
}

#[test]
fn a_bench_that_is_stopped_shows_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("bench.json");
    let mut run = tandem();
    run.args(["bench", "latency", "--device", "cpu", "--max-tokens", "4"]);
    // Far more runs than anybody waits for.
    let batches = vec!["1"; 500].join(",");
    run.args(["--prompt-tokens", "20", "--batch", &batches, "--json"])
        .arg(&json)
        .arg("--model")
        .arg(golden("models/qwen2-tied"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = run.spawn().unwrap();
    let n_rows = || {
        let report = std::fs::read(&json).ok()?;
        let report: Value = serde_json::from_slice(&report).expect("whole at any moment");
        report["rows"].as_array().map(Vec::len)
    };
    while n_rows().unwrap_or(0) < 2 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    signal(child.id(), libc::SIGTERM);
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.signal(), Some(libc::SIGTERM));
    let text = String::from_utf8(out.stdout).unwrap();
    let rows = text.lines().filter(|l| l.trim_start().starts_with("1 "));
    assert!(rows.count() >= 2 && text.contains("a second"), "{text}");
    assert!(n_rows().unwrap() >= 2);
}
