//! The house stays one that can be walked in one direction: no folder of `src` imports one that imports it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Modules by the modules that they name, each with a file that does so.
type Imports = BTreeMap<String, BTreeMap<String, PathBuf>>;

/// Every Rust file below `dir`, tests left out: what they look at makes no layer.
fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && name != "tests" {
            files(&path, found);
        } else if name.ends_with(".rs") && !["tests.rs", "testing.rs"].contains(&name) {
            found.push(path);
        }
    }
}

/// The code of a file: without comments, and without its tests, which come last.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    let lines = code.lines().map(|l| l.split("//").next().unwrap());
    lines.collect::<Vec<_>>().join("\n")
}

/// The names that follow `root::` in `code`: `root::a::B` and `root::{a::B, c}` give a and c.
fn named(code: &str, root: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let root = format!("{root}::");
    for (at, _) in code.match_indices(&root) {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
            continue;
        }
        let rest = &code[at + root.len()..];
        let word = |text: &str| -> String {
            let letters = text.trim_start().chars();
            letters
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect()
        };
        match rest.strip_prefix('{') {
            None => drop(names.insert(word(rest))),
            Some(group) => {
                let (mut depth, mut start) = (0, 0);
                for (i, c) in group.char_indices() {
                    match c {
                        '{' => depth += 1,
                        ',' | '}' if depth == 0 => {
                            names.insert(word(&group[start..i]));
                            start = i + 1;
                        }
                        '}' => depth -= 1,
                        _ => {}
                    }
                    if depth < 0 || (c == '}' && start == i + 1) {
                        break;
                    }
                }
            }
        }
    }
    names
}

fn imports(src: &Path) -> Imports {
    let mut all = Vec::new();
    files(src, &mut all);
    let module = |path: &Path| {
        let first = path.strip_prefix(src).unwrap().components().next();
        let name = first.unwrap().as_os_str().to_str().unwrap();
        name.trim_end_matches(".rs").to_owned()
    };
    let modules: BTreeSet<String> = all.iter().map(|p| module(p)).collect();
    let mut imports = Imports::new();
    for path in &all {
        let from = module(path);
        if ["main", "lib"].contains(&from.as_str()) {
            continue;
        }
        for to in named(&code(path), "crate") {
            if to != from && modules.contains(&to) {
                let places = imports.entry(from.clone()).or_default();
                places.entry(to).or_insert_with(|| path.clone());
            }
        }
    }
    imports
}

/// A way from `at` back to `goal`, as the modules on it.
fn way(
    imports: &Imports,
    at: &str,
    goal: &str,
    seen: &mut BTreeSet<String>,
) -> Option<Vec<String>> {
    for to in imports.get(at)?.keys() {
        if to == goal {
            return Some(vec![at.to_owned(), goal.to_owned()]);
        }
        if seen.insert(to.clone())
            && let Some(rest) = way(imports, to, goal, seen)
        {
            return Some([vec![at.to_owned()], rest].concat());
        }
    }
    None
}

#[test]
fn no_folder_imports_one_that_imports_it() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let imports = imports(&src);
    // The test would see nothing if it read nothing.
    assert!(imports["commands"].contains_key("session") && imports["plan"].contains_key("layout"));
    let mut circles = BTreeSet::new();
    for module in imports.keys() {
        if let Some(circle) = way(&imports, module, module, &mut BTreeSet::new()) {
            let steps = circle.windows(2).map(|pair| {
                let place = imports[&pair[0]][&pair[1]].strip_prefix(&src).unwrap();
                format!("{} → {} ({})", pair[0], pair[1], place.display())
            });
            circles.insert(steps.collect::<Vec<_>>().join(", "));
        }
    }
    let circles: Vec<_> = circles.into_iter().collect();
    assert!(
        circles.is_empty(),
        "imports go round:\n{}",
        circles.join("\n")
    );
}

#[test]
fn names_are_found_in_paths_and_groups() {
    let code = "use crate::{Error, plan::{self, Plan}, text};\nlet x = crate::bytes::format(1); not_crate::gpu::x();";
    let names: Vec<_> = named(code, "crate").into_iter().collect();
    assert_eq!(names, ["Error", "bytes", "plan", "text"]);
}
