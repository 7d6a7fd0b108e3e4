//! What this rank will do, as a plain value: pure functions of the configuration, the world size and the budgets.

pub mod shards;

pub use shards::Shard;
