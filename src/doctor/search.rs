//! Where libraries of CUDA may lie besides the loader's own path, and which versions lie there.

use super::launcher::Env;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// A place to look for libraries, in words, and the folders that it stands for here.
pub(super) struct Place {
    pub words: String,
    pub folders: Vec<PathBuf>,
}

/// The places in the order in which they are looked at.
pub(super) fn places(root: &Path, env: Env) -> Vec<Place> {
    let mut places = Vec::new();
    let toolkit = |home: &Path| {
        [
            "lib64",
            "lib",
            "targets/x86_64-linux/lib",
            "targets/sbsa-linux/lib",
        ]
        .map(|l| home.join(l))
        .to_vec()
    };
    let mut add = |words: String, folders: Vec<PathBuf>| places.push(Place { words, folders });
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        match env(name).filter(|value| !value.is_empty()) {
            Some(home) => add(format!("{name}={home}"), toolkit(&under(root, &home))),
            None => add(format!("{name} (not set)"), Vec::new()),
        }
    }
    for (words, prefixes) in python_prefixes(root, env) {
        let folders = prefixes.iter().flat_map(|prefix| {
            let own = std::iter::once(prefix.join("lib"));
            pip_folders(prefix).into_iter().chain(own)
        });
        add(words, folders.collect());
    }
    let toolkits = entries(&root.join("usr/local")).into_iter().filter(|path| {
        let name = path.file_name().and_then(|n| n.to_str());
        name.is_some_and(|n| n.starts_with("cuda"))
    });
    let mut toolkits: Vec<PathBuf> = toolkits.collect();
    toolkits.sort();
    add(
        "/usr/local/cuda*".into(),
        toolkits.iter().rev().flat_map(|t| toolkit(t)).collect(),
    );
    // Where container runtimes and WSL put the driver's libraries.
    let drivers = ["/usr/local/nvidia/lib64", "/usr/lib/wsl/lib"];
    for folder in drivers {
        add(folder.into(), vec![under(root, folder)]);
    }
    places
}

/// The environments whose packages a run may borrow libraries from, each in words: the active ones, that of the python
/// on PATH, the user's, and the system's.
fn python_prefixes(root: &Path, env: Env) -> Vec<(String, Vec<PathBuf>)> {
    let set = |name: &str| env(name).filter(|value| !value.is_empty());
    let words = |prefix: &Path| {
        let shown = Path::new("/").join(prefix.strip_prefix(root).unwrap_or(prefix));
        format!("pip packages under {}", shown.display())
    };
    let mut prefixes: Vec<(String, Vec<PathBuf>)> = Vec::new();
    for name in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        if let Some(value) = set(name) {
            prefixes.push((format!("{name}={value}"), vec![under(root, &value)]));
        }
    }
    let path = set("PATH").unwrap_or_default();
    let bins = path.split(':').filter(|bin| !bin.is_empty());
    let python = bins.map(|bin| under(root, bin)).find_map(|bin| {
        let names = ["python3", "python"].iter().map(|exe| bin.join(exe));
        names.into_iter().find(|exe| exe.exists())
    });
    let of = |exe: &Path| Some(exe.parent()?.parent()?.to_owned());
    let beside = python.as_deref().and_then(of);
    match (&python, &beside) {
        // pyenv's stand-in may choose any of the versions.
        (Some(exe), Some(pyenv)) if exe.parent().is_some_and(|bin| bin.ends_with("shims")) => {
            let versions = pyenv.join("versions");
            prefixes.push((words(&versions.join("*")), entries(&versions)));
        }
        _ => {
            let target = python
                .as_ref()
                .and_then(|exe| of(&exe.canonicalize().ok()?));
            let both = beside.into_iter().chain(target);
            prefixes.extend(both.map(|prefix| (words(&prefix), vec![prefix])));
        }
    }
    let user = set("HOME").map(|home| under(root, &home).join(".local"));
    let system = ["/usr/local", "/usr"].map(|prefix| under(root, prefix));
    prefixes.extend(user.into_iter().chain(system).map(|p| (words(&p), vec![p])));
    let mut seen = HashSet::new();
    prefixes.retain(|(_, folders)| seen.insert(folders.clone()));
    prefixes
}

/// `lib*/python3*/{site,dist}-packages/nvidia/*/lib` under `prefix`.
fn pip_folders(prefix: &Path) -> Vec<PathBuf> {
    let pythons = ["lib", "lib64"]
        .iter()
        .flat_map(|lib| entries(&prefix.join(lib)))
        .filter(|path| {
            let name = path.file_name().and_then(|n| n.to_str());
            name.is_some_and(|n| n.starts_with("python3"))
        });
    pythons
        .flat_map(|python| {
            ["site-packages", "dist-packages"].map(|packages| python.join(packages).join("nvidia"))
        })
        .flat_map(|nvidia| entries(&nvidia))
        .map(|package| package.join("lib"))
        .collect()
}

fn under(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

/// What a folder holds, sorted; nothing where there is no such folder.
pub(super) fn entries(folder: &Path) -> Vec<PathBuf> {
    let read = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = read.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// The files `NAME`, `NAME.12` … of a folder, the highest version first.
pub(super) fn versions_of(name: &str, folder: &Path) -> Vec<PathBuf> {
    let mut versions: Vec<(Vec<u32>, PathBuf)> = entries(folder)
        .into_iter()
        .filter_map(|path| {
            let suffix = path.file_name()?.to_str()?.strip_prefix(name)?.to_owned();
            let numbers = match suffix.strip_prefix('.') {
                Some(rest) => rest
                    .split('.')
                    .map(|n| n.parse().ok())
                    .collect::<Option<_>>()?,
                None if suffix.is_empty() => Vec::new(),
                None => return None,
            };
            Some((numbers, path))
        })
        .collect();
    versions.sort();
    versions.into_iter().rev().map(|(_, path)| path).collect()
}
