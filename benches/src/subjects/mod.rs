//! Everything that is measured: one file a subject.

pub mod firn;
