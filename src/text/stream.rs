//! Decoding token by token: what is shown never changes afterwards and never splits a character.

use super::Tokenizer;

/// Turns ids into text as they come.
///
/// A token of a byte-level vocabulary is a piece of UTF-8, not of text: one emoji is often three tokens. So the
/// decoder keeps bytes, at most three of them, until they make a character or cannot become one any more (then
/// U+FFFD, exactly where [`String::from_utf8_lossy`] puts it). The parts together are what [`Tokenizer::decode`]
/// makes of all ids at once, and a token costs the same however long the text is.
#[derive(Debug, Clone)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// The beginning of a character, at most three bytes between calls.
    pending: Vec<u8>,
}

impl StreamDecoder {
    pub(super) fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Self {
            tokenizer,
            skip_special,
            pending: Vec::new(),
        }
    }

    /// Takes the next id and gives the text that is now final, often none.
    pub fn push(&mut self, id: u32) -> String {
        let Some(token) = self.tokenizer.token(id) else {
            return String::new();
        };
        if !(self.skip_special && self.tokenizer.is_special(&token)) {
            push_bytes(&token, &mut self.pending);
        }
        take_final(&mut self.pending)
    }

    /// The text of `id` if it is one that [`Self::push`] will leave out: a special token.
    ///
    /// Behind half a character it begins with U+FFFD, as in the text with special tokens.
    pub fn left_out(&self, id: u32) -> Option<String> {
        let token = self.tokenizer.token(id).filter(|_| self.skip_special)?;
        let half = if self.pending.is_empty() {
            ""
        } else {
            "\u{fffd}"
        };
        let is_special = self.tokenizer.is_special(&token);
        is_special.then(|| format!("{half}{token}"))
    }

    /// The end of the answer: a character that was left incomplete becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

/// Appends the bytes that a token stands for. A token with a character outside GPT-2's byte alphabet stands for itself.
fn push_bytes(token: &str, bytes: &mut Vec<u8>) {
    let start = bytes.len();
    for c in token.chars() {
        let Some(byte) = byte_of(c) else {
            bytes.truncate(start);
            bytes.extend_from_slice(token.as_bytes());
            return;
        };
        bytes.push(byte);
    }
}

/// GPT-2's byte alphabet: printable Latin-1 bytes are themselves, the other 68 are U+0100 onwards, in order.
pub(super) fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121) as u8 + 0x7f),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// Takes all text off the front of `bytes` that no later byte can change.
fn take_final(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut done = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        done += chunk.valid().len();
        let invalid = chunk.invalid();
        if done + invalid.len() == bytes.len() && may_continue(invalid) {
            break;
        }
        if !invalid.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            done += invalid.len();
        }
    }
    bytes.drain(..done);
    text
}

/// Whether `bytes` are the beginning of a character rather than an error.
fn may_continue(bytes: &[u8]) -> bool {
    matches!(std::str::from_utf8(bytes), Err(e) if e.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::super::golden::byte_tokenizer;
    use super::*;
    use proptest::prelude::*;

    fn stream(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> Vec<String> {
        let mut decoder = tokenizer.stream_decoder(skip_special);
        let mut parts: Vec<String> = ids.iter().map(|&id| decoder.push(id)).collect();
        parts.push(decoder.finish());
        parts
    }

    #[test]
    fn the_byte_alphabet_is_complete_and_every_byte_occurs_once() {
        let mut bytes: Vec<u8> = (0..=0x200u32)
            .filter_map(char::from_u32)
            .filter_map(byte_of)
            .collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    }

    #[test]
    fn a_character_appears_only_when_its_last_byte_is_there() {
        let tokenizer = byte_tokenizer();
        let ids = tokenizer.encode("a\u{1f469}b").unwrap();
        assert_eq!(ids.len(), 6, "one token a byte");
        let parts = stream(&tokenizer, &ids, true);
        assert_eq!(parts, ["a", "", "", "", "\u{1f469}", "b", ""]);
    }

    #[test]
    fn an_unfinished_character_ends_as_one_replacement() {
        let tokenizer = byte_tokenizer();
        let mut ids = tokenizer.encode("é\u{1f469}").unwrap();
        ids.pop();
        assert_eq!(stream(&tokenizer, &ids, true).concat(), "é\u{fffd}");
    }

    #[test]
    fn a_special_token_is_left_out_and_can_be_had_apart() {
        let tokenizer = byte_tokenizer();
        let mut decoder = tokenizer.stream_decoder(true);
        assert_eq!(decoder.left_out(259).as_deref(), Some("<|im_end|>"));
        assert_eq!(decoder.left_out(260), None, "<think> is not special");
        assert_eq!(decoder.push(0xc3), "");
        assert_eq!(decoder.left_out(259).as_deref(), Some("\u{fffd}<|im_end|>"));
        assert_eq!(tokenizer.stream_decoder(false).left_out(259), None);
    }

    #[test]
    fn an_id_without_a_token_is_nothing() {
        let tokenizer = byte_tokenizer();
        assert_eq!(stream(&tokenizer, &[u32::MAX, 400], true).concat(), "");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..Default::default() })]

        /// The reference is the tokenizers crate's decoding of all ids at once.
        #[test]
        fn the_stream_is_the_whole_text(
            ids in prop::collection::vec(prop_oneof![3 => 128u32..262, 1 => 0u32..270], 0..40),
            skip_special: bool,
        ) {
            let tokenizer = byte_tokenizer();
            let whole = tokenizer.decode(&ids, skip_special).unwrap();
            prop_assert_eq!(stream(&tokenizer, &ids, skip_special).concat(), whole);
        }

        /// Text that was shown is valid up to there, whatever comes: nothing is held back that is a whole character.
        #[test]
        fn only_the_beginning_of_a_character_is_held_back(text: String) {
            let tokenizer = byte_tokenizer();
            let ids = tokenizer.encode(&text).unwrap();
            let mut decoder = tokenizer.stream_decoder(true);
            for id in ids {
                decoder.push(id);
                prop_assert!(decoder.pending.len() < 4);
                prop_assert!(decoder.pending.is_empty() || may_continue(&decoder.pending));
            }
            prop_assert_eq!(decoder.finish(), "");
        }
    }
}
