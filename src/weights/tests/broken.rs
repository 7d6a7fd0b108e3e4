//! Every way a checkpoint can be broken, and the line that it gets.

use super::*;
use proptest::prelude::*;
use std::os::unix::fs::symlink;

/// What `open` says about a directory, without the directory's own path.
fn complaint(dir: &Path) -> String {
    let e = Checkpoint::open(dir)
        .expect_err("the checkpoint is broken")
        .to_string();
    assert!(!e.contains('\n') && e.chars().count() < 1000, "{e}");
    e.replace(&format!("{}/", dir.display()), "")
        .replace(&dir.display().to_string(), "DIR")
}

/// What `open` says about a single file of these bytes.
fn broken(bytes: impl AsRef<[u8]>) -> String {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "model.safetensors", bytes);
    let e = complaint(dir.path());
    e.strip_prefix("model.safetensors: ")
        .unwrap_or_else(|| panic!("no file in: {e}"))
        .to_owned()
}

/// What `open` says about a file with this header and 16 bytes of data.
fn broken_header(json: &str) -> String {
    broken(file(json, &[0; 16]))
}

#[test]
fn header_lengths_that_lie() {
    assert_eq!(
        broken([]),
        "0 bytes is too short for a safetensors file; download it again"
    );
    assert_eq!(
        broken([1; 7]),
        "7 bytes is too short for a safetensors file; download it again"
    );
    assert_eq!(broken([0; 64]), "header length 0: not a safetensors file");
    assert_eq!(
        broken(u64::MAX.to_le_bytes()),
        "header length 18446744073709551615 exceeds the limit of 100000000 bytes: not a safetensors file, or damaged"
    );
    assert_eq!(
        broken(&file(&" ".repeat(100), &[])[..50]),
        "truncated: the header has 100 bytes and the file 42 after the length (58 missing); download it again"
    );
    assert!(
        broken("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
            .starts_with("a Git LFS pointer")
    );
}

#[test]
fn headers_that_are_not_what_they_should_be() {
    assert!(broken_header("{").starts_with("the header is damaged: EOF while parsing"));
    assert!(broken_header("[]").contains("expected an object keyed by tensor name"));
    assert!(broken_header(&"[".repeat(100_000)).starts_with("the header is damaged: "));
    assert!(
        broken_header(&format!("{{\"a\":{}", "[".repeat(100_000)))
            .starts_with("the header is damaged: ")
    );
    assert!(broken(file("{\"a\u{0}", &[])).starts_with("the header is damaged: "));
    assert!(
        broken([&5u64.to_le_bytes()[..], b"{\"\xff\xfe\"}"].concat())
            .starts_with("the header is damaged: ")
    );
    let cases = [
        (
            r#"{"a":{"shape":[4],"data_offsets":[0,16]}}"#,
            "tensor `a`: missing field `dtype`",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}"#,
            "tensor `a`: invalid value: integer `-4`",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[4.0],"data_offsets":[0,16]}}"#,
            "tensor `a`: invalid type: floating point",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0]}}"#,
            "tensor `a`: invalid length 1",
        ),
        (
            r#"{"a":{"dtype":"X","shape":[4],"data_offsets":[0,16]}}"#,
            "tensor `a`: unknown variant `X`",
        ),
        (
            r#"{"a":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#,
            "duplicate field `dtype`",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#,
            "`a` is listed twice",
        ),
        (
            r#"{"__metadata__":{},"__metadata__":{}}"#,
            "`__metadata__` is listed twice",
        ),
        (r#"{} {}"#, "trailing characters"),
    ];
    for (json, what) in cases {
        let e = broken_header(json);
        assert!(e.contains(what), "{json}: {e}");
    }
}

#[test]
fn ranges_that_lie() {
    let cases = [
        (
            r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,16]}}"#,
            "tensor `a`: F32 [3] in 16 bytes: invalid shape, data type, or offset for tensor",
        ),
        (
            r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}"#,
            "tensor `a`: F4 [3] in 1 bytes: The slice is slicing for subbytes dtypes, and the slice does not end up at a byte boundary, this is invalid.",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}"#,
            "tensor `a`: data_offsets [16, 0] are not a range",
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,18446744073709551615]}}"#,
            "tensor `a`: U8 [4] in 18446744073709551615 bytes: invalid shape, data type, or offset for tensor",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}"#,
            "tensor `a`: F32 [4294967296, 4294967296] in 16 bytes: overflow computing buffer size from shape and/or element type",
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[12],"data_offsets":[0,12]},"b":{"dtype":"U8","shape":[8],"data_offsets":[8,16]}}"#,
            "tensor `b` does not begin where the one before it ends: a hole, or an overlap",
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[6],"data_offsets":[10,16]}}"#,
            "tensor `b` does not begin where the one before it ends: a hole, or an overlap",
        ),
        (
            r#"{"b":{"dtype":"U8","shape":[14],"data_offsets":[2,16]}}"#,
            "tensor `b` does not begin where the one before it ends: a hole, or an overlap",
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}"#,
            "8 bytes at the end belong to no tensor",
        ),
        (r#"{}"#, "16 bytes at the end belong to no tensor"),
        (
            r#"{"a":{"dtype":"U8","shape":[1000],"data_offsets":[0,1000]},"b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
            "tensor `b` does not begin where the one before it ends: a hole, or an overlap",
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[1000],"data_offsets":[0,1000]}}"#,
            "truncated at tensor `a`: 16 bytes of data are there, the header speaks of 1000; download it again",
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[9223372036854775807],"data_offsets":[0,9223372036854775807]},
                "b":{"dtype":"U8","shape":[9223372036854775807],"data_offsets":[9223372036854775807,18446744073709551614]}}"#,
            "tensor `a`: U8 [9223372036854775807] in 9223372036854775807 bytes: overflow computing buffer size from shape and/or element type",
        ),
    ];
    for (json, what) in cases {
        assert_eq!(broken_header(json), what, "{json}");
    }
}

proptest! {
    /// Whatever the numbers: a line, or ranges that lie in the file one behind the other.
    #[test]
    fn any_numbers_end_as_a_line_or_as_ranges_inside_the_file(
        tensors in prop::collection::vec((0usize..4, prop::collection::vec(number(), 0..3), number(), number()), 0..5),
        file_len in number(),
        there in 0usize..200,
    ) {
        let entry = |(i, (dtype, shape, begin, end)): (usize, &(usize, Vec<u64>, u64, u64))| {
            let dtype = ["U8", "BF16", "F4", "F64"][*dtype];
            let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]});
            (format!("t{i}"), entry)
        };
        let header: serde_json::Map<_, _> = tensors.iter().enumerate().map(entry).collect();
        let bytes = file(&serde_json::Value::Object(header).to_string(), &vec![0; there]);
        for len in [bytes.len() as u64, file_len] {
            let Ok(entries) = header::parse(&bytes, len) else { continue };
            let mut ranges: Vec<_> = entries.values().map(|e| e.bytes.clone()).collect();
            ranges.sort_by_key(|r| (r.start, r.end));
            prop_assert!(ranges.windows(2).all(|w| w[0].end == w[1].start));
            prop_assert!(ranges.iter().all(|r| r.start <= r.end && r.end <= len));
        }
    }
}

/// Small ones, and those at the ends of what 64 bits hold.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        0u64..20,
        0u64..20,
        (u64::MAX - 20)..=u64::MAX,
        (1u64 << 63) - 20..(1u64 << 63) + 20,
        Just(1u64 << 32)
    ]
}

#[test]
fn truncated_data_is_counted() {
    let full = well_formed(&[
        ("a", "F32", &[4], &[0; 16]),
        ("b", "F32", &[4], &[0; 16]),
        ("c", "U8", &[2], &[0; 2]),
    ]);
    let n = full.len();
    let say = |tensor, there| {
        format!(
            "truncated at tensor `{tensor}`: {there} bytes of data are there, the header speaks of 34; download it again"
        )
    };
    assert_eq!(broken(&full[..n - 1]), say("c", 33));
    assert_eq!(broken(&full[..n - 3]), say("b", 31));
    assert_eq!(broken(&full[..n - 34]), say("a", 0));
}

#[test]
fn megabytes_in_a_name_do_not_reach_the_terminal() {
    let long = "x".repeat(1 << 20);
    assert!(
        broken_header(&format!(
            r#"{{"{long}":{{"dtype":"F32","shape":[1],"data_offsets":[0,16]}}}}"#
        ))
        .len()
            < 500
    );
    assert!(
        broken_header(&format!(
            r#"{{"a":{{"dtype":"F32","shape":"{long}","data_offsets":[0,16]}}}}"#
        ))
        .len()
            < 500
    );
    let shape = "1,".repeat(1 << 16);
    assert!(
        broken_header(&format!(
            r#"{{"a":{{"dtype":"F32","shape":[{shape}7],"data_offsets":[0,16]}}}}"#
        ))
        .len()
            < 500
    );
}

/// A directory with two shards, `a` in the first and `b` in the second, and this index.
fn sharded(weight_map: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (file, tensor) in [("1.safetensors", "a"), ("2.safetensors", "b")] {
        put(
            dir.path(),
            file,
            well_formed(&[(tensor, "F32", &[1], &[0; 4])]),
        );
    }
    put(
        dir.path(),
        "model.safetensors.index.json",
        format!(r#"{{"metadata":{{}},"weight_map":{weight_map}}}"#),
    );
    dir
}

/// What is said about the directory by who needs `a` and `b` of it.
fn verdict(dir: &Path) -> crate::Result<()> {
    let all = |_: &str| true;
    Checkpoint::open(dir)?.check(&[("a", [1, 1]), ("b", [1, 1])], &all)
}

#[test]
fn an_index_need_not_be_exact_where_it_does_not_matter() {
    let good = sharded(r#"{"a":"1.safetensors","b":"2.safetensors"}"#);
    assert_eq!(Checkpoint::open(good.path()).unwrap().total_bytes(), 8);
    for weight_map in [
        r#"{"a":"1.safetensors","b":"2.safetensors"}"#,
        r#"{"a":"1.safetensors","b":"2.safetensors","c":"2.safetensors"}"#,
        r#"{"a":"1.safetensors","c":"2.safetensors"}"#,
        r#"{"a":"2.safetensors","b":"1.safetensors"}"#,
    ] {
        assert!(verdict(sharded(weight_map).path()).is_ok(), "{weight_map}");
    }
    // A file that is not there may have held what is not needed; the index says whether it did.
    let lost = sharded(r#"{"a":"1.safetensors","b":"2.safetensors","c":"3.safetensors"}"#);
    let checkpoint = Checkpoint::open(lost.path()).unwrap();
    let needed = [("a", [1, 1]), ("b", [1, 1])];
    assert!(checkpoint.check(&needed, &|name| name != "c").is_ok());
    assert!(checkpoint.is_listed("c"));
    let e = checkpoint
        .check(&needed, &|_| true)
        .unwrap_err()
        .to_string();
    assert!(e.contains("1 tensor (`c`)"), "{e}");
}

#[test]
fn an_index_that_disagrees_with_its_files() {
    let good = sharded(r#"{"a":"1.safetensors","b":"2.safetensors"}"#);
    let needed = [
        (
            r#"{"a":"1.safetensors","b":"3.safetensors"}"#,
            "3.safetensors: is missing; download it again",
        ),
        (
            r#"{"a":"1.safetensors","b":"1.safetensors"}"#,
            "1.safetensors: tensor `b` is listed here by model.safetensors.index.json but missing",
        ),
    ];
    for (weight_map, what) in needed {
        let dir = sharded(weight_map);
        let e = verdict(dir.path()).unwrap_err().to_string();
        assert_eq!(e.replace(&format!("{}/", dir.path().display()), ""), what);
    }
    let cases = [
        ("{}", "model.safetensors.index.json: `weight_map` is empty"),
        (
            r#"{"a":"1.safetensors","a":"2.safetensors"}"#,
            "model.safetensors.index.json: damaged: `a` is listed twice at line 1 column 69",
        ),
    ];
    for (weight_map, what) in cases {
        assert_eq!(complaint(sharded(weight_map).path()), what);
    }
    let twice = sharded(r#"{"a":"1.safetensors","b":"2.safetensors"}"#);
    let a = well_formed(&[("a", "F32", &[1], &[0; 4])]);
    put(twice.path(), "2.safetensors", a);
    assert_eq!(
        complaint(twice.path()),
        "2.safetensors: holds tensor `a`, which 1.safetensors holds too"
    );
    for not_plain in [
        "../1.safetensors",
        "/etc/passwd",
        "x/1.safetensors",
        "./1.safetensors",
        "..",
        "",
        ".safetensors/",
    ] {
        let e = complaint(sharded(&format!(r#"{{"a":"{not_plain}"}}"#)).path());
        let what = format!(
            "model.safetensors.index.json: tensor `a` is said to lie in `{not_plain}`, \
             which is not the name of a .safetensors file in this folder"
        );
        assert_eq!(e, what);
    }
    for (json, what) in [
        ("", "EOF"),
        ("{}", "missing field `weight_map`"),
        ("{\"weight_map\":[]}", "invalid type"),
    ] {
        put(good.path(), "model.safetensors.index.json", json);
        let e = complaint(good.path());
        assert!(
            e.starts_with("model.safetensors.index.json: damaged: ") && e.contains(what),
            "{e}"
        );
    }
}

#[test]
fn directories_without_safetensors() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(
        complaint(dir.path()),
        "DIR: no weights here: neither model.safetensors nor model.safetensors.index.json"
    );
    assert!(
        complaint(&dir.path().join("none")).ends_with("No such file or directory (os error 2)")
    );
    put(dir.path(), "model.gguf", "");
    assert!(complaint(dir.path()).contains("GGUF weights only"));
    put(dir.path(), "pytorch_model-00001-of-00002.bin", "");
    assert!(complaint(dir.path()).contains("convert them to safetensors"));
    put(dir.path(), "model-00001-of-00002.safetensors", "");
    assert_eq!(
        complaint(dir.path()),
        "DIR: has .safetensors files but no model.safetensors.index.json; download that too"
    );
    let a_file = dir.path().join("model.gguf");
    assert!(complaint(&a_file).ends_with("a model is a directory, and this is a file"));
}

#[test]
fn links_work_as_in_the_hugging_face_cache_and_dangling_ones_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (dir.path().join("blobs"), dir.path().join("snapshots/main"));
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::create_dir_all(&snapshot).unwrap();
    put(
        &blobs,
        "0123abcd",
        well_formed(&[("a", "F32", &[1], &[0; 4])]),
    );
    symlink("../../blobs/0123abcd", snapshot.join("model.safetensors")).unwrap();
    assert!(Checkpoint::open(&snapshot).unwrap().tensor("a").is_some());
    std::fs::remove_file(blobs.join("0123abcd")).unwrap();
    assert_eq!(
        complaint(&snapshot),
        "model.safetensors: links to ../../blobs/0123abcd: No such file or directory (os error 2); download it again"
    );
}

#[test]
fn what_is_not_a_regular_file_neither_hangs_nor_opens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    assert_eq!(
        complaint(dir.path()),
        "model.safetensors: not a regular file"
    );
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert_eq!(
        complaint(dir.path()),
        "model.safetensors: not a regular file"
    );
}

#[test]
fn tensors_that_the_model_does_not_expect() {
    let dir = tempfile::tempdir().unwrap();
    let names = ["a", "b", "c", "d", "e"];
    let tensors = names.map(|n| (n, "F32", &[2usize, 1] as &[usize], &[0u8; 8] as &[u8]));
    put(dir.path(), "model.safetensors", well_formed(&tensors));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let check = |wanted: &[(&str, [usize; 2])], ignored: &str| {
        let result = checkpoint.check(wanted, &|name| !ignored.contains(name));
        result.map_err(|e| {
            e.to_string()
                .rsplit("/")
                .next()
                .unwrap()
                .split_once(": ")
                .unwrap()
                .1
                .to_owned()
        })
    };
    let all = names.map(|n| (n, [2, 1]));
    assert_eq!(check(&all, ""), Ok(()));
    assert_eq!(check(&all[1..], "a"), Ok(()));
    assert_eq!(
        check(&[all[0], ("f", [1, 1]), ("g", [1, 1])], "").unwrap_err(),
        "missing 2 tensors: `f`, `g`; does config.json belong to these weights?"
    );
    assert_eq!(
        check(&["v", "w", "x", "y", "z"].map(|n| (n, [1, 1])), "").unwrap_err(),
        "missing 5 tensors: `v`, `w`, `x` and 2 more; does config.json belong to these weights?"
    );
    assert_eq!(
        check(&[("a", [2, 3])], "").unwrap_err(),
        "tensor `a` has shape [2, 1], config.json asks for [2, 3]"
    );
    assert_eq!(
        check(&[("a", [3, 1])], "").unwrap_err(),
        "tensor `a` has shape [2, 1], config.json asks for [3]"
    );
    assert_eq!(
        check(&all[..4], "x").unwrap_err(),
        "1 tensor (`e`): part of a model, and not read by the one that config.json describes; do they belong together?"
    );
    assert_eq!(
        check(&all[..1], "x").unwrap_err(),
        "4 tensors (`b`, `c`, `d` and 1 more): part of a model, and not read by the one that config.json describes; do they belong together?"
    );
}
