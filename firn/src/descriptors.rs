//! Descriptors: each microVM takes about ten of them.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises this process's limit of open descriptors as far as it may go, which is a host's first
/// limit on how many microVMs it has: the usual 1024 are used up by a hundred. For programs; a
/// library that another program embeds has no business with its limits, so [`Host`](crate::Host)
/// does not do it. Returns the limit, `None` if there is none.
///
/// # Errors
/// The kernel's.
pub fn raise_descriptor_limit() -> io::Result<Option<u64>> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    }
    Ok(maximum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_where_it_may_be() {
        let limit = raise_descriptor_limit().unwrap();
        let now = getrlimit(Resource::Nofile);
        assert_eq!((now.current, now.maximum), (limit, limit));
    }
}
