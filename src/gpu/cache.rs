//! Compiled kernels on disk, shared by ranks, nodes and runs.
//!
//! An entry is written under a temporary name and renamed, so that a reader sees all of it or none, also on a shared file
//! system and from many ranks at once. It carries its own length and checksum: a damaged entry counts as absent.
//!
//! What is found here runs on the device. So the folder is this user's alone, and what another user owns or could have
//! written counts for nothing.

use crate::{Error, Result};
use std::fs::{self, File, Metadata};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const MAGIC: &[u8; 8] = b"tandemK1";

/// The oldest that a temporary file of a writer at work can be; older ones are what a killed one has left.
const LEFT_BEHIND: Duration = Duration::from_secs(3600);

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

    /// An entry's contents, if it is there, whole, and this user's own.
    pub fn get(&self, name: &str) -> Option<Vec<u8>> {
        let path = self.own(name)?;
        let mut bytes = Vec::new();
        // Looked at once more: what was checked by name may have become another file.
        let mut file = open(&path).ok()?;
        if !file.metadata().is_ok_and(|found| is_own(&found)) {
            return None;
        }
        file.read_to_end(&mut bytes).ok()?;
        let (head, body) = bytes.split_at_checked(24)?;
        let whole = head == header(body);
        if !whole {
            tracing::warn!("{}: damaged, made anew", path.display());
        }
        whole.then(|| body.to_vec())
    }

    /// The file of an entry, if it is there and nobody but this user could have written it.
    pub fn own(&self, name: &str) -> Option<PathBuf> {
        let path = self.path(name);
        for place in [&self.dir, &path] {
            let found = fs::symlink_metadata(place).ok()?;
            // The folder itself may be a link to where there is room.
            let found = match place == &self.dir {
                true => fs::metadata(place).ok()?,
                false => found,
            };
            if !is_own(&found) {
                tracing::debug!("{}: not used, others may have written it", place.display());
                return None;
            }
        }
        Some(path)
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
        let mut options = File::options();
        let written = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
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

    /// A name in the folder that no other writer uses; the folder exists afterwards, for this user alone.
    ///
    /// # Errors
    /// The folder cannot be made, or is another user's.
    pub fn temporary(&self, name: &str) -> Result<PathBuf> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        self.make_folder()?;
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        Ok(self.dir.join(format!(
            ".{name}.{}.{}.{n}",
            host.trim(),
            std::process::id()
        )))
    }

    fn make_folder(&self) -> Result<()> {
        let failed = |e| Error::file(&self.dir, e);
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&self.dir).map_err(failed)?;
        let found = fs::metadata(&self.dir).map_err(failed)?;
        if found.uid() != rustix::process::geteuid().as_raw() {
            return Err(Error::file(
                &self.dir,
                format_args!(
                    "belongs to user {}, and compiled kernels are kept for their owner alone: set XDG_CACHE_HOME to a folder of yours",
                    found.uid()
                ),
            ));
        }
        // Made by an earlier version, or by hand.
        if found.mode() & 0o077 != 0 {
            fs::set_permissions(&self.dir, fs::Permissions::from_mode(0o700)).map_err(failed)?;
        }
        self.remove_what_is_left_behind();
        Ok(())
    }

    /// Writers that were killed have left their temporary files.
    fn remove_what_is_left_behind(&self) {
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return;
        };
        for entry in entries.flatten() {
            let is_temporary = entry.file_name().as_encoded_bytes().starts_with(b".");
            let age = entry
                .metadata()
                .and_then(|found| found.modified())
                .map(|at| at.elapsed().unwrap_or_default());
            if is_temporary && age.is_ok_and(|age| age > LEFT_BEHIND) {
                let path = entry.path();
                tracing::debug!("{}: left behind, removed", path.display());
                let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path));
            }
        }
    }
}

/// Root's files are as good as this user's own: an administrator may have filled the folder.
fn is_own(found: &Metadata) -> bool {
    let us = rustix::process::geteuid().as_raw();
    [us, 0].contains(&found.uid()) && found.mode() & 0o022 == 0 && !found.is_symlink()
}

fn open(path: &Path) -> std::io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    File::options().read(true).custom_flags(flags).open(path)
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
    fn the_folder_is_its_owner_s_alone() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("a/b"));
        cache.put("k", b"cubin").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(mode(cache.dir()), 0o700);
        assert_eq!(mode(&cache.path("k")), 0o600);
        let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
        // What others could have written counts as absent, and is made anew.
        for open in [0o620, 0o602] {
            set(&cache.path("k"), open).unwrap();
            assert_eq!(cache.get("k"), None, "{open:o}");
        }
        cache.put("k", b"again").unwrap();
        assert_eq!(cache.get("k").as_deref(), Some(&b"again"[..]));
        set(cache.dir(), 0o777).unwrap();
        assert_eq!(cache.get("k"), None);
        cache.put("l", b"next").unwrap();
        assert_eq!(mode(cache.dir()), 0o700);
        // A link leads to what somebody else may own.
        fs::rename(cache.path("l"), dir.path().join("elsewhere")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), cache.path("l")).unwrap();
        assert_eq!(cache.get("l"), None);
    }

    #[test]
    fn another_user_s_folder_or_file_is_not_used() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("cache"));
        cache.put("k", b"cubin").unwrap();
        std::os::unix::fs::chown(cache.path("k"), Some(64_007), None).unwrap();
        assert_eq!(cache.get("k"), None);
        cache.put("k", b"cubin").unwrap();
        std::os::unix::fs::chown(cache.dir(), Some(64_007), None).unwrap();
        assert_eq!(cache.get("k"), None);
        let error = cache.put("k", b"cubin").unwrap_err().to_string();
        assert!(error.contains("belongs to user 64007"), "{error}");
    }

    #[test]
    fn what_a_killed_writer_has_left_goes_with_the_next_write() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let [old, new] = [".k.host.1.0", ".k.host.2.0"].map(|name| cache.path(name));
        fs::write(&old, "half").unwrap();
        fs::write(&new, "half").unwrap();
        let long_ago = std::time::SystemTime::now() - 2 * LEFT_BEHIND;
        File::options()
            .write(true)
            .open(&old)
            .unwrap()
            .set_modified(long_ago)
            .unwrap();
        cache.put("k", b"cubin").unwrap();
        assert!(!old.exists() && new.exists() && cache.get("k").is_some());
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
