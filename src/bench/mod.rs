//! Measures what users get, beside what the machine could give.
//!
//! Every configuration is a run of this very program in processes of its own (`runs`), so that each begins with clean
//! memory and the figures are those of `tandem generate`; the ceilings (`ceilings`) are measured by a run of the same kind.
//! `limits` counts the bytes and operations that a figure cannot do without.

pub mod ceilings;
pub mod compare;
pub mod energy;
pub mod limits;
pub mod plot;
pub mod report;
pub mod runs;
pub mod sweep;
