//! Which bytes of a checkpoint go where: local matrices cut into pieces that threads can fill independently.

use super::text::quote;
use super::{LocalMatrix, Part};
use crate::{Error, Result};
use std::ops::Range;

/// The file bytes that one piece spans at most, and so the size of a thread's bounce buffer.
pub const PIECE: usize = 4 << 20;

/// A rectangle of a tensor and the memory that it fills, row by row.
#[derive(Debug)]
pub(super) struct Piece<'d> {
    /// Index of the part in the order in which `cut` was given the parts.
    pub part: usize,
    pub rows: Range<usize>,
    pub cols: Range<usize>,
    pub dst: &'d mut [u8],
}

/// Checks that the parts of `m` lie inside their tensors and together cover every row once; the parts from the top.
///
/// The plan promises all of it; a broken promise must end as an error, not as wrong weights or a panic.
pub(super) fn parts_in_order(m: &LocalMatrix, dest_len: usize) -> Result<Vec<&Part>> {
    let wrong = |what: String| {
        Error::failed(format_args!(
            "internal error: matrix {}: {what}",
            quote(&m.name)
        ))
    };
    let bytes = m
        .rows
        .checked_mul(m.cols)
        .and_then(|n| n.checked_mul(m.dtype.size()));
    if bytes != Some(dest_len) {
        let (rows, cols, dtype) = (m.rows, m.cols, m.dtype);
        return Err(wrong(format!(
            "{rows} x {cols} {dtype} does not fit a place of {dest_len} bytes"
        )));
    }
    let mut parts: Vec<&Part> = m.parts.iter().collect();
    parts.sort_by_key(|p| (p.dst_row, p.rows.len()));
    let mut next = 0;
    for p in &parts {
        let (name, [rows, cols]) = (quote(&p.tensor), p.shape);
        let inside = |r: &Range<usize>, n: usize| r.start <= r.end && r.end <= n;
        if !inside(&p.rows, rows) || !inside(&p.cols, cols) || rows.checked_mul(cols).is_none() {
            let (r, c) = (&p.rows, &p.cols);
            return Err(wrong(format!(
                "rows {r:?}, columns {c:?} are not inside {name} {rows} x {cols}"
            )));
        }
        if p.cols.len() != m.cols {
            let (have, want) = (p.cols.len(), m.cols);
            return Err(wrong(format!("{name} gives {have} columns of {want}")));
        }
        if p.dst_row != next {
            let at = p.dst_row;
            return Err(wrong(format!(
                "{name} begins at row {at}, the part before it ends at {next}"
            )));
        }
        // Cannot overflow usefully: an overflowing sum would differ from the next `dst_row` and from `m.rows`.
        next = next.saturating_add(p.rows.len());
    }
    if next != m.rows {
        let rows = m.rows;
        return Err(wrong(format!("its parts cover {next} of {rows} rows")));
    }
    Ok(parts)
}

/// Cuts part number `index` into pieces that span at most [`PIECE`] bytes of a file with elements of `stored` bytes.
///
/// `dst` is the part's place, `rows.len() × cols.len()` elements; every piece fills a contiguous piece of it.
pub(super) fn cut<'d>(
    part: &Part,
    index: usize,
    stored: usize,
    mut dst: &'d mut [u8],
    pieces: &mut Vec<Piece<'d>>,
) {
    let (width, limit) = (part.cols.len(), PIECE / stored);
    if dst.is_empty() {
        return;
    }
    let size = dst.len() / (part.rows.len() * width);
    // Several whole rows a piece, or, of a row that is longer than a piece, several columns.
    let row_step = match limit.checked_sub(width) {
        Some(more) => 1 + more / part.shape[1],
        None => 1,
    };
    for rows in steps(&part.rows, row_step) {
        for cols in steps(&part.cols, width.min(limit)) {
            let (head, tail) = dst.split_at_mut(rows.len() * cols.len() * size);
            dst = tail;
            pieces.push(Piece {
                part: index,
                rows: rows.clone(),
                cols,
                dst: head,
            });
        }
    }
}

/// `range` in steps of `step`, the last one shorter.
fn steps(range: &Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = range.end;
    range
        .clone()
        .step_by(step)
        .map(move |at| at..end.min(at.saturating_add(step)))
}
