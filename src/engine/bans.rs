//! Tokens that may not come next, whatever their logits: rules of `generation_config.json`, as transformers applies them.

use serde::{Deserialize, Serialize};

/// The rules of one sequence; none by default. Only the host knows them: where there are any, no device chooses.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Bans {
    /// Never.
    pub always: Vec<u32>,
    /// Not as the answer's first token.
    pub first: Vec<u32>,
    /// So many tokens in a row come once only, prompt and answer taken together; 0 is no such rule.
    pub ngram: usize,
    /// Rows of tokens that are not completed.
    pub rows: Vec<Vec<u32>>,
    /// The tokens that end an answer.
    pub stops: Vec<u32>,
    /// None of them before the answer has so many tokens.
    pub least_answer: usize,
    /// None of them before prompt and answer have so many tokens.
    pub least_length: usize,
    /// Tokens of the prompt; the scheduler fills it in.
    pub prompt_len: usize,
}

impl Bans {
    /// Whether nothing is ever banned.
    pub fn is_empty(&self) -> bool {
        let no_least = self.stops.is_empty() || self.least_answer.max(self.least_length) == 0;
        self.always.is_empty()
            && self.first.is_empty()
            && self.ngram == 0
            && self.rows.is_empty()
            && no_least
    }

    /// Calls `ban` with every token that may not follow `history`, some of them more than once.
    pub fn visit(&self, history: &[u32], mut ban: impl FnMut(u32)) {
        self.always.iter().for_each(|&t| ban(t));
        if history.len() == self.prompt_len {
            self.first.iter().for_each(|&t| ban(t));
        }
        let answer = history.len().saturating_sub(self.prompt_len);
        if answer < self.least_answer || history.len() < self.least_length {
            self.stops.iter().for_each(|&t| ban(t));
        }
        if self.ngram > 0 && history.len() >= self.ngram {
            let tail = &history[history.len() - (self.ngram - 1)..];
            let same = history.windows(self.ngram).filter(|w| w.starts_with(tail));
            same.for_each(|w| ban(w[self.ngram - 1]));
        }
        for row in &self.rows {
            if let Some((&last, start)) = row.split_last()
                && history.ends_with(start)
            {
                ban(last);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn banned(bans: &Bans, history: &[u32]) -> Vec<u32> {
        assert!(!bans.is_empty());
        let mut tokens = Vec::new();
        bans.visit(history, |t| tokens.push(t));
        tokens.sort();
        tokens.dedup();
        tokens
    }

    #[test]
    fn rules_hold_where_they_are_meant_to() {
        let none = Bans::default;
        assert!(none().is_empty());
        let always = Bans {
            always: vec![7],
            ..none()
        };
        assert_eq!(banned(&always, &[1, 2]), [7]);
        let first = Bans {
            first: vec![7],
            prompt_len: 2,
            ..none()
        };
        assert_eq!(banned(&first, &[1, 2]), [7]);
        assert_eq!(banned(&first, &[1, 2, 3]), [0u32; 0]);
        let rows = Bans {
            rows: vec![vec![5], vec![1, 2, 3]],
            ..none()
        };
        assert_eq!(banned(&rows, &[9, 1, 2]), [3, 5]);
        assert_eq!(banned(&rows, &[9, 2, 1]), [5]);
        assert_eq!(banned(&rows, &[2]), [5]);
    }

    #[test]
    fn ngrams_come_once() {
        let ngram = |ngram| Bans {
            ngram,
            ..Bans::default()
        };
        assert_eq!(banned(&ngram(1), &[4, 5, 4]), [4, 5]);
        assert_eq!(banned(&ngram(2), &[4, 5, 4]), [5]);
        assert_eq!(banned(&ngram(3), &[1, 2, 3, 9, 1, 2]), [3]);
        assert_eq!(banned(&ngram(3), &[1, 2]), [0u32; 0]);
        assert_eq!(banned(&ngram(2), &[4, 4, 4]), [4]);
    }

    #[test]
    fn an_answer_does_not_end_before_its_least_length() {
        let bans = Bans {
            stops: vec![0, 1],
            least_answer: 2,
            prompt_len: 3,
            ..Bans::default()
        };
        assert_eq!(banned(&bans, &[9, 9, 9, 9]), [0, 1]);
        assert_eq!(banned(&bans, &[9, 9, 9, 9, 9]), [0u32; 0]);
        let bans = Bans {
            least_answer: 0,
            least_length: 5,
            ..bans
        };
        assert_eq!(banned(&bans, &[9, 9, 9, 9]), [0, 1]);
        assert_eq!(banned(&bans, &[9, 9, 9, 9, 9]), [0u32; 0]);
        // Without a stop token there is nothing to hold back.
        assert!(
            Bans {
                stops: vec![],
                ..bans
            }
            .is_empty()
        );
    }
}
