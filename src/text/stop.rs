//! Stop strings over a stream of text: found across token boundaries, never shown, not even in part.

use std::borrow::Cow;
use std::ops::Range;

use crate::{Error, Result};

/// Ends an answer at the first stop string.
///
/// First is the one that is complete first; of two that end at the same place, the longer. That is the one a
/// reader of the whole text would find too, so the result does not depend on how the text was cut into tokens.
///
/// Special tokens are not shown, but a stop string may be one or hold one. So there are two texts, with and without
/// them, and a stop string in either ends the answer.
#[derive(Debug, Clone, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop string, special tokens included.
    held: String,
    /// Where special tokens are in `held`, in order.
    hidden: Vec<Range<usize>>,
    stopped: bool,
}

/// What one piece of text came to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StopStep {
    /// Text that is final and before any stop string.
    pub text: String,
    /// Which stop string was met (its index), if one was.
    pub matched: Option<usize>,
}

impl StopMatcher {
    /// A matcher for `stops`; without any it passes all text through.
    ///
    /// # Errors
    /// An empty stop string, which would match before the first token.
    pub fn new(stops: &[String]) -> Result<Self> {
        if stops.iter().any(String::is_empty) {
            return Err(Error::usage(
                "an empty stop string would end every answer before it begins; leave it out",
            ));
        }
        Ok(Self {
            stops: stops.to_vec(),
            ..Self::default()
        })
    }

    /// Takes the next piece of text. After a match all further text is dropped.
    pub fn push(&mut self, text: &str) -> StopStep {
        self.take(text, false)
    }

    /// Takes the text of a special token, which is not shown.
    pub fn push_hidden(&mut self, token: &str) -> StopStep {
        self.take(token, true)
    }

    fn take(&mut self, text: &str, hidden: bool) -> StopStep {
        if self.stopped {
            return StopStep::default();
        }
        let start = self.held.len();
        self.held.push_str(text);
        if hidden && !text.is_empty() {
            self.hidden.push(start..self.held.len());
        }
        if let Some((start, which)) = self.first_match() {
            self.stopped = true;
            return StopStep {
                text: self.release(start),
                matched: Some(which),
            };
        }
        StopStep {
            text: self.release(self.safe_len()),
            matched: None,
        }
    }

    /// The end of the answer: what was held back in vain.
    pub fn finish(&mut self) -> String {
        match self.stopped {
            true => String::new(),
            false => self.release(self.held.len()),
        }
    }

    /// Takes `len` bytes off the front of `held`; returns those of them that are shown.
    fn release(&mut self, len: usize) -> String {
        let keep = self.held.split_off(len);
        let front = std::mem::replace(&mut self.held, keep);
        let cut = |at: usize| at.saturating_sub(len);
        let ahead = |r: &Range<usize>| r.start.min(len)..r.end.min(len);
        let shown = shown(&front, self.hidden.iter().map(ahead)).into_owned();
        self.hidden.retain(|r| r.end > len);
        for range in &mut self.hidden {
            *range = cut(range.start)..cut(range.end);
        }
        shown
    }

    /// Start in `held` and index of the stop string that is complete first.
    fn first_match(&self) -> Option<(usize, usize)> {
        let shown = shown(&self.held, self.hidden.iter().cloned());
        let found = self.stops.iter().enumerate().flat_map(|(which, stop)| {
            let whole = self
                .held
                .find(stop.as_str())
                .map(|at| (at, at + stop.len()));
            let without = shown.find(stop.as_str()).map(|at| {
                let last = at + stop.len() - 1;
                (self.place_of(at), self.place_of(last) + 1)
            });
            let both = whole.into_iter().chain(without);
            both.map(move |(start, end)| (end, start, which))
        });
        found.min().map(|(_, start, which)| (start, which))
    }

    /// Bytes at the front of `held` with which no stop string can begin.
    fn safe_len(&self) -> usize {
        let shown = shown(&self.held, self.hidden.iter().cloned());
        let whole = self.beginning_of_a_stop(&self.held);
        let without = self.beginning_of_a_stop(&shown).map(|at| self.place_of(at));
        let both = whole.into_iter().chain(without);
        both.min().unwrap_or(self.held.len())
    }

    /// Where the end of `text` becomes a proper beginning of a stop string.
    fn beginning_of_a_stop(&self, text: &str) -> Option<usize> {
        // Only a proper prefix can be at the very end, so nothing longer than the longest stop is looked at.
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = text.len().saturating_sub(longest);
        (from..text.len())
            .filter(|&at| text.is_char_boundary(at))
            .find(|&at| self.stops.iter().any(|s| s.starts_with(&text[at..])))
    }

    /// The place in `held` of a byte of the shown text.
    fn place_of(&self, shown: usize) -> usize {
        self.hidden.iter().fold(shown, |at, hidden| {
            at + if hidden.start <= at { hidden.len() } else { 0 }
        })
    }
}

/// `text` without its `hidden` ranges.
fn shown(text: &str, hidden: impl Iterator<Item = Range<usize>>) -> Cow<'_, str> {
    let mut shown = Cow::Borrowed(text);
    let mut from = 0;
    for range in hidden.filter(|r| !r.is_empty()) {
        if from == 0 {
            shown = Cow::Owned(String::with_capacity(text.len()));
        }
        shown.to_mut().push_str(&text[from..range.start]);
        from = range.end;
    }
    if from > 0 {
        shown.to_mut().push_str(&text[from..]);
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn matcher(stops: &[&str]) -> StopMatcher {
        StopMatcher::new(&stops.iter().map(|s| s.to_string()).collect::<Vec<_>>()).unwrap()
    }

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Option<usize>) {
        let mut m = matcher(stops);
        let mut matched = None;
        let mut shown = Vec::new();
        for piece in pieces {
            let step = m.push(piece);
            matched = matched.or(step.matched);
            shown.push(step.text);
        }
        shown.push(m.finish());
        (shown, matched)
    }

    #[test]
    fn a_stop_string_across_tokens_is_never_shown() {
        let (shown, matched) = run(&["\nUser:"], &["Hi", "\nUs", "er", ": more", " text"]);
        assert_eq!(shown, ["Hi", "", "", "", "", ""]);
        assert_eq!(matched, Some(0));
    }

    #[test]
    fn text_held_back_in_vain_comes_out_in_order() {
        let (shown, matched) = run(&["</s>"], &["a<", "/", "b</s", ""]);
        assert_eq!(shown, ["a", "", "</b", "", "</s"]);
        assert_eq!(matched, None);
    }

    #[test]
    fn the_first_to_be_complete_wins_then_the_longer() {
        assert_eq!(run(&["abcd", "c"], &["abcd"]).0.concat(), "ab");
        assert_eq!(
            run(&["c", "bc"], &["abc"]),
            (vec!["a".into(), "".into()], Some(1))
        );
    }

    /// Pieces in brackets are special tokens.
    fn run_special(stops: &[&str], pieces: &[&str]) -> (String, Option<usize>) {
        let mut m = matcher(stops);
        let mut matched = None;
        let mut text = String::new();
        for piece in pieces {
            let step = match piece.starts_with('[') {
                true => m.push_hidden(piece),
                false => m.push(piece),
            };
            matched = matched.or(step.matched);
            text += &step.text;
        }
        (text + &m.finish(), matched)
    }

    #[test]
    fn a_stop_string_may_be_or_hold_a_special_token() {
        assert_eq!(
            run_special(&["[end]"], &["ab", "[end]", "c"]),
            ("ab".into(), Some(0))
        );
        assert_eq!(
            run_special(&["[end]"], &["ab", "[begin]", "c"]),
            ("abc".into(), None)
        );
        assert_eq!(
            run_special(&["b[end]"], &["ab", "[end]"]),
            ("a".into(), Some(0))
        );
        assert_eq!(
            run_special(&["b[end]"], &["ab", "[b]", "[end]"]),
            ("ab".into(), None)
        );
        assert_eq!(
            run_special(&["[end]\n\n"], &["a", "[end]", "\n", "\nb"]),
            ("a".into(), Some(0))
        );
        assert_eq!(
            run_special(&["[end]\n\n"], &["a", "[end]", "\n", "b"]),
            ("a\nb".into(), None)
        );
        // A part of a special token, and one that begins within it.
        assert_eq!(
            run_special(&["nd"], &["a", "[end]", "b"]),
            ("a".into(), Some(0))
        );
        assert_eq!(
            run_special(&["d]b"], &["a", "[end]", "bc"]),
            ("a".into(), Some(0))
        );
    }

    #[test]
    fn a_stop_string_with_a_special_token_inside_is_not_shown_either() {
        assert_eq!(
            run_special(&["ab"], &["xa", "[end]", "by"]),
            ("x".into(), Some(0))
        );
        assert_eq!(
            run_special(&["ab"], &["xa", "[end]", "[end]", "cab"]),
            ("xac".into(), Some(0))
        );
        // The first that is complete wins, in whichever text.
        assert_eq!(
            run_special(&["ab", "[end]"], &["xa", "[end]", "by"]),
            ("xa".into(), Some(1))
        );
    }

    #[test]
    fn an_empty_stop_string_is_refused() {
        let e = StopMatcher::new(&[String::new()]).unwrap_err();
        assert_eq!(e.exit_code(), 2);
        assert!(e.to_string().contains("empty stop string"), "{e}");
    }

    /// The naive search: grow the text character by character until it ends with a stop string.
    fn naive(stops: &[String], text: &str) -> (String, bool) {
        for end in (0..=text.len()).filter(|&e| text.is_char_boundary(e)) {
            let hit = stops
                .iter()
                .filter(|s| text[..end].ends_with(*s))
                .max_by_key(|s| s.len());
            if let Some(stop) = hit {
                return (text[..end - stop.len()].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 5000, failure_persistence: None, ..Default::default() })]

        #[test]
        fn any_cut_of_the_text_gives_what_the_naive_search_gives(
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            pieces in prop::collection::vec("[abé]{0,3}", 0..12),
        ) {
            let (text, stopped) = naive(&stops, &pieces.concat());
            let mut m = StopMatcher::new(&stops).unwrap();
            let mut shown = String::new();
            let mut matched = false;
            for piece in &pieces {
                let step = m.push(piece);
                shown.push_str(&step.text);
                matched |= step.matched.is_some();
                // All of what was shown is of the final answer: nothing is ever taken back.
                prop_assert!(text.starts_with(&shown));
            }
            shown.push_str(&m.finish());
            prop_assert_eq!((shown, matched), (text, stopped));
        }

        #[test]
        fn special_tokens_count_and_are_not_shown(
            stops in prop::collection::vec("[abé\\[\\]]{1,4}", 0..4),
            pieces in prop::collection::vec("[abé]{0,3}|\\[[ab]\\]", 0..12),
        ) {
            let hidden = |piece: &str| piece.starts_with('[');
            let shown = |n: usize| pieces[..n].iter().filter(|p| !hidden(p)).cloned().collect::<String>();
            // How many pieces it takes until either text has a stop string.
            let met = (1..=pieces.len()).find(|&n| {
                stops.iter().any(|s| pieces[..n].concat().contains(s.as_str()) || shown(n).contains(s.as_str()))
            });
            let mut m = StopMatcher::new(&stops).unwrap();
            let (mut text, mut stopped) = (String::new(), None);
            for (piece, n) in pieces.iter().zip(1..) {
                let step = if hidden(piece) { m.push_hidden(piece) } else { m.push(piece) };
                text.push_str(&step.text);
                stopped = stopped.or(step.matched.map(|_| n));
            }
            text.push_str(&m.finish());
            prop_assert_eq!(stopped, met);
            let whole = shown(pieces.len());
            prop_assert!(whole.starts_with(&text) && (met.is_some() || whole == text));
            prop_assert!(met.is_none() || !stops.iter().any(|s| text.contains(s.as_str())));
        }
    }
}
