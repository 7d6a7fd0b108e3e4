//! What ranks on several machines know each other by, where no user id can be looked up.
//!
//! It is never sent. Each side shows that it has it by an HMAC over what both have said and over the two ends of
//! the connection, so that a proof serves nowhere else.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// The user's own secret, the same on every rank.
pub(super) const VARIABLE: &str = "TANDEM_SECRET";
/// Shorter ones can be guessed by whoever has seen a proof.
const SHORTEST: usize = 16;
/// Longest file that is looked at.
const LONGEST_FILE: u64 = 4096;

/// Bytes of a key and of a proof.
pub(super) const SIZE: usize = 32;
pub(super) type Proof = [u8; SIZE];

/// A key that the ranks of a run share and nobody else has, or why there is none.
#[derive(Clone)]
pub struct Secret {
    key: Result<[u8; SIZE], String>,
}

/// The key itself is not for logs.
impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.key {
            Ok(_) => f.write_str("Secret"),
            Err(why) => write!(f, "no secret ({why})"),
        }
    }
}

impl Secret {
    /// None, and why.
    pub fn none(why: impl Into<String>) -> Self {
        Secret {
            key: Err(why.into()),
        }
    }

    pub(super) fn of_key(key: [u8; SIZE]) -> Self {
        Secret { key: Ok(key) }
    }

    /// A new one.
    pub(super) fn random() -> Result<Self> {
        Ok(Secret::of_key(random()?))
    }

    /// What `TANDEM_SECRET` says, or else the file in the user's home, which is made where it is not there yet.
    ///
    /// A file that cannot be had or that others may know is no error: on one machine nobody needs it.
    ///
    /// # Errors
    /// A `TANDEM_SECRET` that is too short.
    pub(super) fn find(env: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        if let Some(text) = env(VARIABLE) {
            return Secret::of_text(text.trim()).ok_or_else(|| {
                Error::failed(format!(
                    "{VARIABLE} has {} characters: give it {SHORTEST} or more, random ones, the same on every rank",
                    text.trim().len()
                ))
            });
        }
        let folder = |name| env(name).map(PathBuf::from).filter(|path| path.is_dir());
        let base = folder("XDG_CONFIG_HOME").or_else(|| Some(folder("HOME")?.join(".config")));
        let Some(base) = base else {
            return Ok(Secret::none("there is no home to keep one in"));
        };
        let file = base.join("tandem/secret");
        let key = of_file(&file).map_err(|e| format!("{}: {e}", file.display()));
        Ok(Secret { key })
    }

    fn of_text(text: &str) -> Option<Self> {
        let long_enough = text.len() >= SHORTEST;
        long_enough.then(|| Secret::of_key(Sha256::digest(text).into()))
    }

    /// Why there is none, if there is none.
    pub(super) fn missing(&self) -> Option<&str> {
        self.key.as_ref().err().map(String::as_str)
    }

    /// What only a holder of this secret can say about `parts`.
    pub(super) fn proof(&self, label: &[u8], parts: &[&[u8]]) -> Option<Proof> {
        Some(self.mac(label, parts)?.finalize().into_bytes().into())
    }

    /// Whether `proof` is [`Secret::proof`] of the same; takes the same time wherever they differ.
    pub(super) fn is_proved_by(&self, proof: &Proof, label: &[u8], parts: &[&[u8]]) -> bool {
        self.mac(label, parts)
            .is_some_and(|mac| mac.verify_slice(proof).is_ok())
    }

    fn mac(&self, label: &[u8], parts: &[&[u8]]) -> Option<Hmac<Sha256>> {
        let key = self.key.as_ref().ok()?;
        let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(key).ok()?;
        for part in std::iter::once(&label).chain(parts) {
            // The lengths keep ("ab", "c") and ("a", "bc") apart.
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part);
        }
        Some(mac)
    }

    /// Numbers that follow from `name`, for those who have the secret.
    pub(super) fn numbers(&self, label: &[u8], name: u64) -> Option<[u16; SIZE / 2]> {
        let proof = self.proof(label, &[&name.to_le_bytes()])?;
        Some(std::array::from_fn(|i| {
            u16::from_le_bytes([proof[2 * i], proof[2 * i + 1]])
        }))
    }

    /// The hexadecimal digits of the key: for the environment of a process that this one starts.
    pub(super) fn to_hex(&self) -> String {
        let key = self.key.as_ref().map_or(&[][..], |key| &key[..]);
        key.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    pub(super) fn of_hex(text: &str) -> Option<Self> {
        let digits = text.len() == 2 * SIZE && text.bytes().all(|b| b.is_ascii_hexdigit());
        if !digits {
            return None;
        }
        let byte = |i: usize| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok();
        let bytes: Option<Vec<u8>> = (0..SIZE).map(byte).collect();
        Some(Secret::of_key(bytes?.try_into().ok()?))
    }
}

/// Bytes that nobody can foresee.
pub(super) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|e| Error::failed(format!("the system gives no random numbers: {e}")))?;
    Ok(bytes)
}

/// The key in `path`; ranks that come at once to where no file is all get the one that is made first.
fn of_file(path: &Path) -> io::Result<[u8; SIZE]> {
    for attempt in 0..20 {
        // A shared file system may show another node's file a moment late.
        if attempt > 1 {
            std::thread::sleep(Duration::from_millis(50));
        }
        match read(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => make(path)?,
            done => return done,
        }
    }
    read(path)
}

fn read(path: &Path) -> io::Result<[u8; SIZE]> {
    // A pipe in its place must not hold us up.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    let found = file.metadata()?;
    if !found.is_file() || found.uid() != rustix::process::geteuid().as_raw() {
        return Err(io::Error::other("not a file of this user"));
    }
    if found.mode() & 0o077 != 0 {
        return Err(io::Error::other(
            "others may read or write it: chmod 600, or remove it for a new one",
        ));
    }
    let mut text = String::new();
    file.take(LONGEST_FILE).read_to_string(&mut text)?;
    match Secret::of_text(text.trim()).map(|secret| secret.key) {
        Some(Ok(key)) => Ok(key),
        _ => Err(io::Error::other(
            "too short for a secret: remove it for a new one",
        )),
    }
}

/// Makes the file whole or not at all; one that another rank has made meanwhile stays.
fn make(path: &Path) -> io::Result<()> {
    let folder = path.parent().unwrap_or(path);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)?;
    let key: [u8; SIZE] = random().map_err(io::Error::other)?;
    let name: [u8; 8] = random().map_err(io::Error::other)?;
    let temporary = folder.join(format!(".secret.{:016x}", u64::from_le_bytes(name)));
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)?;
    let written = writeln!(file, "{}", Secret::of_key(key).to_hex()).and_then(|()| file.sync_all());
    // A link, unlike a rename, never takes the place of a file that is there.
    let linked = written.and_then(|()| fs::hard_link(&temporary, path));
    let _ = fs::remove_file(&temporary);
    match linked {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn in_home(home: &Path) -> Secret {
        let home = home.to_str().unwrap().to_owned();
        Secret::find(&move |name| (name == "HOME").then(|| home.clone())).unwrap()
    }

    #[test]
    fn ranks_that_come_at_once_make_one_file_for_all() {
        let home = tempfile::tempdir().unwrap();
        let keys: Vec<String> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| in_home(home.path()).to_hex()))
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert!(keys[0].len() == 2 * SIZE && keys.iter().all(|k| *k == keys[0]));
        let folder = home.path().join(".config/tandem");
        let names: Vec<_> = fs::read_dir(&folder).unwrap().collect();
        assert_eq!(names.len(), 1, "no temporary file stays");
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(
            (mode(&folder), mode(&folder.join("secret"))),
            (0o700, 0o600)
        );
        // A home that is not there is not made.
        let nowhere = home.path().join("nowhere");
        assert!(in_home(&nowhere).missing().is_some() && !nowhere.exists());
        // Another home, another key.
        let other = tempfile::tempdir().unwrap();
        assert_ne!(in_home(other.path()).to_hex(), keys[0]);
    }

    #[test]
    fn a_file_that_others_may_know_is_not_used() {
        let home = tempfile::tempdir().unwrap();
        assert!(in_home(home.path()).missing().is_none());
        let file = home.path().join(".config/tandem/secret");
        for mode in [0o640, 0o604, 0o620] {
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
            let why = in_home(home.path())
                .missing()
                .unwrap_or_default()
                .to_owned();
            assert!(why.contains("others may read"), "{why}");
        }
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&file, "short\n").unwrap();
        let why = in_home(home.path())
            .missing()
            .unwrap_or_default()
            .to_owned();
        assert!(why.contains("too short"), "{why}");
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &file).unwrap();
        assert!(in_home(home.path()).missing().is_some());
        assert_eq!(
            Secret::find(&|_| None).unwrap().missing(),
            Some("there is no home to keep one in")
        );
    }

    #[test]
    fn the_variable_comes_first_and_must_be_long() {
        let find =
            |text: &'static str| Secret::find(&move |name| (name == VARIABLE).then(|| text.into()));
        let error = find("guess me").unwrap_err().to_string();
        assert!(
            error.starts_with("TANDEM_SECRET has 8 characters"),
            "{error}"
        );
        let (a, b) = (
            find("sixteen or more!").unwrap(),
            find("sixteen or more?").unwrap(),
        );
        let proof = a.proof(b"x", &[b"y"]).unwrap();
        assert!(a.is_proved_by(&proof, b"x", &[b"y"]));
        assert!(!b.is_proved_by(&proof, b"x", &[b"y"]));
        assert!(!a.is_proved_by(&proof, b"xy", &[b""]));
        assert!(!Secret::none("").is_proved_by(&proof, b"x", &[b"y"]));
        assert_eq!(format!("{a:?}"), "Secret");
    }

    #[test]
    fn proofs_are_hmac_sha256() {
        // RFC 4231, test case 1, under our framing: label and parts, each behind its length.
        let secret = Secret::of_key([0x0b; SIZE]);
        let mut plain = <Hmac<Sha256> as KeyInit>::new_from_slice(&[0x0b; SIZE]).unwrap();
        plain.update(b"\x08\0\0\0\0\0\0\0Hi There");
        let expected: Proof = plain.finalize().into_bytes().into();
        assert_eq!(secret.proof(b"Hi There", &[]), Some(expected));
        assert_eq!(
            Secret::of_hex(&secret.to_hex()).unwrap().to_hex(),
            secret.to_hex()
        );
        assert!(Secret::of_hex("0b").is_none() && Secret::of_hex(&"é".repeat(32)).is_none());
    }
}
