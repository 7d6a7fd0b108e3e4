//! Bytes of the memory over which the GPUs of a machine add and gather.

/// Rows of the sums that are measured; a sum of another number goes the way of the next one up.
pub const SUM_ROWS: [usize; 6] = [1, 2, 4, 8, 16, 32];
/// Rows of a message; beyond, the library's ring moves fewer bytes.
pub const MAX_ROWS: usize = SUM_ROWS[SUM_ROWS.len() - 1];
/// Words of one rank in a gather, at most.
pub const GATHER_WORDS: usize = 4096;
/// The driver shares memory in whole pages of this.
const PAGE: usize = 2 << 20;

/// Bytes of a rank's inbox: for rows of 8192 elements 6 MiB on each of two ranks, 18 MiB on each of eight.
pub fn inbox_bytes(size: usize, hidden: usize) -> usize {
    // Two halves, and for each rank two words with their marks in 16 bytes: rows of sums, then words of gathers.
    (16 * (gather_at(size, hidden) + 2 * size * GATHER_WORDS / 2)).next_multiple_of(PAGE)
}

/// Where the gathers' part of an inbox begins, in units of 16 bytes.
pub fn gather_at(size: usize, hidden: usize) -> usize {
    2 * size * MAX_ROWS * (hidden / 4)
}
