//! Slurm's compact node lists: `node[01-03,07],gpu1`.

use crate::{Error, Result};

/// No allocation is larger; a list that says so is garbage.
const MAX_HOSTS: usize = 1 << 16;

/// The host names that a Slurm node list stands for, in its order: `n[08-10],m1` is `n08 n09 n10 m1`.
///
/// Several brackets in one name multiply, the last one running fastest, as in Slurm.
pub fn expand(list: &str) -> Result<Vec<String>> {
    let malformed = |why: &str| Error::failed(format!("the node list \"{list}\" {why}"));
    let mut hosts = Vec::new();
    for item in split_outside_brackets(list).ok_or_else(|| malformed("has unbalanced brackets"))? {
        if item.is_empty() {
            return Err(malformed("has an empty name"));
        }
        let expanded = expand_item(item).ok_or_else(|| malformed("has a malformed range"))?;
        if hosts.len() + expanded.len() > MAX_HOSTS {
            return Err(malformed("names too many hosts"));
        }
        hosts.extend(expanded);
    }
    Ok(hosts)
}

fn split_outside_brackets(list: &str) -> Option<Vec<&str>> {
    let (mut items, mut start, mut inside) = (Vec::new(), 0, false);
    for (i, c) in list.char_indices() {
        match c {
            '[' if inside => return None,
            '[' => inside = true,
            ']' if !inside => return None,
            ']' => inside = false,
            ',' if !inside => {
                items.push(&list[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    items.push(&list[start..]);
    (!inside).then_some(items)
}

fn expand_item(item: &str) -> Option<Vec<String>> {
    let mut names = vec![String::new()];
    let mut rest = item;
    while let Some((prefix, tail)) = rest.split_once('[') {
        let (ranges, after) = tail.split_once(']')?;
        let numbers = expand_ranges(ranges)?;
        if names.len().checked_mul(numbers.len())? > MAX_HOSTS {
            return None;
        }
        names = names
            .iter()
            .flat_map(|name| numbers.iter().map(move |n| format!("{name}{prefix}{n}")))
            .collect();
        rest = after;
    }
    for name in &mut names {
        name.push_str(rest);
    }
    Some(names)
}

/// `01-03,07` with the leading zeros of the first number kept.
fn expand_ranges(ranges: &str) -> Option<Vec<String>> {
    let mut numbers = Vec::new();
    for range in ranges.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let width = first.len();
        let (first, last) = (number(first)?, number(last)?);
        if last < first || last - first >= MAX_HOSTS - numbers.len().min(MAX_HOSTS) {
            return None;
        }
        numbers.extend((first..=last).map(|n| format!("{n:0width$}")));
    }
    Some(numbers)
}

fn number(digits: &str) -> Option<usize> {
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}

/// Tasks on node `node` of a Slurm count list such as `2(x3),1`.
pub fn tasks_on_node(counts: &str, node: usize) -> Option<usize> {
    let mut next = 0usize;
    for item in counts.split(',') {
        let (count, repeat) = match item.split_once("(x") {
            Some((count, repeat)) => (count, number(repeat.strip_suffix(')')?)?),
            None => (item, 1),
        };
        next = next.checked_add(repeat)?;
        if node < next {
            return number(count);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn node_lists_expand_as_scontrol_show_hostnames_does() {
        // Expected values: the output of `scontrol show hostnames LIST` (Slurm 22.05).
        for (list, hosts) in [
            ("gpu1", "gpu1"),
            ("node[01-03,07],gpu1", "node01 node02 node03 node07 gpu1"),
            ("n[8-11]", "n8 n9 n10 n11"),
            ("r[1-2]n[1-2]", "r1n1 r1n2 r2n1 r2n2"),
            ("a,b[2],c", "a b2 c"),
            ("n[098-101]", "n098 n099 n100 n101"),
        ] {
            assert_eq!(expand(list).unwrap().join(" "), hosts, "{list}");
        }
    }

    #[test]
    fn malformed_node_lists_are_refused() {
        for list in [
            "",
            "a,,b",
            "n[1-3",
            "n1-3]",
            "n[[1]]",
            "n[3-1]",
            "n[a-b]",
            "n[]",
            "n[1,]",
            "n[0-99999999]",
            "n[0-18446744073709551615]",
            "n[1-65536]m[1-65536]",
        ] {
            let error = expand(list).unwrap_err().to_string();
            assert!(error.starts_with("the node list"), "{list}: {error}");
        }
    }

    #[test]
    fn task_counts_by_node() {
        assert_eq!(tasks_on_node("2", 0), Some(2));
        assert_eq!(tasks_on_node("2(x3),1", 2), Some(2));
        assert_eq!(tasks_on_node("2(x3),1", 3), Some(1));
        assert_eq!(tasks_on_node("2(x3),1", 4), None);
        assert_eq!(tasks_on_node("2(x", 0), None);
    }

    proptest! {
        #[test]
        fn any_text_is_expanded_or_refused(list in "[n0-9,\\[\\]x()-]{0,24}", node in 0usize..9) {
            let _ = expand(&list);
            let _ = tasks_on_node(&list, node);
        }
    }
}
