//! Parse, run, and be the only place that prints errors and sets exit codes.
fn main() {}
