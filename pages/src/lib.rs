//! What the host and the VMM both need of memory and of the kernel's interface to it.
//!
//! | module | what there is one of |
//! |---|---|
//! | [`bitmap`] | the set of pages or blocks |
//! | [`mapping`] | the mapping of a file as plain memory |
//! | [`pagemap`] | the reader of page tables |
//! | [`ioctl`] | the source of ioctl numbers |

pub mod bitmap;
pub mod ioctl;
pub mod mapping;
pub mod pagemap;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// Bytes of a region: what one huge page covers.
pub const REGION: u64 = 2 << 20;
