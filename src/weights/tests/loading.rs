//! Loading: cuts and types against a naive reference, random weights over every sharding, and failures on the way.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// A tensor of random bits, and its values as a naive reader of the format would see them.
#[derive(Debug, Clone)]
struct Tensor {
    dtype: Dtype,
    shape: [usize; 2],
    bytes: Vec<u8>,
}

impl Tensor {
    /// Bytes of the element at (row, col) as `dtype`; by value, with the `half` crate.
    fn element(&self, row: usize, col: usize, dtype: Dtype) -> Vec<u8> {
        let size = self.dtype.size();
        let at = (row * self.shape[1] + col) * size;
        let raw = &self.bytes[at..at + size];
        match (self.dtype, dtype) {
            (a, b) if a == b => raw.to_vec(),
            (Dtype::Bf16, _) => half::bf16::from_le_bytes([raw[0], raw[1]])
                .to_f32()
                .to_le_bytes()
                .to_vec(),
            (_, _) => half::f16::from_le_bytes([raw[0], raw[1]])
                .to_f32()
                .to_le_bytes()
                .to_vec(),
        }
    }
}

fn stored_name(dtype: Dtype) -> String {
    dtype.to_string().to_uppercase()
}

fn dtype() -> impl Strategy<Value = Dtype> {
    prop_oneof![Just(Dtype::Bf16), Just(Dtype::F16), Just(Dtype::F32)]
}

/// Finite values of the type: a NaN may change its bits on the reference's way, and weights have none.
fn tensor(max: usize) -> impl Strategy<Value = Tensor> {
    (dtype(), 1..=max, 1..=max, any::<u64>()).prop_map(|(dtype, rows, cols, seed)| {
        let mut bytes = vec![0; rows * cols * dtype.size()];
        random::Random::new(seed, "x").fill(0, dtype, &mut bytes);
        Tensor {
            dtype,
            shape: [rows, cols],
            bytes,
        }
    })
}

/// A checkpoint of `tensors`, named by their index, and a matrix of one random rectangle of each.
fn case() -> impl Strategy<Value = (Vec<Tensor>, LocalMatrix)> {
    (
        prop::collection::vec(tensor(40), 1..5),
        any::<bool>(),
        any::<[u16; 16]>(),
    )
        .prop_map(|(tensors, wide, r)| {
            let narrowest = tensors.iter().map(|t| t.shape[1]).min().unwrap();
            let width = 1 + usize::from(r[15]) % narrowest;
            let dtype = tensors.iter().map(|t| t.dtype).reduce(Dtype::join).unwrap();
            let mut m = LocalMatrix {
                name: "m".to_owned(),
                rows: 0,
                cols: width,
                dtype: if wide { Dtype::F32 } else { dtype },
                parts: Vec::new(),
            };
            for (i, t) in tensors.iter().enumerate() {
                let first = usize::from(r[3 * i]) % t.shape[0];
                let rows = first..first + usize::from(r[3 * i + 1]) % (t.shape[0] - first + 1);
                let col = usize::from(r[3 * i + 2]) % (t.shape[1] - width + 1);
                let n = rows.len();
                m.parts.push(Part {
                    tensor: i.to_string(),
                    shape: t.shape,
                    rows,
                    cols: col..col + width,
                    dst_row: m.rows,
                });
                m.rows += n;
            }
            m.parts.reverse(); // The order in which parts are listed must not matter.
            (tensors, m)
        })
}

fn checkpoint_of(tensors: &[Tensor]) -> (tempfile::TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    let named: Vec<_> = tensors
        .iter()
        .enumerate()
        .map(|(i, t)| (i.to_string(), stored_name(t.dtype), t))
        .collect();
    let list: Vec<(&str, &str, &[usize], &[u8])> = named
        .iter()
        .map(|(name, dtype, t)| (name.as_str(), dtype.as_str(), &t.shape[..], &t.bytes[..]))
        .collect();
    put(dir.path(), "model.safetensors", well_formed(&list));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

fn naive(tensors: &[Tensor], m: &LocalMatrix) -> Vec<u8> {
    let mut out = vec![0; m.bytes()];
    for p in &m.parts {
        let t = &tensors[p.tensor.parse::<usize>().unwrap()];
        for (i, row) in p.rows.clone().enumerate() {
            for (j, col) in p.cols.clone().enumerate() {
                let at = ((p.dst_row + i) * m.cols + j) * m.dtype.size();
                let element = t.element(row, col, m.dtype);
                out[at..at + element.len()].copy_from_slice(&element);
            }
        }
    }
    out
}

proptest! {
    #[test]
    fn any_rectangles_of_any_types_land_where_a_naive_reader_puts_them((tensors, m) in case(), threads in 0usize..4) {
        let (_dir, checkpoint) = checkpoint_of(&tensors);
        let mut dest = vec![0xaa; m.bytes()];
        let seen = AtomicU64::new(0);
        let count = |n| { seen.fetch_add(n, Ordering::Relaxed); };
        let source = Source::Checkpoint(&checkpoint);
        let stats = load(source, std::slice::from_ref(&m), &mut [&mut dest], threads, &count).unwrap();
        prop_assert_eq!(&dest, &naive(&tensors, &m));
        prop_assert_eq!(stats.bytes_placed, m.bytes() as u64);
        prop_assert_eq!(seen.into_inner(), stats.bytes_placed);
    }

    #[test]
    fn random_weights_are_one_tensor_however_they_are_cut(
        [rows, cols] in prop::array::uniform2(1usize..60), seed in any::<u64>(), dtype in dtype(), size in 1usize..=5,
    ) {
        let source = Source::Random { seed };
        let all = load_one(source, &whole("t.weight", [rows, cols], dtype)).unwrap();
        let (mut by_rows, mut by_cols) = (Vec::new(), vec![Vec::new(); rows]);
        for rank in 0..size {
            let share = |n: usize| n * rank / size..n * (rank + 1) / size;
            by_rows.extend(load_one(source, &cut([rows, cols], share(rows), 0..cols, dtype)).unwrap());
            let m = cut([rows, cols], 0..rows, share(cols), dtype);
            let part = load_one(source, &m).unwrap();
            for (i, row) in by_cols.iter_mut().enumerate() {
                let n = m.cols * dtype.size();
                row.extend_from_slice(&part[i * n..][..n]);
            }
        }
        prop_assert_eq!(&by_rows, &all);
        prop_assert_eq!(by_cols.concat(), all);
    }
}

fn cut(shape: [usize; 2], rows: Range<usize>, cols: Range<usize>, dtype: Dtype) -> LocalMatrix {
    let mut m = whole("t.weight", shape, dtype);
    (m.rows, m.cols) = (rows.len(), cols.len());
    (m.parts[0].rows, m.parts[0].cols) = (rows, cols);
    m
}

/// More than one piece a part, rows that are read one by one, and a row that is longer than a piece.
#[test]
fn tensors_of_several_pieces_and_long_rows() {
    let big = |dtype: Dtype, shape: [usize; 2]| {
        let mut bytes = vec![0; shape[0] * shape[1] * dtype.size()];
        random::Random::new(1, "big").fill(0, dtype, &mut bytes);
        Tensor {
            dtype,
            shape,
            bytes,
        }
    };
    let tensors = [
        big(Dtype::Bf16, [600, 5555]),
        big(Dtype::F16, [3, pieces::PIECE / 2 + 77]),
    ];
    let (_dir, checkpoint) = checkpoint_of(&tensors);
    for (i, t) in tensors.iter().enumerate() {
        let [rows, cols] = t.shape;
        for (rows, cols) in [
            (0..rows, 0..cols),
            (1..rows, 7..cols),
            (1..rows - 1, 1..cols / 3),
        ] {
            for dtype in [t.dtype, Dtype::F32] {
                let mut m = cut(t.shape, rows.clone(), cols.clone(), dtype);
                m.parts[0].tensor = i.to_string();
                let mut dest = vec![0; m.bytes()];
                let mut expected = Vec::with_capacity(m.bytes());
                for row in rows.clone() {
                    for col in cols.clone() {
                        expected.extend(t.element(row, col, dtype));
                    }
                }
                load_into(Source::Checkpoint(&checkpoint), &m, &mut dest).unwrap();
                assert!(
                    dest == expected,
                    "tensor {i}, rows {rows:?}, columns {cols:?}, {dtype}"
                );
            }
        }
    }
}

#[test]
fn a_nan_keeps_its_bits_when_bf16_is_widened() {
    let signalling = 0x7f81u16;
    let t = Tensor {
        dtype: Dtype::Bf16,
        shape: [1, 1],
        bytes: signalling.to_le_bytes().to_vec(),
    };
    let (_dir, checkpoint) = checkpoint_of(&[t]);
    let bytes = load_one(
        Source::Checkpoint(&checkpoint),
        &whole("0", [1, 1], Dtype::F32),
    )
    .unwrap();
    assert_eq!(bytes, 0x7f81_0000u32.to_le_bytes());
}

#[test]
fn what_a_matrix_cannot_hold_is_refused() {
    let t = |dtype| Tensor {
        dtype,
        shape: [2, 1],
        bytes: vec![0; 2 * dtype.size()],
    };
    let (_dir, c) = checkpoint_of(&[t(Dtype::F32), t(Dtype::F16), t(Dtype::Bf16)]);
    let refused = |m: &LocalMatrix| {
        let e = load_one(Source::Checkpoint(&c), m).unwrap_err().to_string();
        e.split_once("safetensors: ")
            .map_or(e.clone(), |x| x.1.to_owned())
    };
    assert_eq!(
        refused(&whole("0", [2, 1], Dtype::Bf16)),
        "tensor `0` is f32, which bf16 (`0`) cannot hold exactly"
    );
    assert_eq!(
        refused(&whole("1", [2, 1], Dtype::Bf16)),
        "tensor `1` is f16, which bf16 (`1`) cannot hold exactly"
    );
    assert_eq!(
        refused(&whole("2", [2, 1], Dtype::F16)),
        "tensor `2` is bf16, which f16 (`2`) cannot hold exactly"
    );
    assert_eq!(
        refused(&whole("0", [1, 2], Dtype::F32)),
        "tensor `0` has shape [2, 1], the plan asks for [1, 2]"
    );
    assert!(refused(&whole("9", [1, 1], Dtype::F32)).ends_with("tensor `9` is missing"));
}

/// The plan's promises, broken one by one.
#[test]
fn parts_that_do_not_make_their_matrix_are_an_error() {
    let source = Source::Random { seed: 0 };
    let good = {
        let mut m = cut([8, 6], 0..4, 1..5, Dtype::F32);
        let mut second = m.parts[0].clone();
        (second.rows, second.dst_row) = (5..8, 4);
        m.parts.push(second);
        m.rows = 7;
        m
    };
    load_one(source, &good).unwrap();
    let broken = |change: &dyn Fn(&mut LocalMatrix), what: &str| {
        let mut m = good.clone();
        change(&mut m);
        let mut dest = vec![0; good.bytes()];
        let e = load_into(source, &m, &mut dest).unwrap_err().to_string();
        assert_eq!(e, format!("internal error: matrix `t.weight`: {what}"));
    };
    broken(
        &|m| m.rows = 8,
        "8 x 4 f32 does not fit a place of 112 bytes",
    );
    broken(
        &|m| m.rows = usize::MAX,
        &format!("{} x 4 f32 does not fit a place of 112 bytes", usize::MAX),
    );
    broken(
        &|m| m.parts[1].rows = 5..9,
        "rows 5..9, columns 1..5 are not inside `t.weight` 8 x 6",
    );
    broken(
        &|m| m.parts[0].cols = 3..7,
        "rows 0..4, columns 3..7 are not inside `t.weight` 8 x 6",
    );
    broken(
        &|m| m.parts[0].shape = [usize::MAX, 6],
        &format!(
            "rows 0..4, columns 1..5 are not inside `t.weight` {} x 6",
            usize::MAX
        ),
    );
    #[allow(clippy::reversed_empty_ranges)]
    broken(
        &|m| m.parts[0].rows = 4..0,
        "rows 4..0, columns 1..5 are not inside `t.weight` 8 x 6",
    );
    broken(
        &|m| m.parts[0].cols = 0..6,
        "`t.weight` gives 6 columns of 4",
    );
    broken(
        &|m| m.parts[1].dst_row = 5,
        "`t.weight` begins at row 5, the part before it ends at 4",
    );
    broken(
        &|m| m.parts[1].dst_row = 3,
        "`t.weight` begins at row 3, the part before it ends at 4",
    );
    broken(&|m| m.parts[1].rows = 5..7, "its parts cover 6 of 7 rows");
    broken(&|m| m.parts.clear(), "its parts cover 0 of 7 rows");
    let e = load(source, std::slice::from_ref(&good), &mut [], 1, &|_| ())
        .unwrap_err()
        .to_string();
    assert_eq!(e, "internal error: 1 matrices for 0 places");
}

#[test]
fn files_that_change_after_the_headers_were_read() {
    let t = Tensor {
        dtype: Dtype::F32,
        shape: [4, 4],
        bytes: vec![0; 64],
    };
    let m = whole("0", [4, 4], Dtype::F32);
    let (dir, checkpoint) = checkpoint_of(std::slice::from_ref(&t));
    let path = dir.path().join("model.safetensors");
    let len = path.metadata().unwrap().len();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(len - 10).unwrap();
    let e = load_one(Source::Checkpoint(&checkpoint), &m)
        .unwrap_err()
        .to_string();
    let short = len - 10;
    let what = format!("changed since it was opened ({len} bytes then, {short} now); start again");
    assert_eq!(e, format!("{}: {what}", path.display()));
    // A replaced file is another file: the open one still has its data.
    let (dir, checkpoint) = checkpoint_of(&[t]);
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    put(dir.path(), "model.safetensors", "something else");
    assert_eq!(
        load_one(Source::Checkpoint(&checkpoint), &m).unwrap(),
        [0; 64]
    );
}

/// The file shrinks after the load has begun: from the first call of `progress`.
#[test]
fn a_file_that_shrinks_while_it_is_read_names_tensor_and_offset() {
    let big = Tensor {
        dtype: Dtype::F32,
        shape: [5, 1 << 20],
        bytes: vec![0; 20 << 20],
    };
    let (dir, checkpoint) = checkpoint_of(&[big]);
    let path = dir.path().join("model.safetensors");
    let offset = checkpoint.tensor("0").unwrap().offset;
    let shrink = |_| {
        std::fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(offset)
            .unwrap()
    };
    let m = whole("0", [5, 1 << 20], Dtype::F32);
    let mut dest = vec![0; m.bytes()];
    let e = load(
        Source::Checkpoint(&checkpoint),
        &[m],
        &mut [&mut dest],
        1,
        &shrink,
    )
    .unwrap_err()
    .to_string();
    let at = offset + (4 << 20);
    let what = format!(
        "tensor `0`: cannot read 4194304 bytes at offset {at}: the file ends before; it changed since it was opened"
    );
    assert_eq!(e, format!("{}: {what}", path.display()));
}

#[test]
fn many_matrices_in_an_arena() {
    let source = Source::Random { seed: 3 };
    let matrices: Vec<_> = (1..20)
        .map(|i| whole(&format!("{i}.weight"), [i, 2 * i + 1], Dtype::Bf16))
        .collect();
    let mut arena = Arena::new(Arena::bytes_for(matrices.iter().map(LocalMatrix::bytes))).unwrap();
    let mut slabs: Vec<_> = matrices
        .iter()
        .map(|m| arena.take(m.bytes()).unwrap())
        .collect();
    let mut dest: Vec<&mut [u8]> = slabs.iter_mut().map(|s| &mut **s).collect();
    let stats = load(source, &matrices, &mut dest, 3, &|_| ()).unwrap();
    assert_eq!(
        (stats.bytes_read, stats.bytes_placed),
        (0, matrices.iter().map(|m| m.bytes() as u64).sum())
    );
    let by_name: BTreeMap<_, _> = matrices.iter().map(|m| &m.name).zip(&slabs).collect();
    for m in &matrices {
        assert_eq!(by_name[&m.name][..], load_one(source, m).unwrap());
    }
}
