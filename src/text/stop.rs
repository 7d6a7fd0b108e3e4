//! Stop strings over a stream of text: found across token boundaries, never shown, not even in part.

use crate::{Error, Result};

/// Ends an answer at the first stop string.
///
/// First is the one that is complete first; of two that end at the same place, the longer. That is the one a
/// reader of the whole text would find too, so the result does not depend on how the text was cut into tokens.
#[derive(Debug, Clone, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
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
        if self.stopped {
            return StopStep::default();
        }
        self.held.push_str(text);
        if let Some((start, which)) = self.first_match() {
            self.stopped = true;
            self.held.truncate(start);
            return StopStep {
                text: std::mem::take(&mut self.held),
                matched: Some(which),
            };
        }
        let keep = self.held.split_off(self.safe_len());
        StopStep {
            text: std::mem::replace(&mut self.held, keep),
            matched: None,
        }
    }

    /// The end of the answer: what was held back in vain.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Start and index of the stop string that is complete first.
    fn first_match(&self) -> Option<(usize, usize)> {
        self.stops
            .iter()
            .enumerate()
            .filter_map(|(which, stop)| Some((self.held.find(stop.as_str())?, stop.len(), which)))
            .min_by_key(|&(start, len, which)| (start + len, start, which))
            .map(|(start, _, which)| (start, which))
    }

    /// Bytes at the front of `held` with which no stop string can begin.
    fn safe_len(&self) -> usize {
        // Only a proper prefix can be at the very end, so nothing longer than the longest stop is looked at.
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest);
        (from..self.held.len())
            .filter(|&at| self.held.is_char_boundary(at))
            .find(|&at| self.stops.iter().any(|s| s.starts_with(&self.held[at..])))
            .unwrap_or(self.held.len())
    }
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
    }
}
