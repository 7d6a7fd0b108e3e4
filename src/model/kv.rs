//! The paged KV cache's book-keeping: blocks of tokens, handed out by rank 0 (Kwon et al., arXiv 2309.06180).

use crate::layout::KV_BLOCK;

/// The free blocks of a cache that never grows.
#[derive(Debug)]
pub struct BlockPool {
    free: Vec<u32>,
    total: usize,
}

impl BlockPool {
    /// A pool of blocks `0..n_blocks`, all free.
    pub fn new(n_blocks: usize) -> Self {
        BlockPool {
            free: (0..n_blocks as u32).rev().collect(),
            total: n_blocks,
        }
    }

    /// Blocks that hold `n_tokens`.
    pub fn blocks_for(n_tokens: usize) -> usize {
        n_tokens.div_ceil(KV_BLOCK)
    }

    /// Takes `n` blocks, or none when fewer are free.
    pub fn take(&mut self, n: usize) -> Option<Vec<u32>> {
        let keep = self.free.len().checked_sub(n)?;
        let mut taken = self.free.split_off(keep);
        taken.reverse();
        Some(taken)
    }

    /// Gives blocks back.
    pub fn give_back(&mut self, blocks: impl IntoIterator<Item = u32>) {
        self.free.extend(blocks);
        debug_assert!(
            self.free.len() <= self.total,
            "a block was given back twice"
        );
    }

    /// Blocks not in use.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// All blocks.
    pub fn total(&self) -> usize {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_come_back_and_never_twice() {
        let mut pool = BlockPool::new(5);
        let a = pool.take(3).unwrap();
        assert_eq!(a, [0, 1, 2]);
        assert_eq!(pool.take(3), None);
        assert_eq!(pool.free(), 2);
        let b = pool.take(2).unwrap();
        assert!(b.iter().all(|x| !a.contains(x)));
        pool.give_back(a);
        pool.give_back(b);
        assert_eq!((pool.free(), pool.total()), (5, 5));
        assert_eq!(
            (BlockPool::blocks_for(16), BlockPool::blocks_for(17)),
            (1, 2)
        );
    }
}
