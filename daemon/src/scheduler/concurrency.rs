//! How many requests are in flight, and for whom room is kept.
//!
//! The account's limit is shared out: to functions with reserved concurrency, which have that much and
//! never more; to versions with provisioned concurrency, which have that much before they take of what
//! their function or the account has left; and the rest to all others. Plain bookkeeping under one lock.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use super::{Limit, Refusal};
use crate::function::Version;

/// What is kept for one function.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shares {
    /// Requests in flight that are kept for it, and that it can't exceed.
    pub reserved: Option<u32>,
    /// Requests in flight that are kept for a version. With [`Shares::reserved`], part of that.
    pub provisioned: BTreeMap<Version, u32>,
}

impl Shares {
    fn provisioned(&self) -> u32 {
        self.provisioned.values().fold(0, |sum, share| sum.saturating_add(*share))
    }

    /// What nobody else can have of the account's limit.
    pub fn kept(&self) -> u32 {
        self.reserved.unwrap_or_else(|| self.provisioned())
    }
}

#[derive(Debug, Default)]
struct Function {
    shares: Shares,
    /// In flight other than on what is provisioned.
    on_demand: u32,
    /// In flight on what is provisioned; no zeros.
    provisioned: BTreeMap<Version, u32>,
}

#[derive(Debug, Default)]
struct Counts {
    closed: bool,
    /// In flight.
    all: u32,
    /// Of those, the ones for which nothing is kept.
    unreserved: u32,
    /// Sum of what is kept.
    kept: u32,
    /// Those with something in flight or kept.
    functions: HashMap<String, Function>,
}

/// Counts requests in flight.
#[derive(Debug)]
pub struct Concurrency {
    limit: u32,
    counts: Mutex<Counts>,
    idle: Notify,
}

/// One request in flight, until it is dropped.
#[derive(Debug)]
pub struct Permit {
    concurrency: Arc<Concurrency>,
    function: String,
    /// The version on whose provisioned concurrency it runs.
    provisioned: Option<Version>,
}

/// How much was in flight, a request itself included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InFlight {
    /// All.
    pub account: u32,
    /// For which nothing is kept.
    pub unreserved: u32,
    /// Of its function.
    pub function: u32,
    /// On what its version has provisioned, and how much that is; `None`: nothing is.
    pub provisioned: Option<(u32, u32)>,
    /// Whether the request itself is.
    pub on_provisioned: bool,
}

impl Permit {
    /// How much is in flight now, for a request of `version`.
    pub fn in_flight(&self, version: Version) -> InFlight {
        let counts = self.concurrency.lock();
        let (account, unreserved) = (counts.all, counts.unreserved);
        let on_provisioned = self.provisioned.is_some();
        let all = InFlight { account, unreserved, on_provisioned, ..InFlight::default() };
        let Some(function) = counts.functions.get(&self.function) else { return all };
        let running = function.provisioned.get(&version).copied().unwrap_or_default();
        let share = function.shares.provisioned.get(&version);
        InFlight {
            function: function.on_demand + function.provisioned.values().sum::<u32>(),
            provisioned: share.map(|share| (running, *share)),
            ..all
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut counts = self.concurrency.lock();
        counts.all -= 1;
        let counts = &mut *counts;
        if let Some(function) = counts.functions.get_mut(&self.function) {
            match self.provisioned {
                Some(version) => {
                    let running = function.provisioned.entry(version).or_default();
                    *running = running.saturating_sub(1);
                    if *running == 0 {
                        function.provisioned.remove(&version);
                    }
                }
                None => {
                    function.on_demand -= 1;
                    if function.shares.reserved.is_none() {
                        counts.unreserved -= 1;
                    }
                }
            }
        }
        counts.tidy(&self.function);
        if counts.all == 0 {
            self.concurrency.idle.notify_waiters();
        }
    }
}

impl Counts {
    /// Forgets a function of which nothing is to be known.
    fn tidy(&mut self, name: &str) {
        let done = |function: &Function| {
            let Function { shares, on_demand, provisioned } = function;
            *shares == Shares::default() && *on_demand == 0 && provisioned.is_empty()
        };
        if self.functions.get(name).is_some_and(done) {
            self.functions.remove(name);
        }
    }
}

impl Concurrency {
    /// At most `limit` requests in flight, unless what is kept exceeds that.
    pub fn new(limit: u32) -> Arc<Self> {
        Arc::new(Self { limit, counts: Mutex::default(), idle: Notify::new() })
    }

    /// Lets one request for a version of a function in.
    ///
    /// # Errors
    /// [`Refusal::Throttled`] with the limit, or [`Refusal::Failed`] after [`Self::close`].
    pub fn enter(self: &Arc<Self>, name: &str, version: Version) -> Result<Permit, Refusal> {
        let mut counts = self.lock();
        if counts.closed {
            return Err(Refusal::Failed("firnd is shutting down".into()));
        }
        let counts = &mut *counts;
        let rest = self.limit.saturating_sub(counts.kept);
        let function = counts.functions.entry(name.to_owned()).or_default();
        let running = function.provisioned.get(&version).copied().unwrap_or_default();
        let share = function.shares.provisioned.get(&version).copied().unwrap_or_default();
        let entered = if running < share {
            function.provisioned.insert(version, running + 1);
            Ok(Some(version))
        } else {
            match function.shares.reserved {
                Some(reserved) => {
                    let free = reserved.saturating_sub(function.shares.provisioned());
                    if function.on_demand < free {
                        function.on_demand += 1;
                        Ok(None)
                    } else {
                        Err(Limit::Function)
                    }
                }
                None if counts.unreserved < rest => {
                    function.on_demand += 1;
                    counts.unreserved += 1;
                    Ok(None)
                }
                None => Err(Limit::Account),
            }
        };
        match entered {
            Ok(provisioned) => {
                counts.all += 1;
                let (concurrency, function) = (self.clone(), name.to_owned());
                Ok(Permit { concurrency, function, provisioned })
            }
            Err(limit) => {
                counts.tidy(name);
                Err(Refusal::Throttled(limit))
            }
        }
    }

    /// From now on this much is kept for a function. What is in flight goes on.
    pub fn keep(&self, name: &str, shares: Shares) {
        let mut counts = self.lock();
        let counts = &mut *counts;
        let function = counts.functions.entry(name.to_owned()).or_default();
        counts.kept = counts.kept - function.shares.kept() + shares.kept();
        match (function.shares.reserved, shares.reserved) {
            (None, Some(_)) => counts.unreserved -= function.on_demand,
            (Some(_), None) => counts.unreserved += function.on_demand,
            _ => {}
        }
        function.shares = shares;
        counts.tidy(name);
    }

    /// What is left of the limit for requests for which nothing is kept.
    pub fn unreserved(&self) -> u32 {
        self.limit.saturating_sub(self.lock().kept)
    }

    /// Lets nobody in any more.
    pub fn close(&self) {
        self.lock().closed = true;
    }

    /// Waits until nothing is in flight.
    pub async fn drained(&self) {
        loop {
            // Made before the look, so that no end in between is missed.
            let idle = self.idle.notified();
            if self.lock().all == 0 {
                return;
            }
            idle.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        // Every change under this lock is whole before anything in it could panic.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const V1: Version = Version::Published(1);

    fn enter(
        concurrency: &Arc<Concurrency>,
        name: &str,
        version: Version,
    ) -> Result<Permit, Limit> {
        concurrency.enter(name, version).map_err(|refusal| match refusal {
            Refusal::Throttled(limit) => limit,
            other => panic!("{other}"),
        })
    }

    fn reserved(count: u32) -> Shares {
        Shares { reserved: Some(count), ..Shares::default() }
    }

    fn provisioned(count: u32) -> Shares {
        Shares { provisioned: BTreeMap::from([(V1, count)]), ..Shares::default() }
    }

    #[test]
    fn reserved_is_a_cap_and_a_guarantee() {
        let all = Concurrency::new(5);
        all.keep("f", reserved(2));
        assert_eq!(all.unreserved(), 3);
        let others: Vec<_> = (0..3).map(|_| enter(&all, "g", V1).unwrap()).collect();
        assert_eq!(enter(&all, "h", V1).unwrap_err(), Limit::Account);
        let own = [enter(&all, "f", V1).unwrap(), enter(&all, "f", Version::Latest).unwrap()];
        assert_eq!(enter(&all, "f", V1).unwrap_err(), Limit::Function);
        drop((others, own));
        all.keep("f", reserved(0));
        assert_eq!(enter(&all, "f", V1).unwrap_err(), Limit::Function);
        all.keep("f", Shares::default());
        assert_eq!(all.unreserved(), 5);
        assert!(all.lock().functions.is_empty(), "nothing is left behind");
    }

    #[test]
    fn provisioned_comes_first_and_the_rest_of_what_is_shared() {
        let all = Concurrency::new(5);
        all.keep("f", provisioned(2));
        let others: Vec<_> = (0..3).map(|_| enter(&all, "g", V1).unwrap()).collect();
        let own = [enter(&all, "f", V1).unwrap(), enter(&all, "f", V1).unwrap()];
        assert_eq!(enter(&all, "f", V1).unwrap_err(), Limit::Account);
        drop(others);
        let more = enter(&all, "f", V1).unwrap();
        drop(own);
        assert_eq!(enter(&all, "f", Version::Latest).map(drop), Ok(()), "another version");
        // With a reservation, what is provisioned is part of it.
        all.keep("f", Shares { reserved: Some(3), ..provisioned(2) });
        assert_eq!(enter(&all, "f", Version::Latest).unwrap_err(), Limit::Function);
        let own = [enter(&all, "f", V1).unwrap(), enter(&all, "f", V1).unwrap()];
        assert_eq!(enter(&all, "f", V1).unwrap_err(), Limit::Function);
        drop((more, own));
    }

    #[tokio::test]
    async fn closing_waits_for_the_last() {
        let all = Concurrency::new(5);
        all.drained().await;
        let permit = enter(&all, "f", V1).unwrap();
        all.close();
        assert!(matches!(all.enter("f", V1), Err(Refusal::Failed(_))));
        let waiting = tokio::spawn({
            let all = all.clone();
            async move { all.drained().await }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!waiting.is_finished());
        drop(permit);
        waiting.await.unwrap();
    }

    #[derive(Debug, Clone)]
    enum Step {
        Enter(usize, u32),
        Leave(usize),
        Keep(usize, Option<u32>, u32),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0..3_usize, 0..3_u32).prop_map(|(f, v)| Step::Enter(f, v)),
            3 => (0..32_usize).prop_map(Step::Leave),
            1 => (0..3_usize, proptest::option::of(0..4_u32), 0..3_u32)
                .prop_map(|(f, r, p)| Step::Keep(f, r, p)),
        ];
        proptest::collection::vec(step, 0..200)
    }

    proptest! {
        #[test]
        fn counts_are_those_of_what_is_in_flight(steps in steps()) {
            let names = ["a", "b", "c"];
            let all = Concurrency::new(8);
            let mut permits = Vec::new();
            let mut shares = [Shares::default(), Shares::default(), Shares::default()];
            for step in steps {
                match step {
                    Step::Enter(f, v) => {
                        let version = Version::Published(v);
                        let own = |p: &&Permit| p.function == names[f];
                        let running = permits.iter().filter(own).count() as u32;
                        let on_demand =
                            permits.iter().filter(own).filter(|p| p.provisioned.is_none()).count() as u32;
                        match enter(&all, names[f], version) {
                            Ok(permit) => permits.push(permit),
                            // Nobody is turned away from what is kept for them.
                            Err(_) => match shares[f].reserved {
                                Some(reserved) => prop_assert!(
                                    on_demand + shares[f].provisioned() >= reserved || running >= reserved
                                ),
                                None => {
                                    let kept: u32 = shares.iter().map(Shares::kept).sum();
                                    prop_assert!(permits.len() as u32 + kept >= 8);
                                }
                            },
                        }
                    }
                    Step::Leave(i) if !permits.is_empty() => {
                        permits.swap_remove(i % permits.len());
                    }
                    Step::Leave(_) => {}
                    Step::Keep(f, reserved, count) => {
                        let mut new = Shares { reserved, ..Shares::default() };
                        if count > 0 && reserved.is_none_or(|r| r >= count) {
                            new.provisioned.insert(Version::Published(1), count);
                        }
                        shares[f] = new.clone();
                        all.keep(names[f], new);
                    }
                }
                let counts = all.lock();
                prop_assert_eq!(counts.all as usize, permits.len());
                let unreserved = permits.iter().filter(|p| {
                    let f = names.iter().position(|name| *name == p.function).unwrap();
                    p.provisioned.is_none() && shares[f].reserved.is_none()
                });
                prop_assert_eq!(counts.unreserved as usize, unreserved.count());
                prop_assert_eq!(counts.kept, shares.iter().map(Shares::kept).sum::<u32>());
            }
            drop(permits);
            for name in names {
                all.keep(name, Shares::default());
            }
            prop_assert!(all.lock().functions.is_empty());
        }
    }
}
