//! Makes a thawed guest someone else: clock and kernel entropy.
//!
//! Both happen while the runtime is still frozen. That order is the whole point: a clone's user
//! code never runs a single instruction between the snapshot and the reseed, so no byte that the
//! kernel hands out afterwards depends on the snapshot's generator alone. (Bytes that a thread had
//! already asked for when it was frozen are in its memory like any other data, and repeat.)
//!
//! Why RNDADDENTROPY and RNDRESEEDCRNG suffice (Linux 6.12, `drivers/char/random.c`): the first
//! mixes the host's bytes into the input pool and credits them, which makes a generator ready that
//! was snapshotted before it was; the second is `crng_reseed`: a new base key from that pool, and
//! the next `base_crng.generation`. Every per-CPU generator compares its generation with the base's
//! under its lock before each use and takes a new key when they differ; the kernel's own batches
//! (`get_random_u32` and its like) do the same; and the generation is published in the vDSO data
//! page, where user-space getrandom compares it before it hands out a byte, and again after. So
//! no old state survives anywhere, on any CPU, and there is nothing to enumerate.

use std::{fs::File, io, os::fd::AsRawFd};

use firn_proto::guest::{ENTROPY_BYTES, GuestTsc, Renew};
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::tsc;

/// How often the clock is set, until it is done within a tenth of a millisecond: a vCPU may lose its CPU
/// at any time, and the more often when it is throttled.
const ATTEMPTS: u32 = 5;

/// Why a guest could not be renewed. Such a guest must never serve.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    /// The message's entropy is not [`ENTROPY_BYTES`] long.
    #[error("{0} bytes of entropy instead of {ENTROPY_BYTES}")]
    Entropy(usize),
    /// A step failed.
    #[error("{step}: {source}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// `struct rand_pool_info` of `linux/random.h` with its bytes.
#[repr(C)]
struct RandPoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; ENTROPY_BYTES],
}

/// `_IOW('R', 0x03, int [2])`.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
/// `_IO('R', 0x07)`.
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// Sets the clock and reseeds the kernel's random number generator through `urandom`, which is
/// `/dev/urandom`.
///
/// # Errors
/// Any [`RenewError`].
pub fn renew(message: &Renew, urandom: &File) -> Result<(), RenewError> {
    let buf = <[u8; ENTROPY_BYTES]>::try_from(message.entropy.as_slice())
        .map_err(|_| RenewError::Entropy(message.entropy.len()))?;
    set_clock(message)?;

    let entropy = RandPoolInfo {
        entropy_count: (ENTROPY_BYTES * 8) as libc::c_int,
        buf_size: ENTROPY_BYTES as libc::c_int,
        buf,
    };
    // SAFETY: RNDADDENTROPY reads a `rand_pool_info` and as many bytes behind it as `buf_size`
    // says, which is what `entropy` is; the descriptor is open.
    let result = unsafe { libc::ioctl(urandom.as_raw_fd(), RNDADDENTROPY, &raw const entropy) };
    check("RNDADDENTROPY", result)?;
    // SAFETY: RNDRESEEDCRNG takes no argument; the descriptor is open.
    let result = unsafe { libc::ioctl(urandom.as_raw_fd(), RNDRESEEDCRNG) };
    check("RNDRESEEDCRNG", result)
}

/// Steps CLOCK_REALTIME to what it is by now. The monotonic clocks go on from the snapshot.
fn set_clock(message: &Renew) -> Result<(), RenewError> {
    const SECOND: u64 = 1_000_000_000;
    for _ in 0..ATTEMPTS {
        let now = tsc();
        let passed = message.tsc.map_or(0, |then| nanoseconds(then, now));
        let wall_clock_ns = message.wall_clock_ns.saturating_add(passed);
        let time = Timespec {
            tv_sec: (wall_clock_ns / SECOND) as i64,
            tv_nsec: (wall_clock_ns % SECOND) as i64,
        };
        clock_settime(ClockId::Realtime, time)
            .map_err(|error| RenewError::Step { step: "clock_settime", source: error.into() })?;
        let took =
            message.tsc.map_or(0, |then| nanoseconds(GuestTsc { ticks: now, ..then }, tsc()));
        if took <= SECOND / 10_000 {
            break;
        }
    }
    Ok(())
}

/// Nanoseconds from one reading of the TSC to another, which is 0 where it is the earlier one.
fn nanoseconds(then: GuestTsc, now: u64) -> u64 {
    let ticks = (now.wrapping_sub(then.ticks) as i64).max(0) as u128;
    (ticks * 1_000_000 / u128::from(then.khz.get())).try_into().unwrap_or(u64::MAX)
}

fn check(step: &'static str, result: libc::c_int) -> Result<(), RenewError> {
    if result < 0 {
        return Err(RenewError::Step { step, source: io::Error::last_os_error() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    #[test]
    fn ticks_are_time() {
        let khz = NonZeroU32::new(2_500_000).unwrap();
        let then = GuestTsc { ticks: u64::MAX - 9, khz };
        assert_eq!(nanoseconds(then, u64::MAX - 9), 0);
        assert_eq!(nanoseconds(then, 2_499_990), 1_000_000, "across the end of the counter");
        assert_eq!(nanoseconds(then, u64::MAX - 10), 0, "a reading from before");
        let slow = GuestTsc { ticks: 0, khz: NonZeroU32::new(1).unwrap() };
        assert_eq!(nanoseconds(slow, i64::MAX as u64), u64::MAX);
    }
}
