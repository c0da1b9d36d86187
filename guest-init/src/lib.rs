//! `firn-init`: PID 1 of a Firn guest.
//!
//! It mounts, starts the function's runtime as an unprivileged process, serves the Lambda Runtime
//! API to it on loopback, and carries events, answers and output to and from the host over one
//! vsock stream ([`firn_proto::guest`]). It trusts the host and nothing that the runtime says or
//! does: every head, body, line and queue is bounded.
//!
//! One thread, one `poll` loop, level-triggered and rebuilt from state each round: there is no
//! registration to forget and nothing runs while nothing happens. All of its memory is in every
//! clone's working set, so large buffers go back to the kernel as soon as they are empty.
//!
//! | module | job |
//! |---|---|
//! | [`boot`] | mounts, loopback, the runtime's cgroup |
//! | [`agent`] | the loop: frames from the host, requests from the runtime, deadlines, exits |
//! | [`host`] | frames on the invoke connection |
//! | [`runtime_api`] | routes and states of the Runtime API |
//! | [`calls`] | what is asked of the host's services |
//! | [`tracer`] | segments for X-Ray |
//! | [`server`], [`http`], [`outbox`] | connections on loopback; HTTP/1.1 requests and replies |
//! | [`runtime`], [`confine`] | the runtime's process and what it may not do |
//! | [`output`] | what it prints, line by line |
//! | [`signals`] | ended children
//! | [`place`], [`cgroup`], [`renew`] | what only a real guest has: cgroup, code disk, clock, entropy |

pub mod agent;
pub mod boot;
pub mod calls;
pub mod cgroup;
pub mod confine;
pub mod host;
pub mod http;
pub mod outbox;
pub mod output;
pub mod place;
pub mod renew;
pub mod runtime;
pub mod runtime_api;
pub mod server;
pub mod signals;
pub mod tracer;

/// The time-stamp counter, as the host converts it to its own time.
#[inline]
pub fn tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86_64 CPU and touches nothing but registers; the kernel
    // leaves CR4.TSD clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}
