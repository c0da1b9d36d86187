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

use firn_proto::guest::{ENTROPY_BYTES, Renew};
use rustix::time::{ClockId, Timespec, clock_settime};

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
    set_clock(message.wall_clock_ns)?;

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

/// Steps CLOCK_REALTIME. The monotonic clocks go on from the snapshot.
fn set_clock(wall_clock_ns: u64) -> Result<(), RenewError> {
    const SECOND: u64 = 1_000_000_000;
    let time = Timespec {
        tv_sec: (wall_clock_ns / SECOND) as i64,
        tv_nsec: (wall_clock_ns % SECOND) as i64,
    };
    clock_settime(ClockId::Realtime, time)
        .map_err(|error| RenewError::Step { step: "clock_settime", source: error.into() })
}

fn check(step: &'static str, result: libc::c_int) -> Result<(), RenewError> {
    if result < 0 {
        return Err(RenewError::Step { step, source: io::Error::last_os_error() });
    }
    Ok(())
}
