//! Which instances wait for work, by function and version: plain bookkeeping, no I/O and no waiting.
//!
//! An instance is taken, serves, and comes back in two steps: [`Pools::returning`] before it is
//! paused and [`Pools::returned`] after. A request that comes in between waits that moment rather
//! than start another instance.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

/// Idle instances of all functions, each version apart under its qualified name; `W` is an instance and
/// what belongs to it.
#[derive(Debug)]
pub struct Pools<W> {
    functions: Mutex<HashMap<String, Pool<W>>>,
}

#[derive(Debug)]
struct Pool<W> {
    /// Only instances of this kind are kept.
    fingerprint: String,
    /// The most recently used last.
    idle: Vec<(Instant, W)>,
    /// Instances that will be idle in a moment.
    returning: usize,
    /// Requests that wait for one of those; never more than there are.
    waiting: VecDeque<oneshot::Sender<W>>,
}

impl<W> Pool<W> {
    fn new(fingerprint: &str) -> Self {
        Self {
            fingerprint: fingerprint.to_owned(),
            idle: Vec::new(),
            returning: 0,
            waiting: VecDeque::new(),
        }
    }
}

/// What a request gets.
#[derive(Debug)]
pub enum Take<W> {
    /// An instance.
    Ready(W),
    /// An instance in a moment, unless that one turns out to be unfit.
    Soon(oneshot::Receiver<W>),
    /// None.
    Nothing,
}

impl<W> Default for Pools<W> {
    fn default() -> Self {
        Self { functions: Mutex::default() }
    }
}

impl<W> Pools<W> {
    /// An instance of `function` with this fingerprint, the most recently used first.
    pub fn take(&self, function: &str, fingerprint: &str) -> Take<W> {
        let mut functions = self.lock();
        let pool = functions.entry(function.to_owned()).or_insert_with(|| Pool::new(fingerprint));
        if pool.fingerprint != fingerprint {
            return Take::Nothing;
        }
        if let Some((_, worker)) = pool.idle.pop() {
            return Take::Ready(worker);
        }
        if pool.returning > pool.waiting.len() {
            let (give, get) = oneshot::channel();
            pool.waiting.push_back(give);
            return Take::Soon(get);
        }
        Take::Nothing
    }

    /// An instance is about to come back. False: nobody wants it any more, retire it.
    pub fn returning(&self, function: &str, fingerprint: &str) -> bool {
        match self.lock().get_mut(function) {
            Some(pool) if pool.fingerprint == fingerprint => {
                pool.returning += 1;
                true
            }
            _ => false,
        }
    }

    /// The instance that was announced is back, with the moment since when it has been idle, or
    /// (`None`) is not fit for use. Gives back one that must be retired because the function has
    /// changed meanwhile.
    pub fn returned(
        &self,
        function: &str,
        fingerprint: &str,
        worker: Option<(Instant, W)>,
    ) -> Option<W> {
        let mut functions = self.lock();
        let Some(pool) = functions.get_mut(function).filter(|p| p.fingerprint == fingerprint)
        else {
            return worker.map(|(_, worker)| worker);
        };
        pool.returning = pool.returning.saturating_sub(1);
        if let Some((since, mut free)) = worker {
            loop {
                let Some(waiter) = pool.waiting.pop_front() else {
                    let at = pool.idle.partition_point(|(other, _)| *other <= since);
                    pool.idle.insert(at, (since, free));
                    break;
                };
                // A waiter that has gone gives the instance back.
                match waiter.send(free) {
                    Ok(()) => break,
                    Err(back) => free = back,
                }
            }
        }
        // Waiters for an instance that will not come look elsewhere.
        while pool.waiting.len() > pool.returning {
            pool.waiting.pop_back();
        }
        None
    }

    /// From now on `function` is served by instances of this kind. Gives back the others.
    pub fn switch(&self, function: &str, fingerprint: &str) -> Vec<W> {
        let mut functions = self.lock();
        match functions.get_mut(function) {
            Some(pool) if pool.fingerprint == fingerprint => Vec::new(),
            Some(pool) => {
                let old = std::mem::replace(pool, Pool::new(fingerprint));
                old.idle.into_iter().map(|(_, worker)| worker).collect()
            }
            None => {
                functions.insert(function.to_owned(), Pool::new(fingerprint));
                Vec::new()
            }
        }
    }

    /// `function` is gone. Gives back its instances.
    pub fn remove(&self, function: &str) -> Vec<W> {
        let pool = self.lock().remove(function);
        pool.into_iter().flat_map(|p| p.idle).map(|(_, worker)| worker).collect()
    }

    /// Takes out all that `unfit` says are of no use, and those that have been idle for `limit` but for
    /// the last `floor` of a function.
    pub fn expire(
        &self,
        limit: Duration,
        unfit: impl Fn(&W) -> bool,
        floor: impl Fn(&str) -> usize,
    ) -> Vec<W> {
        let mut gone = Vec::new();
        // Empty pools stay: instances that serve right now come back to them.
        for (function, pool) in self.lock().iter_mut() {
            gone.extend(pool.idle.extract_if(.., |(_, worker)| unfit(worker)).map(|(_, w)| w));
            let old = pool.idle.iter().take_while(|(since, _)| since.elapsed() >= limit).count();
            let spare = pool.idle.len().saturating_sub(floor(function));
            gone.extend(pool.idle.drain(..old.min(spare)).map(|(_, worker)| worker));
        }
        gone
    }

    /// Takes out, for a moment, all that have been idle for `limit` and that `wanted` picks. Each
    /// must be [`Pools::returned`], with the moment since when it has been idle.
    pub fn borrow(&self, limit: Duration, wanted: impl Fn(&W) -> bool) -> Vec<(Instant, W)> {
        let mut borrowed = Vec::new();
        for pool in self.lock().values_mut() {
            let due =
                |(since, worker): &mut (Instant, W)| since.elapsed() >= limit && wanted(worker);
            let before = borrowed.len();
            borrowed.extend(pool.idle.extract_if(.., due));
            pool.returning += borrowed.len() - before;
        }
        borrowed
    }

    /// Takes out the one that has been idle for longest, but for the last `floor` of a function.
    pub fn evict(&self, floor: impl Fn(&str) -> usize) -> Option<W> {
        let mut functions = self.lock();
        let (_, pool) = functions
            .iter_mut()
            .filter(|(function, pool)| pool.idle.len() > floor(function))
            .min_by_key(|(_, pool)| pool.idle[0].0)?;
        Some(pool.idle.remove(0).1)
    }

    /// Takes out everything.
    pub fn drain(&self) -> Vec<W> {
        let pools = std::mem::take(&mut *self.lock());
        pools.into_values().flat_map(|p| p.idle).map(|(_, worker)| worker).collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Pool<W>>> {
        self.functions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(pools: &Pools<u32>, fingerprint: &str, worker: u32) -> Option<u32> {
        if !pools.returning("f", fingerprint) {
            return Some(worker);
        }
        pools.returned("f", fingerprint, now(worker))
    }

    fn now(worker: u32) -> Option<(Instant, u32)> {
        Some((Instant::now(), worker))
    }

    fn take(pools: &Pools<u32>, fingerprint: &str) -> Option<u32> {
        match pools.take("f", fingerprint) {
            Take::Ready(worker) => Some(worker),
            _ => None,
        }
    }

    #[test]
    fn the_most_recent_instance_serves_first_and_the_oldest_goes_first() {
        let pools = Pools::default();
        assert_eq!(take(&pools, "a"), None);
        for worker in [1, 2, 3] {
            assert_eq!(put(&pools, "a", worker), None);
        }
        assert_eq!(pools.evict(|_| 0), Some(1));
        assert_eq!(take(&pools, "a"), Some(3));
        assert_eq!(pools.drain(), [2]);
    }

    #[test]
    fn an_update_gives_back_old_instances_now_and_later() {
        let pools = Pools::default();
        assert_eq!(take(&pools, "a"), None);
        put(&pools, "a", 1);
        assert!(pools.returning("f", "a"));
        assert_eq!(pools.switch("f", "b"), [1]);
        assert_eq!(pools.returned("f", "a", now(2)), Some(2), "it was on its way");
        assert_eq!(put(&pools, "a", 3), Some(3));
        assert_eq!(put(&pools, "b", 4), None);
        assert_eq!(take(&pools, "a"), None);
        assert_eq!(pools.remove("f"), [4]);
        assert_eq!(put(&pools, "b", 5), Some(5));
    }

    #[test]
    fn a_request_waits_for_an_instance_on_its_way() {
        let pools = Pools::default();
        assert!(matches!(pools.take("f", "a"), Take::Nothing));
        assert!(pools.returning("f", "a"));
        let Take::Soon(mut soon) = pools.take("f", "a") else { panic!("nothing on its way") };
        assert!(matches!(pools.take("f", "a"), Take::Nothing), "one instance, one waiter");
        assert_eq!(pools.returned("f", "a", now(7)), None);
        assert_eq!(soon.try_recv(), Ok(7));
        assert_eq!(take(&pools, "a"), None);
    }

    #[test]
    fn waiters_are_let_go_and_deserters_passed_over() {
        let pools: Pools<u32> = Pools::default();
        let _ = pools.take("f", "a");
        assert!(pools.returning("f", "a"));
        let Take::Soon(mut soon) = pools.take("f", "a") else { panic!("nothing on its way") };
        assert_eq!(pools.returned("f", "a", None), None);
        assert!(soon.try_recv().is_err(), "that one died");
        assert!(pools.returning("f", "a"));
        let Take::Soon(gone) = pools.take("f", "a") else { panic!("nothing on its way") };
        drop(gone);
        assert_eq!(pools.returned("f", "a", now(8)), None);
        assert_eq!(take(&pools, "a"), Some(8));
    }

    #[test]
    fn what_is_borrowed_comes_back_to_its_place() {
        let pools = Pools::default();
        let _ = pools.take("f", "a");
        for worker in [1, 2, 3] {
            put(&pools, "a", worker);
        }
        assert!(pools.borrow(Duration::from_secs(60), |_| true).is_empty());
        let mut borrowed = pools.borrow(Duration::ZERO, |&worker| worker < 3);
        assert_eq!(take(&pools, "a"), Some(3));
        let Take::Soon(mut soon) = pools.take("f", "a") else { panic!("two are on their way") };
        assert_eq!(pools.returned("f", "a", borrowed.pop()), None);
        assert_eq!(soon.try_recv(), Ok(2));
        put(&pools, "a", 4);
        assert_eq!(pools.returned("f", "a", borrowed.pop()), None);
        assert_eq!(
            pools.evict(|_| 0),
            Some(1),
            "it has been idle for longest, whatever was done to it"
        );
    }

    #[test]
    fn idle_time_and_unfitness_end_instances() {
        let pools = Pools::default();
        let _ = pools.take("f", "a");
        for worker in [1, 2, 3] {
            put(&pools, "a", worker);
        }
        assert_eq!(pools.expire(Duration::from_secs(60), |&worker| worker == 2, |_| 0), [2]);
        assert!(pools.expire(Duration::ZERO, |_| false, |_| 2).is_empty(), "those stay");
        assert!(pools.evict(|_| 2).is_none());
        assert_eq!(pools.expire(Duration::ZERO, |_| false, |_| 1), [1], "the oldest goes");
        assert_eq!(pools.expire(Duration::ZERO, |&worker| worker == 3, |_| 1), [3], "of no use");
        assert_eq!(put(&pools, "a", 4), None, "the pool is still there");
    }
}
