//! Descriptors that come with a request: as many as it needs, each at its place.

use std::{fs::File, os::fd::OwnedFd};

use firn_proto::control::{DiskSource, FailureKind};

use super::error::{RequestError, Result, io_error};
use crate::descriptors::{Numbers, place};

pub(super) fn count(disks: &[DiskSource]) -> usize {
    disks.iter().map(|disk| disk.descriptors()).sum()
}

pub(super) fn expect_descriptors(
    descriptors: Vec<OwnedFd>,
    expected: usize,
) -> Result<std::vec::IntoIter<OwnedFd>> {
    if descriptors.len() != expected {
        let message = format!("{} descriptors came, {expected} are needed", descriptors.len());
        return Err(RequestError::refused(FailureKind::BadRequest, message));
    }
    Ok(descriptors.into_iter())
}

pub(super) fn next(descriptors: &mut impl Iterator<Item = OwnedFd>) -> Result<OwnedFd> {
    descriptors
        .next()
        .ok_or_else(|| RequestError::refused(FailureKind::BadRequest, "a descriptor is missing"))
}

/// The next descriptor, at its place.
pub(super) fn next_to(
    numbers: &Numbers,
    descriptors: &mut impl Iterator<Item = OwnedFd>,
) -> Result<OwnedFd> {
    place(next(descriptors)?, numbers).map_err(io_error("descriptor"))
}

/// All descriptors that are left, at their places.
pub(super) fn all_to(
    numbers: &Numbers,
    descriptors: impl Iterator<Item = OwnedFd>,
) -> Result<std::vec::IntoIter<OwnedFd>> {
    let placed = descriptors.map(|descriptor| place(descriptor, numbers));
    let placed: std::io::Result<Vec<_>> = placed.collect();
    Ok(placed.map_err(io_error("descriptors"))?.into_iter())
}

/// By `fstat`, which names no file: std asks by `statx`, which could.
pub(super) fn length(file: &File) -> std::io::Result<u64> {
    Ok(rustix::fs::fstat(file)?.st_size as u64)
}
