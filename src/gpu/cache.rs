//! Compiled kernels on disk, shared by ranks, nodes and runs.
//!
//! An entry is written under a temporary name and renamed, so that a reader sees all of it or none, also on a shared file
//! system and from many ranks at once. It carries its own length and checksum: a damaged entry counts as absent.

use crate::{Error, Result};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const MAGIC: &[u8; 8] = b"tandemK1";

/// FNV-1a (Fowler, Noll, Vo), 64 bits: a key for file names and a checksum against damage, not against malice.
pub fn fnv1a(parts: &[&[u8]]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for part in parts {
        // The length keeps ("ab", "c") and ("a", "bc") apart.
        for &byte in (part.len() as u64).to_le_bytes().iter().chain(*part) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    hash
}

/// A folder of compiled kernels.
#[derive(Debug, Clone)]
pub struct Cache {
    dir: PathBuf,
}

impl Cache {
    /// The user's cache: `XDG_CACHE_HOME/tandem`, else `HOME/.cache/tandem`; `None` where neither is set.
    pub fn of_user() -> Option<Cache> {
        let folder = |name: &str| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|p| p.is_absolute())
        };
        let base = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))?;
        Some(Cache::at(base.join("tandem")))
    }

    /// A cache in `dir`, which is made when it is first written to.
    pub fn at(dir: impl Into<PathBuf>) -> Cache {
        Cache { dir: dir.into() }
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file of an entry.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// An entry's contents, if it is there and whole.
    pub fn get(&self, name: &str) -> Option<Vec<u8>> {
        let bytes = fs::read(self.path(name)).ok()?;
        let (head, body) = bytes.split_at_checked(24)?;
        let whole = head == header(body);
        if !whole {
            tracing::warn!("{}: damaged, made anew", self.path(name).display());
        }
        whole.then(|| body.to_vec())
    }

    /// Stores an entry with its checksum.
    ///
    /// # Errors
    /// The folder cannot be made or written to.
    pub fn put(&self, name: &str, body: &[u8]) -> Result<()> {
        self.write(name, &[&header(body), body])
    }

    /// Stores a file as it is.
    ///
    /// # Errors
    /// The folder cannot be made or written to.
    pub fn write(&self, name: &str, parts: &[&[u8]]) -> Result<()> {
        let temporary = self.temporary(name)?;
        let written = fs::File::create(&temporary)
            .and_then(|mut f| {
                parts
                    .iter()
                    .try_for_each(|p| f.write_all(p))
                    .and_then(|()| f.sync_all())
            })
            .and_then(|()| fs::rename(&temporary, self.path(name)));
        written.map_err(|e| {
            // What is left of a failed write is of no use to anybody.
            let _ = fs::remove_file(&temporary);
            Error::file(self.path(name), e)
        })
    }

    /// A name in the folder that no other writer uses; the folder exists afterwards.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn temporary(&self, name: &str) -> Result<PathBuf> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        fs::create_dir_all(&self.dir).map_err(|e| Error::file(&self.dir, e))?;
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        Ok(self.dir.join(format!(
            ".{name}.{}.{}.{n}",
            host.trim(),
            std::process::id()
        )))
    }
}

fn header(body: &[u8]) -> Vec<u8> {
    let mut head = MAGIC.to_vec();
    head.extend((body.len() as u64).to_le_bytes());
    head.extend(fnv1a(&[body]).to_le_bytes());
    head
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fnv1a_matches_published_values() {
        // The published test vectors hash the bytes alone; ours come behind an eight-byte length.
        let plain = |bytes: &[u8]| {
            bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, &b| {
                (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3)
            })
        };
        assert_eq!(plain(b"foobar"), 0x85944171f73967e8);
        assert_eq!(fnv1a(&[b"foobar"]), plain(b"\x06\0\0\0\0\0\0\0foobar"));
        assert_ne!(fnv1a(&[b"ab", b"c"]), fnv1a(&[b"a", b"bc"]));
    }

    #[test]
    fn damage_at_any_byte_counts_as_absent() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("sub"));
        assert_eq!(cache.get("k"), None);
        cache.put("k", b"cubin").unwrap();
        assert_eq!(cache.get("k").as_deref(), Some(&b"cubin"[..]));
        let whole = fs::read(cache.path("k")).unwrap();
        for i in 0..whole.len() {
            let mut bad = whole.clone();
            bad[i] ^= 1;
            fs::write(cache.path("k"), &bad).unwrap();
            assert_eq!(cache.get("k"), None, "byte {i} flipped");
            fs::write(cache.path("k"), &whole[..i]).unwrap();
            assert_eq!(cache.get("k"), None, "cut to {i} bytes");
        }
        assert_eq!(
            fs::read_dir(cache.dir()).unwrap().count(),
            1,
            "no temporary file stays"
        );
    }

    #[test]
    fn many_writers_at_once_leave_one_whole_entry() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        std::thread::scope(|s| {
            for i in 0..8u8 {
                let cache = &cache;
                s.spawn(move || {
                    for _ in 0..20 {
                        cache.put("k", &vec![i; 4000]).unwrap();
                        let seen = cache.get("k").unwrap();
                        assert!(seen.len() == 4000 && seen.iter().all(|b| *b == seen[0]));
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_unwritable_folder_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let e = Cache::at(dir.path().join("file/below"))
            .put("k", b"x")
            .unwrap_err();
        assert!(e.to_string().contains("file/below"), "{e}");
    }
}
