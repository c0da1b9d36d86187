//! Provisioned concurrency: instances that are thawed ahead and stay, so that requests up to that number
//! never wait for a start.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use firn::ShellClass;

use super::{Scheduler, StartKind};
use crate::{
    backend::{Backend, Machine},
    function::{Function, Version},
    prepare::Status,
};

/// Thaws ahead at once, of all functions: requests come first.
const AT_ONCE: usize = 2;

/// What is wanted of one version.
#[derive(Debug)]
struct Wanted {
    function: Arc<Function>,
    count: usize,
    /// Thaws that have begun.
    starting: usize,
    /// What the last thaw ended with, if that was an error.
    failure: Option<String>,
}

/// How many instances of which versions there should always be, by qualified name.
#[derive(Debug, Default)]
pub struct Provision(Mutex<HashMap<String, Wanted>>);

/// How far the instances of one version have come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provisioned {
    /// Instances that are there.
    pub allocated: u32,
    /// Why there are no more and no more to come.
    pub failure: Option<String>,
}

impl Provision {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Wanted>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on these are wanted of a function, and no others.
    pub fn set(&self, name: &str, wanted: &[(Arc<Function>, u32)]) {
        let mut all = self.lock();
        all.retain(|_, w| {
            w.function.name != name || wanted.iter().any(|(f, _)| f.version == w.function.version)
        });
        for (function, count) in wanted {
            let count = *count as usize;
            let new = || Wanted { function: function.clone(), count, starting: 0, failure: None };
            let wanted = all.entry(function.qualified_name()).or_insert_with(new);
            (wanted.count, wanted.failure) = (count, None);
        }
    }

    /// Nothing is wanted any more.
    pub fn clear(&self) {
        self.lock().clear();
    }

    /// Instances of a version, by its qualified name, that stay however long they are idle.
    pub fn floor(&self, key: &str) -> usize {
        self.lock().get(key).map_or(0, |wanted| wanted.count)
    }

    /// Picks versions that lack an instance, and counts each as starting.
    fn begin(&self, live: impl Fn(&Function) -> usize) -> Vec<Arc<Function>> {
        let mut all = self.lock();
        let mut free = AT_ONCE.saturating_sub(all.values().map(|w| w.starting).sum());
        let mut begun = Vec::new();
        for wanted in all.values_mut() {
            let missing = wanted.count.saturating_sub(live(&wanted.function) + wanted.starting);
            let now = missing.min(free);
            free -= now;
            wanted.starting += now;
            begun.extend(std::iter::repeat_n(wanted.function.clone(), now));
        }
        begun
    }

    fn ended(&self, key: &str, result: Result<(), String>) {
        if let Some(wanted) = self.lock().get_mut(key) {
            wanted.starting = wanted.starting.saturating_sub(1);
            wanted.failure = result.err();
        }
    }
}

impl<B: Backend> Scheduler<B> {
    /// How far the provisioned instances of a version have come; `None`: none are wanted.
    pub fn provisioned(&self, function: &Function) -> Option<Provisioned> {
        let key = function.qualified_name();
        let (count, failure) = {
            let all = self.provision.lock();
            let wanted = all.get(&key)?;
            (wanted.count, wanted.failure.clone())
        };
        let allocated = self.live(&function.name, function.version).min(count);
        let failure = match self.snapshot(function) {
            Status::Failed(reason) => Some(reason),
            _ => failure,
        };
        let allocated = u32::try_from(allocated).unwrap_or(u32::MAX);
        Some(Provisioned { allocated, failure })
    }

    /// Starts what is missing, a few at a time.
    pub(super) fn provide(self: &Arc<Self>) {
        for function in self.provision.begin(|f| self.live(&f.name, f.version)) {
            let scheduler = self.clone();
            tokio::spawn(async move {
                let key = function.qualified_name();
                let result = scheduler.thaw_ahead(&function).await;
                if let Err(reason) = &result {
                    tracing::warn!(function = key, reason, "a provisioned instance is missing");
                }
                scheduler.provision.ended(&key, result);
            });
        }
    }

    async fn thaw_ahead(&self, function: &Arc<Function>) -> Result<(), String> {
        let key = function.qualified_name();
        let fingerprint = function.fingerprint(&self.workshop.place);
        // Until the snapshot is there, there is nothing to thaw; if it has failed, its status says so.
        let Some(snapshot) = self.preparer.resident(&key, fingerprint) else { return Ok(()) };
        let class = ShellClass::for_memory(function.config.memory_mb);
        let starting = self.admission.admit(class.memory_mib);
        let _starting = starting.ok_or("the host has no memory or disk space for it")?;
        let (mut output, outlets) = self.workshop.output(function);
        let thaw = self.workshop.backend.thaw(&snapshot, None, outlets);
        let (mut machine, _) = output.during(thaw).await.map_err(|e| e.to_string())?;
        machine.pause().await.map_err(|e| e.to_string())?;
        let worker = self.register(machine, output, StartKind::Thaw, function, fingerprint, 0);
        let stale = match self.pools.returning(&key, fingerprint) {
            true => self.pools.returned(&key, fingerprint, Some((Instant::now(), worker))),
            false => Some(worker),
        };
        // The version was deleted meanwhile.
        if let Some(worker) = stale {
            self.retire(worker);
        }
        Ok(())
    }

    fn live(&self, name: &str, version: Version) -> usize {
        let instances = self.instances.lock().unwrap_or_else(PoisonError::into_inner);
        instances.values().filter(|i| i.function_name == name && i.version == version).count()
    }
}
