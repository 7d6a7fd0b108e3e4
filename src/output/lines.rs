//! The answers of a batch on stdout, a line each.
//!
//! A line leaves as soon as its answer is finished, so that whatever ends the run later loses none. Where stdout is a file
//! of its own, the lines are put into the order of the prompts at the end; a pipe keeps the order in which they came.

use super::{unwritable, write_stdout};
use crate::{Error, Result};
use rustix::fs::{SeekFrom, seek};
use serde::Serialize;
use std::fs::File;
use std::io::{self, Stdout, stdout};
use std::os::unix::fs::FileExt;

/// A line that is out.
#[derive(Debug, Clone, Copy)]
struct Written {
    /// Number of its prompt.
    index: usize,
    /// Its first byte in the file.
    offset: u64,
    length: usize,
}

/// Lines on stdout; see the module.
#[derive(Debug)]
pub struct Lines {
    /// In the order in which they left.
    written: Vec<Written>,
    /// stdout opened for reading and for writing anywhere, where it is a regular file.
    file: Option<File>,
}

impl Lines {
    /// Nothing written yet.
    pub fn new() -> Lines {
        let is_file = |file: &File| file.metadata().is_ok_and(|m| m.is_file());
        // Opened anew: the descriptor itself may only append.
        let file = File::options()
            .read(true)
            .write(true)
            .open("/proc/self/fd/1");
        Lines {
            written: Vec::new(),
            file: file.ok().filter(is_file),
        }
    }

    /// Writes the answer to prompt `index`, all of it or, in a file, nothing.
    ///
    /// # Errors
    /// A closed pipe or a full disk.
    pub fn write(&mut self, index: usize, answer: &impl Serialize) -> Result<()> {
        let text =
            serde_json::to_string(answer).map_err(|e| Error::failed(format!("JSON: {e}")))? + "\n";
        let before = self.file.as_ref().and_then(|f| f.metadata().ok());
        if let Err(e) = write_stdout(&text) {
            if let (Some(file), Some(before)) = (&self.file, before) {
                // A full disk takes the first half of a line.
                let _ = file.set_len(before.len());
            }
            return Err(e);
        }
        let end = self.file.as_ref().and_then(|_| position(&stdout()).ok());
        match end.and_then(|end| end.checked_sub(text.len() as u64)) {
            Some(offset) => self.written.push(Written {
                index,
                offset,
                length: text.len(),
            }),
            None => self.file = None,
        }
        Ok(())
    }

    /// Puts the lines of a file into the order of their prompts.
    ///
    /// Left as they are where something else has written to the file between them, or behind them.
    ///
    /// # Errors
    /// The file cannot be written, and holds every line once or twice.
    pub fn finish(mut self) -> Result<()> {
        let in_order = self.written.is_sorted_by_key(|w| w.index);
        let Some(file) = self.file.take().filter(|_| !in_order) else {
            return Ok(());
        };
        let (first, last) = match self.written.as_slice() {
            [first, .., last] => (first.offset, last.offset + last.length as u64),
            _ => return Ok(()),
        };
        let touch = |w: &[Written]| w[0].offset + w[0].length as u64 == w[1].offset;
        let alone = file.metadata().is_ok_and(|m| m.len() == last);
        if !alone || !self.written.windows(2).all(touch) {
            return Ok(());
        }
        sort(&file, first, last, &mut self.written).map_err(unwritable)
    }
}

impl Default for Lines {
    fn default() -> Self {
        Lines::new()
    }
}

fn position(stdout: &Stdout) -> io::Result<u64> {
    Ok(seek(stdout, SeekFrom::Current(0))?)
}

/// Sorts the lines that fill `first..last`, the end of `file`.
fn sort(file: &File, first: u64, last: u64, lines: &mut [Written]) -> io::Result<()> {
    let mut text = vec![0; (last - first) as usize];
    file.read_exact_at(&mut text, first)?;
    lines.sort_by_key(|w| w.index);
    let mut sorted = Vec::with_capacity(text.len());
    for line in lines {
        let begin = (line.offset - first) as usize;
        sorted.extend_from_slice(&text[begin..begin + line.length]);
    }
    // Behind the end first: whoever ends this process in between leaves every line there.
    if file.write_all_at(&sorted, last).is_err() {
        // No room for that: the order matters less than the lines.
        return file.set_len(last);
    }
    file.write_all_at(&sorted, first)?;
    file.set_len(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_in_a_file_are_sorted_and_what_was_before_them_stays() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"before\nb2\na1\nc3\n", 0).unwrap();
        let at = |index, offset| Written {
            index,
            offset,
            length: 3,
        };
        sort(&file, 7, 16, &mut [at(1, 7), at(0, 10), at(2, 13)]).unwrap();
        let mut text = vec![0; 16];
        file.read_exact_at(&mut text, 0).unwrap();
        assert_eq!(text, b"before\na1\nb2\nc3\n");
        assert_eq!(file.metadata().unwrap().len(), 16);
    }
}
