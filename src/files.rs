//! Files of a model folder, opened as a stranger's: regular ones of a bounded size, and nothing that blocks or never ends.

use crate::{Error, Result};
use std::fs::{File, Metadata, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Bytes that are more than any tokenizer or index has; a wrong path or a hostile folder must not fill the memory.
pub(crate) const LARGE: u64 = 256 << 20;

/// Bytes that are more than any configuration or template has; in memory, JSON may take twenty times its size.
pub(crate) const SMALL: u64 = 16 << 20;

/// Opens a regular file, through symbolic links (the Hugging Face cache is made of them).
///
/// # Errors
/// A file that is not there or cannot be opened; a pipe, a device, a socket or a folder, none of which is opened for good.
pub(crate) fn open_regular(path: &Path) -> Result<(File, Metadata)> {
    let missing = |e: std::io::Error| match path.read_link() {
        Ok(to) => Error::file(
            path,
            format_args!("links to {}: {e}; download it again", to.display()),
        ),
        Err(_) if e.kind() == ErrorKind::NotFound => {
            Error::file(path, "is missing; download it again")
        }
        Err(_) => Error::file(path, format_args!("cannot be read: {e}")),
    };
    let regular = |about: Metadata| match about.is_file() {
        true => Ok(about),
        false => Err(Error::file(path, "not a regular file")),
    };
    // Opening a device can have effects, so it is looked at before; and again behind, because names can be given anew.
    regular(path.metadata().map_err(missing)?)?;
    let mut how = OpenOptions::new();
    how.read(true).custom_flags(libc::O_NONBLOCK);
    let file = how.open(path).map_err(missing)?;
    let about = regular(file.metadata().map_err(missing)?)?;
    Ok((file, about))
}

/// The bytes of a file; `None` where there is none of this name.
///
/// # Errors
/// Those of [`open_regular`], and more than `limit` bytes.
pub(crate) fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    if !is_there(path) {
        return Ok(None);
    }
    let (file, about) = open_regular(path)?;
    let too_large = |len: u64| {
        let what = format_args!("{len} bytes or more: over the limit of {limit}");
        Err(Error::file(path, what))
    };
    if about.len() > limit {
        return too_large(about.len());
    }
    let mut bytes = Vec::with_capacity(about.len() as usize);
    // It may grow meanwhile.
    let read = file.take(limit + 1).read_to_end(&mut bytes);
    match read.map_err(|e| Error::file(path, format_args!("cannot be read: {e}")))? as u64 {
        len if len > limit => too_large(len),
        _ => Ok(Some(bytes)),
    }
}

/// The text of a small file; `None` where there is none of this name.
///
/// # Errors
/// Those of [`read`], and bytes that are no UTF-8.
pub(crate) fn read_text(path: &Path) -> Result<Option<String>> {
    let Some(bytes) = read(path, SMALL)? else {
        return Ok(None);
    };
    String::from_utf8(bytes).map(Some).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        let what = format_args!("not valid UTF-8: the byte at offset {at} begins no character");
        Error::file(path, what)
    })
}

/// Whether a name is taken, be it by a dangling link: then the link is the error to show.
pub(crate) fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn complaint(path: &Path) -> String {
        let e = read_text(path).unwrap_err().to_string();
        e.replace(&format!("{}: ", path.display()), "")
    }

    #[test]
    fn only_regular_files_of_a_bounded_size_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        assert_eq!(read_text(&at("none")).unwrap(), None);
        std::fs::write(at("text"), "ab").unwrap();
        symlink("text", at("link")).unwrap();
        assert_eq!(read_text(&at("link")).unwrap().as_deref(), Some("ab"));

        rustix::fs::mknodat(
            rustix::fs::CWD,
            at("pipe"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        symlink("/dev/zero", at("zeros")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        std::fs::create_dir(at("folder")).unwrap();
        for name in ["pipe", "zeros", "socket", "folder"] {
            assert_eq!(complaint(&at(name)), "not a regular file", "{name}");
        }

        symlink("nowhere", at("dangling")).unwrap();
        assert!(complaint(&at("dangling")).starts_with("links to nowhere: "));
        let sparse = File::create(at("sparse")).unwrap();
        sparse.set_len(SMALL + 1).unwrap();
        assert!(complaint(&at("sparse")).ends_with("over the limit of 16777216"));
        std::fs::write(at("latin"), b"a\xff").unwrap();
        assert!(complaint(&at("latin")).contains("offset 1"));
    }
}
