//! A checkpoint directory: which tensors there are, where they lie, and whether they are the ones that a model needs.

use super::Dtype;
use super::header::{self, PREFIX};
use super::index::{nothing_to_open, read_index};
use super::text::{dims, first_few, quote};
use crate::{Error, Result, files};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, Metadata};
use std::io::ErrorKind;
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
const ADAPTER: &str = "adapter_config.json";

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
    pub(super) tensors: BTreeMap<String, TensorInfo>,
    /// Tensors that the index lists and no file has: the file that it names, and what is wrong with that one, if anything.
    absent: BTreeMap<String, (String, Option<Error>)>,
    /// Of names, sizes and headers.
    pub(super) fingerprint: u64,
}

impl Checkpoint {
    /// Opens `model.safetensors` in `dir`, or every file that `model.safetensors.index.json` names.
    ///
    /// An index need not be exact: tensors are where the files have them, and one that no file has may not be needed.
    ///
    /// # Errors
    /// A truncated or damaged file, a tensor in two files, or no safetensors at all.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let about = dir.metadata().map_err(|e| Error::file(dir, e))?;
        if !about.is_dir() {
            return Err(Error::file(
                dir,
                "a model is a directory, and this is a file",
            ));
        }
        // transformers applies it: the answers would be those of another model.
        let adapter = dir.join(ADAPTER);
        if files::is_there(&adapter) {
            return Err(Error::file(
                adapter,
                "an adapter (LoRA) lies beside the model and would not be applied: merge it into the model, or move it away",
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

    /// Opens `files` (sorted) and merges their tensors.
    fn read(
        dir: &Path,
        files: &[String],
        index: Option<&BTreeMap<String, String>>,
    ) -> Result<Self> {
        let mut all = Checkpoint {
            dir: dir.to_owned(),
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            absent: BTreeMap::new(),
            fingerprint: FNV_OFFSET,
        };
        let mut missing = BTreeMap::new();
        for name in files {
            let path = dir.join(name);
            match path.metadata() {
                // What was to be in it may not be needed.
                Err(e) if e.kind() == ErrorKind::NotFound && index.is_some() => {
                    let why = files::open_regular(&path).err();
                    missing.insert(name, why);
                }
                _ => all.add_file(name)?,
            }
        }
        for (tensor, file) in index.into_iter().flatten() {
            if !all.tensors.contains_key(tensor) {
                let why = missing.get(file).cloned().flatten();
                all.absent.insert(tensor.clone(), (file.clone(), why));
            }
        }
        Ok(all)
    }

    fn add_file(&mut self, name: &str) -> Result<()> {
        let path = self.dir.join(name);
        let (file, about) = files::open_regular(&path)?;
        let (header, entries) =
            read_header(&file, about.len()).map_err(|e| Error::file(&path, e))?;
        for part in [name.as_bytes(), &about.len().to_le_bytes(), &header] {
            self.fingerprint = fnv1a(self.fingerprint, part);
        }
        for (tensor, entry) in entries {
            if let Some(first) = self.tensors.get(&tensor) {
                let (first, tensor) = (self.path_of(first).file_name(), quote(&tensor));
                let first = first.unwrap_or_default().to_string_lossy();
                return Err(Error::file(
                    &path,
                    format_args!("holds tensor {tensor}, which {first} holds too"),
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

    /// The tensor, or an error that names it.
    pub(super) fn require(&self, name: &str) -> Result<&TensorInfo> {
        self.tensor(name)
            .ok_or_else(|| match self.absent.get(name) {
                Some((_, Some(why))) => why.clone(),
                Some((file, None)) => Error::file(
                    self.dir.join(file),
                    format_args!(
                        "tensor {} is listed here by {INDEX} but missing",
                        quote(name)
                    ),
                ),
                None => Error::file(&self.dir, format_args!("tensor {} is missing", quote(name))),
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
    /// nobody wanted, where `part_of_model` says that they are no mere addition.
    pub fn check(
        &self,
        wanted: &[(&str, [usize; 2])],
        part_of_model: &dyn Fn(&str) -> bool,
    ) -> Result<()> {
        self.check_presence(wanted)?;
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
        match self.unwanted(wanted, part_of_model) {
            None => Ok(()),
            Some(names) => Err(Error::file(
                &self.dir,
                format_args!(
                    "{names}: part of a model, and not read by the one that config.json describes; do they belong together?"
                ),
            )),
        }
    }

    fn check_presence(&self, wanted: &[(&str, [usize; 2])]) -> Result<()> {
        let missing: BTreeSet<_> = wanted
            .iter()
            .map(|w| w.0)
            .filter(|name| self.tensor(name).is_none())
            .collect();
        if let Some(listed) = missing.iter().find(|name| self.absent.contains_key(**name)) {
            self.require(listed)?;
        }
        if missing.is_empty() {
            return Ok(());
        }
        let (n, names) = (missing.len(), first_few(missing.into_iter()));
        Err(Error::file(
            &self.dir,
            format_args!(
                "missing {}: {names}; does config.json belong to these weights?",
                tensors(n)
            ),
        ))
    }

    /// How many tensors nobody wanted that `counts` counts, and their first names; none where there are none. Those of a
    /// file that is not there count too.
    pub fn unwanted(
        &self,
        wanted: &[(&str, [usize; 2])],
        counts: &dyn Fn(&str) -> bool,
    ) -> Option<String> {
        let used: BTreeSet<_> = wanted.iter().map(|w| w.0).collect();
        let lost = self.absent.iter().filter(|(_, (_, why))| why.is_some());
        let extra: Vec<_> = self
            .names()
            .chain(lost.map(|(name, _)| name.as_str()))
            .filter(|n| !used.contains(n) && counts(n))
            .collect();
        let n = extra.len();
        (n > 0).then(|| format!("{} ({})", tensors(n), first_few(extra.into_iter())))
    }

    /// Whether the index lists a tensor that is in none of the files because its file is not there.
    pub fn is_listed(&self, name: &str) -> bool {
        self.absent.get(name).is_some_and(|(_, why)| why.is_some())
    }

    /// Gives a tensor another name, which none has.
    pub fn rename(&mut self, from: &str, to: &str) {
        if let Some(tensor) = self.tensors.remove(from) {
            self.tensors.insert(to.to_owned(), tensor);
        }
    }

    /// Gives names that begin with one of `starts` a prefix, where that name is free: a part was saved by itself.
    pub fn add_prefix(&mut self, prefix: &str, starts: &[&str]) {
        let of_part = |name: &&String| starts.iter().any(|s| name.starts_with(s));
        let names: Vec<String> = self.tensors.keys().filter(of_part).cloned().collect();
        for name in names {
            let whole = format!("{prefix}{name}");
            if !self.tensors.contains_key(&whole) {
                self.rename(&name, &whole);
            }
        }
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

/// Start value of [`fnv1a`].
pub(super) const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a (Fowler, Noll, Vo; RFC 9923): the same on every machine and in every build, unlike the standard library's.
pub(super) fn fnv1a(start: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(start, |h, &b| {
        (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
