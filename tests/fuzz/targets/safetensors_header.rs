//! The safetensors header reader against the reference implementation: same files accepted, same ranges found.
//!
//! An input is a two-byte count of data bytes and the JSON of a header. (A fuzzer would need for ever to find the
//! right length prefix, so that is added here; the raw input is tried as a whole file as well.)
#![no_main]

use libfuzzer_sys::fuzz_target;
use safetensors::SafeTensors;
use tandem::weights::header;

fuzz_target!(|input: &[u8]| {
    compare(input);
    if let Some((data_len, json)) = input.split_first_chunk() {
        let len = (json.len() as u64).to_le_bytes();
        let data = vec![0; usize::from(u16::from_le_bytes(*data_len))];
        compare(&[&len[..], json, &data].concat());
    }
    // A file of any size whose beginning alone is there.
    if let Some(file_len) = input.last_chunk() {
        let _ = header::parse(input, u64::from_le_bytes(*file_len));
    }
});

fn compare(file: &[u8]) {
    let ours = header::parse(file, file.len() as u64);
    let theirs = SafeTensors::deserialize(file);
    match (ours, theirs) {
        (Ok(ours), Ok(theirs)) => {
            assert_eq!(ours.len(), theirs.len());
            for (name, t) in theirs.iter() {
                let (entry, data) = (&ours[name], t.data());
                let start = data.as_ptr() as u64 - file.as_ptr() as u64;
                assert_eq!(entry.shape, t.shape());
                assert!(data.is_empty() || entry.bytes == (start..start + data.len() as u64));
            }
        }
        (Ok(_), Err(e)) => panic!("accepted, but: {e}"),
        (Err(e), Ok(_)) => {
            // The reference lets a repeated key pass.
            let e = e.to_string();
            assert!(e.contains("listed twice") || e.contains("duplicate field"), "refused: {e}");
        }
        (Err(e), Err(_)) => assert!(e.to_string().len() < 4000),
    }
}
