//! A checkpoint directory: which tensors there are, where they lie, and whether they are the ones that a model needs.

use super::Dtype;
use super::header::{self, PREFIX};
use super::text::{UniqueMap, clip, dims, first_few, quote};
use crate::{Error, Result, files};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// One tensor of a checkpoint; its range is checked against the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type as written in the file, e.g. `BF16`.
    pub stored_dtype: safetensors::Dtype,
    /// Sizes of the dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Which of the checkpoint's files holds it.
    pub(super) file: usize,
    /// Byte offset of its first element in the file.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

impl TensorInfo {
    /// The element type, when it is one that tandem computes with.
    pub fn dtype(&self) -> Option<Dtype> {
        header::weight_dtype(self.stored_dtype)
    }

    /// The shape as `[rows, cols]`: a vector of `n` counts as `[n, 1]`; `None` beyond two dimensions.
    pub fn matrix_shape(&self) -> Option<[usize; 2]> {
        match self.shape[..] {
            [] => Some([1, 1]),
            [n] => Some([n, 1]),
            [rows, cols] => Some([rows, cols]),
            _ => None,
        }
    }
}

/// An open safetensors file, and what identifies its content.
#[derive(Debug)]
pub(super) struct Shard {
    /// Its place among the checkpoint's files.
    pub number: usize,
    pub path: PathBuf,
    pub file: File,
    stamp: Stamp,
}

/// Changes when somebody writes to the file.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    len: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(m: &Metadata) -> Self {
        Stamp {
            len: m.len(),
            modified: (m.mtime(), m.mtime_nsec()),
        }
    }
}

impl Shard {
    /// Says that bytes `at..at + len` are about to be read, in whatever pieces.
    pub fn will_need(&self, at: u64, len: usize) {
        let len = NonZeroU64::new(len as u64);
        // Where the hint means nothing, the reads are as they were.
        _ = rustix::fs::fadvise(&self.file, at, len, rustix::fs::Advice::WillNeed);
    }

    /// An error when the file is no longer the one whose header was read.
    pub fn check_unchanged(&self) -> Result<()> {
        let now = self
            .file
            .metadata()
            .map_err(|e| Error::file(&self.path, e))?;
        if Stamp::of(&now) == self.stamp {
            return Ok(());
        }
        Err(Error::file(
            &self.path,
            format_args!(
                "changed since it was opened ({} bytes then, {} now); start again",
                self.stamp.len,
                now.len()
            ),
        ))
    }
}

/// The tensors of a checkpoint directory. Only headers have been read; the data stays in the files, which are held open.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, TensorInfo>,
    fingerprint: u64,
}

impl Checkpoint {
    /// Opens `model.safetensors` in `dir`, or every file that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// A missing, truncated or damaged file, tensors that disagree with the index, or no safetensors at all.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let about = dir.metadata().map_err(|e| Error::file(dir, e))?;
        if !about.is_dir() {
            return Err(Error::file(
                dir,
                "a model is a directory, and this is a file",
            ));
        }
        if files::is_there(&dir.join(SINGLE)) {
            return Self::read(dir, &[SINGLE.to_owned()], None);
        }
        if !files::is_there(&dir.join(INDEX)) {
            return Err(nothing_to_open(dir));
        }
        let index = read_index(&dir.join(INDEX))?;
        let files: BTreeSet<String> = index.values().cloned().collect();
        Self::read(dir, &Vec::from_iter(files), Some(&index))
    }

    /// Opens `files` (sorted) and merges their tensors, which must be those of the index.
    fn read(
        dir: &Path,
        files: &[String],
        index: Option<&BTreeMap<String, String>>,
    ) -> Result<Self> {
        let mut all = Checkpoint {
            dir: dir.to_owned(),
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            fingerprint: FNV_OFFSET,
        };
        for name in files {
            all.add_file(name, index)?;
        }
        for (tensor, file) in index.into_iter().flatten() {
            if !all.tensors.contains_key(tensor) {
                return Err(Error::file(
                    dir.join(file),
                    format_args!(
                        "tensor {} is listed here by {INDEX} but missing",
                        quote(tensor)
                    ),
                ));
            }
        }
        Ok(all)
    }

    fn add_file(&mut self, name: &str, index: Option<&BTreeMap<String, String>>) -> Result<()> {
        let path = self.dir.join(name);
        let (file, about) = files::open_regular(&path)?;
        let (header, entries) =
            read_header(&file, about.len()).map_err(|e| Error::file(&path, e))?;
        for part in [name.as_bytes(), &about.len().to_le_bytes(), &header] {
            self.fingerprint = fnv1a(self.fingerprint, part);
        }
        for (tensor, entry) in entries {
            let listed = index.map(|i| i.get(&tensor).map(String::as_str));
            if let Some(elsewhere) = listed.filter(|&l| l != Some(name)) {
                let place =
                    elsewhere.map_or("not at all".to_owned(), |f| format!("in {}", quote(f)));
                return Err(Error::file(
                    &path,
                    format_args!(
                        "holds tensor {}, which {INDEX} lists {place}",
                        quote(&tensor)
                    ),
                ));
            }
            let info = TensorInfo {
                stored_dtype: entry.dtype,
                shape: entry.shape,
                file: self.shards.len(),
                offset: entry.bytes.start,
                bytes: entry.bytes.end - entry.bytes.start,
            };
            self.tensors.insert(tensor, info);
        }
        let (number, stamp) = (self.shards.len(), Stamp::of(&about));
        self.shards.push(Shard {
            number,
            path,
            file,
            stamp,
        });
        Ok(())
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The directory, as it was given.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file that holds `tensor`.
    pub fn path_of(&self, tensor: &TensorInfo) -> &Path {
        &self.shard(tensor).path
    }

    pub(super) fn shard(&self, tensor: &TensorInfo) -> &Shard {
        &self.shards[tensor.file]
    }

    pub(super) fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Bytes of all tensors together.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|t| t.bytes).sum()
    }

    /// Equal for copies of a checkpoint wherever they lie, so that ranks can compare what they opened.
    ///
    /// It covers file names, sizes and headers, not the data: two fine-tunes of one model may well share it.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// The tensor, or an error that names it.
    pub(super) fn require(&self, name: &str) -> Result<&TensorInfo> {
        self.tensor(name).ok_or_else(|| {
            Error::file(&self.dir, format_args!("tensor {} is missing", quote(name)))
        })
    }

    /// The element type of a tensor that is about to be used.
    pub(super) fn usable_dtype(&self, name: &str, tensor: &TensorInfo) -> Result<Dtype> {
        tensor.dtype().ok_or_else(|| {
            Error::file(
                self.path_of(tensor),
                format_args!(
                    "tensor {} is `{}`; tandem reads BF16, F16 and F32 (quantized checkpoints are not supported)",
                    quote(name),
                    tensor.stored_dtype
                ),
            )
        })
    }

    /// The narrowest type that holds all of `tensors` exactly.
    ///
    /// # Errors
    /// A tensor that is missing or of a type that tandem does not read; an empty list.
    pub fn dtype_of<'a>(&self, tensors: impl IntoIterator<Item = &'a str>) -> Result<Dtype> {
        let mut joined: Option<Dtype> = None;
        for name in tensors {
            let dtype = self.usable_dtype(name, self.require(name)?)?;
            joined = Some(joined.map_or(dtype, |j| j.join(dtype)));
        }
        joined.ok_or_else(|| Error::failed("no tensor to take a dtype from"))
    }

    /// Holds the checkpoint against what a model needs: names and `[rows, cols]` shapes (a vector is `[n, 1]`).
    ///
    /// # Errors
    /// Wanted tensors that are missing, of another shape or of a type that tandem does not read; and tensors that
    /// nobody wanted, unless `may_ignore` says that leaving them out changes nothing.
    pub fn check(
        &self,
        wanted: &[(&str, [usize; 2])],
        may_ignore: &dyn Fn(&str) -> bool,
    ) -> Result<()> {
        let missing: BTreeSet<_> = wanted
            .iter()
            .map(|w| w.0)
            .filter(|name| self.tensor(name).is_none())
            .collect();
        if !missing.is_empty() {
            let (n, names) = (missing.len(), first_few(missing.into_iter()));
            return Err(Error::file(
                &self.dir,
                format_args!(
                    "missing {}: {names}; does config.json belong to these weights?",
                    tensors(n)
                ),
            ));
        }
        for &(name, want) in wanted {
            let tensor = self.require(name)?;
            if tensor.matrix_shape() != Some(want) {
                return Err(Error::file(
                    self.path_of(tensor),
                    format_args!(
                        "tensor {} has shape {}, config.json asks for {}",
                        quote(name),
                        dims(&tensor.shape),
                        if want[1] == 1 {
                            dims(&want[..1])
                        } else {
                            dims(&want)
                        }
                    ),
                ));
            }
            self.usable_dtype(name, tensor)?;
        }
        let used: BTreeSet<_> = wanted.iter().map(|w| w.0).collect();
        let extra: Vec<_> = self
            .names()
            .filter(|n| !used.contains(n) && !may_ignore(n))
            .collect();
        if extra.is_empty() {
            return Ok(());
        }
        let (n, names) = (extra.len(), first_few(extra.into_iter()));
        Err(Error::file(
            &self.dir,
            format_args!(
                "{} that this architecture does not use: {names}; the result would be wrong without",
                tensors(n)
            ),
        ))
    }
}

fn tensors(n: usize) -> String {
    format!("{n} tensor{}", if n == 1 { "" } else { "s" })
}

/// The raw header and its entries.
fn read_header(file: &File, file_len: u64) -> Result<(Vec<u8>, BTreeMap<String, header::Entry>)> {
    let mut start = vec![0; file_len.min(PREFIX) as usize];
    file.read_exact_at(&mut start, 0).map_err(Error::failed)?;
    let len = header::json_len(&start, file_len)?;
    start.resize((PREFIX + len) as usize, 0);
    file.read_exact_at(&mut start[PREFIX as usize..], PREFIX)
        .map_err(Error::failed)?;
    let entries = header::parse(&start, file_len)?;
    Ok((start, entries))
}

/// `weight_map` of an index: tensor name → file name, every file name plain.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: UniqueMap<String>,
    }
    let json = files::read(path)?.unwrap_or_default();
    let index: Index = serde_json::from_slice(&json)
        .map_err(|e| Error::file(path, format_args!("damaged: {}", clip(&e.to_string()))))?;
    let map = index.weight_map.0;
    if map.is_empty() {
        return Err(Error::file(path, "`weight_map` is empty"));
    }
    for (tensor, file) in &map {
        let mut parts = Path::new(file).components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(f)), None) if f == OsStr::new(file));
        if !plain || !file.ends_with(".safetensors") {
            return Err(Error::file(
                path,
                format_args!(
                    "tensor {} is said to lie in {}, which is not the name of a .safetensors file in this folder",
                    quote(tensor),
                    quote(file)
                ),
            ));
        }
    }
    Ok(map)
}

/// Why a directory without `model.safetensors` and index cannot be loaded, and what to do about it.
fn nothing_to_open(dir: &Path) -> Error {
    let names: Vec<String> = match dir.read_dir() {
        Ok(entries) => entries
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect(),
        Err(e) => return Error::file(dir, e),
    };
    let any = |ends: &[&str]| {
        names
            .iter()
            .any(|n| ends.iter().any(|end| n.ends_with(end)))
    };
    if any(&[".safetensors"]) {
        Error::file(
            dir,
            format_args!("has .safetensors files but no {INDEX}; download that too"),
        )
    } else if any(&[".bin", ".pt", ".pth", ".bin.index.json"]) {
        Error::file(
            dir,
            "has PyTorch weights only, which can run code when read; convert them to safetensors \
             (transformers: `save_pretrained(dir, safe_serialization=True)`)",
        )
    } else if any(&[".gguf"]) {
        Error::file(
            dir,
            "has GGUF weights only; download the model's safetensors instead",
        )
    } else {
        Error::file(
            dir,
            format_args!("no weights here: neither {SINGLE} nor {INDEX}"),
        )
    }
}

/// Start value of [`fnv1a`].
pub(super) const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a (Fowler, Noll, Vo; RFC 9923): the same on every machine and in every build, unlike the standard library's.
pub(super) fn fnv1a(start: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(start, |h, &b| {
        (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
