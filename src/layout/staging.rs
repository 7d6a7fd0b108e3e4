//! What weights pass through on their way: pinned memory, rings of slots, the hand-over to the cores.

/// Slots of the ring on the device that rows stream through where any leave the GPU, and of the pinned ring that they pass
/// on their way from files where any lie there.
pub const RING_SLOTS: usize = 8;
/// Bytes of one of them.
pub const RING_SLOT_BYTES: usize = 16 << 20;
/// Bytes of a whole ring.
pub const RING_BYTES: u64 = (RING_SLOTS * RING_SLOT_BYTES) as u64;
/// Pinned memory through which weights pass on their way to the device, all threads together.
pub const STAGING: usize = 64 << 20;
/// Tokens of a step up to which the cores take a share: beyond, arithmetic and not memory would set their pace.
pub const SHARE_ROWS: usize = 32;
