//! The readers of config.json and generation_config.json: any text ends as a value or as one short line.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tandem::config::{GenerationConfig, ModelConfig};

fuzz_target!(|text: &str| {
    check(ModelConfig::from_json(text).map(drop));
    check(GenerationConfig::from_json(text).map(drop));
});

fn check(result: tandem::Result<()>) {
    if let Err(e) = result {
        let line = e.to_string();
        assert!(!line.is_empty() && !line.contains('\n') && line.len() < 4000, "{line}");
    }
}
