//! Machines made of files, for the doctor's tests.

use std::path::Path;
use std::process::Command;

/// A folder that holds these files, `(path, text)`.
pub fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    dir
}

/// Compiles C into a shared library; whoever can link a Rust test has a C compiler.
pub fn shared_library(root: &Path, path: &str, source: &str) {
    let path = root.join(path);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let c_file = path.with_extension("c");
    std::fs::write(&c_file, source).unwrap();
    let status = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .arg(&path)
        .arg(&c_file)
        .status()
        .unwrap();
    assert!(status.success());
    std::fs::remove_file(c_file).unwrap();
}
