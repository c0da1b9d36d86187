//! One machine's microVMs: the pool of shells, and the book of everything that lives.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    ops::Range,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;

use crate::{
    HostConfig, Image, ImageError, Instance, OpenError, Phases, Shell, ShellClass, ShellError,
    artifacts::Artifacts,
    cgroup::Cgroups,
    keys::{KeyService, LocalKeyFile},
    open::{self, State},
    shell,
};

/// How long [`Host::shutdown`] waits for what it has killed, before patience.
const SHUTDOWN: Duration = Duration::from_secs(10);

/// Thaws of a class whose need of huge pages its next shells provide for.
const RECENT: usize = 16;

/// Makes and keeps microVMs. Cheap to clone; call [`Host::shutdown`] before the process ends.
#[derive(Debug, Clone)]
pub struct Host(Arc<Handle>);

/// What clones of [`Host`] share. Background work holds [`Inner`] only, so that the pool dies with
/// the last `Host`, also without a shutdown.
#[derive(Debug)]
struct Handle(Arc<Inner>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// The host itself.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) config: HostConfig,
    pub(crate) artifacts: Artifacts,
    pub(crate) cgroups: Option<Cgroups>,
    pub(crate) state: State,
    pub(crate) keys: Arc<dyn KeyService>,
    pub(crate) uids: Arc<Uids>,
    pub(crate) live: Live,
    pool: Mutex<HashMap<ShellClass, Pool>>,
    /// Regions that the last [`RECENT`] thaws of each class have copied.
    copied: Mutex<HashMap<ShellClass, VecDeque<u16>>>,
    closed: AtomicBool,
    names: AtomicU64,
    raised_again: AtomicU64,
}

#[derive(Debug, Default)]
struct Pool {
    ready: VecDeque<Shell>,
    /// Shells that are being made for it.
    filling: usize,
}

/// Nothing that is done under a lock here can leave it half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Host {
    /// Checks the installation and the machine, removes what an earlier life has left, and opens.
    ///
    /// # Errors
    /// Any [`OpenError`].
    pub async fn open(config: HostConfig) -> Result<Self, OpenError> {
        let opening = tokio::task::spawn_blocking(move || {
            let artifacts = Artifacts::open(&config.artifacts, &config.state)?;
            open::check_config(&config)?;
            open::check_user(&artifacts)?;
            let state = State::open(&config.state)?;
            let keys = match &config.keys {
                Some(keys) => keys.clone(),
                None => Arc::new(LocalKeyFile::open_or_create(&config.state.join("master.key"))?),
            };
            let cgroups = open::open_cgroups(&config, &state)?;
            let inner = Inner {
                uids: Arc::new(Uids::new(config.uids.clone())),
                artifacts,
                cgroups,
                state,
                keys,
                live: Live::default(),
                pool: Mutex::default(),
                copied: Mutex::default(),
                closed: AtomicBool::new(false),
                names: AtomicU64::new(0),
                raised_again: AtomicU64::new(0),
                config,
            };
            Ok(Self(Arc::new(Handle(Arc::new(inner)))))
        });
        opening.await.unwrap_or_else(|e| {
            Err(OpenError::Io { path: "opening".into(), source: std::io::Error::other(e) })
        })
    }

    /// The image of `runtime`.
    ///
    /// # Errors
    /// [`ImageError::Unknown`].
    pub fn image(&self, runtime: &str) -> Result<Image, ImageError> {
        self.inner().artifacts.images.get(runtime).cloned().ok_or_else(|| ImageError::Unknown {
            runtime: runtime.to_owned(),
            installed: self.images(),
        })
    }

    /// Names of all runtimes, sorted.
    pub fn images(&self) -> Vec<String> {
        self.inner().artifacts.images.keys().cloned().collect()
    }

    /// How many interrupts were raised again since this host was opened, because a guest had not
    /// acknowledged them though it ran. Any one of them is a fault of the machine's KVM, of a guest,
    /// or of ours.
    pub fn interrupts_raised_again(&self) -> u64 {
        self.inner().raised_again.load(Ordering::Relaxed)
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.0.0
    }

    /// A shell from the pool, or a new one. The pool is refilled in the background.
    ///
    /// # Errors
    /// Any [`ShellError`].
    pub async fn shell(&self, class: ShellClass) -> Result<Shell, ShellError> {
        let (shell, _refill) = self.inner().claim(class).await?;
        Ok(shell)
    }

    /// Fills the pool of `class` and waits for it.
    ///
    /// # Errors
    /// Any [`ShellError`].
    pub async fn prepare(&self, class: ShellClass) -> Result<(), ShellError> {
        self.stock(class, self.inner().config.shells).await
    }

    /// Fills the pool of `class` up to `count` shells, once: what is taken from it beyond
    /// [`HostConfig::shells`] does not come back.
    ///
    /// # Errors
    /// Any [`ShellError`].
    pub async fn stock(&self, class: ShellClass, count: usize) -> Result<(), ShellError> {
        let inner = self.inner();
        while lock(&inner.pool).entry(class).or_default().ready.len() < count {
            inner.put(shell::spawn(inner, class).await?)?;
        }
        Ok(())
    }

    /// Kills a shell and waits until nothing of it is left: `reaped` (its process), `gone` (its
    /// control group, its place in the book).
    pub async fn end_shell(&self, shell: Shell) -> Phases {
        shell.vm.end(self.inner()).await
    }

    /// Kills an instance and waits until nothing of it is left, as [`Host::end_shell`] does.
    pub async fn end(&self, instance: Instance) -> Phases {
        instance.vm.end(self.inner()).await
    }

    /// Kills everything and waits until nothing is left, ten seconds (times patience) at most. What a
    /// kernel has not ended by then the next start removes. Later calls fail with [`ShellError::Closed`].
    pub async fn shutdown(&self) {
        let inner = self.inner().clone();
        inner.close();
        inner.live.kill_all();
        let limit = SHUTDOWN * inner.config.patience;
        if tokio::time::timeout(limit, inner.live.wait_until_empty()).await.is_err() {
            tracing::warn!("VMMs that were killed {limit:?} ago have not ended");
        }
        let sweeping = tokio::task::spawn_blocking(move || {
            if let Some(cgroups) = &inner.cgroups {
                cgroups.remove();
            }
            inner.state.close();
        });
        let _ = sweeping.await;
    }
}

impl Inner {
    /// So many interrupts were raised again in this VM.
    pub(crate) fn raised_again(&self, vm: &str, count: u64) {
        if count > 0 {
            tracing::warn!(
                vm,
                count,
                "interrupts that a guest had not acknowledged were raised again"
            );
            self.raised_again.fetch_add(count, Ordering::Relaxed);
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// No more shells; those in the pool die.
    fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        let pool = std::mem::take(&mut *lock(&self.pool));
        drop(pool);
    }

    /// A name for a VM, unique in this life.
    pub(crate) fn next_name(&self) -> String {
        format!("vm-{}", self.names.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Takes a shell from the pool, or makes one. The pool is refilled when the guard is dropped:
    /// after the start that the shell is for, not beside it.
    pub(crate) async fn claim(
        self: &Arc<Self>,
        class: ShellClass,
    ) -> Result<(Shell, Refill), ShellError> {
        if self.is_closed() {
            return Err(ShellError::Closed);
        }
        let refill = Refill { inner: self.clone(), class };
        loop {
            let ready = lock(&self.pool).entry(class).or_default().ready.pop_front();
            match ready {
                Some(shell) if shell.is_alive() => return Ok((shell, refill)),
                Some(dead) => tracing::warn!(vm = dead.vm.name, "a waiting shell had ended"),
                None => return Ok((shell::spawn(self, class).await?, refill)),
            }
        }
    }

    /// How many huge pages a new shell of `class` keeps in reserve: as many as a thaw is known to
    /// need, so that a class whose functions write little stays small.
    pub(crate) fn spares(&self, class: ShellClass) -> u16 {
        let copied = lock(&self.copied);
        let wanted = copied.get(&class).and_then(|recent| recent.iter().max().copied());
        wanted.unwrap_or_default().min(self.config.spare_pages)
    }

    /// A thaw of `class` copies so many regions.
    pub(crate) fn copies(&self, class: ShellClass, regions: u16) {
        let mut copied = lock(&self.copied);
        let recent = copied.entry(class).or_default();
        if recent.len() == RECENT {
            recent.pop_front();
        }
        recent.push_back(regions);
    }

    fn put(&self, shell: Shell) -> Result<(), ShellError> {
        let mut pool = lock(&self.pool);
        // Under the lock, because close() empties the pool under it.
        if self.is_closed() {
            return Err(ShellError::Closed);
        }
        pool.entry(shell.class()).or_default().ready.push_back(shell);
        Ok(())
    }

    fn refill(self: &Arc<Self>, class: ShellClass) {
        if self.is_closed() || tokio::runtime::Handle::try_current().is_err() {
            return;
        }
        let missing = {
            let mut pool = lock(&self.pool);
            let pool = pool.entry(class).or_default();
            let missing = self.config.shells.saturating_sub(pool.ready.len() + pool.filling);
            pool.filling += missing;
            missing
        };
        if missing == 0 {
            return;
        }
        let inner = self.clone();
        tokio::spawn(async move {
            for _ in 0..missing {
                let made = match inner.is_closed() {
                    true => Err(ShellError::Closed),
                    false => shell::spawn(&inner, class).await,
                };
                let put = made.and_then(|shell| inner.put(shell));
                if let Some(pool) = lock(&inner.pool).get_mut(&class) {
                    pool.filling = pool.filling.saturating_sub(1);
                }
                match put {
                    Ok(()) | Err(ShellError::Closed) => {}
                    Err(error) => tracing::warn!(%error, ?class, "can't make a shell"),
                }
            }
        });
    }
}

/// Refills a pool when it is dropped.
#[derive(Debug)]
pub(crate) struct Refill {
    inner: Arc<Inner>,
    class: ShellClass,
}

impl Drop for Refill {
    fn drop(&mut self) {
        self.inner.refill(self.class);
    }
}

/// Users for VMMs.
#[derive(Debug)]
pub(crate) struct Uids {
    range: Range<u32>,
    taken: Mutex<(u32, HashSet<u32>)>,
}

/// A user id that is given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Uid {
    id: u32,
    uids: Option<Arc<Uids>>,
}

impl Uids {
    fn new(range: Range<u32>) -> Self {
        Self { taken: Mutex::new((range.start, HashSet::new())), range }
    }

    /// The free id that has been free the longest, more or less.
    pub(crate) fn take(self: &Arc<Self>) -> Option<Uid> {
        let mut taken = lock(&self.taken);
        if taken.1.len() >= self.range.len() {
            return None;
        }
        loop {
            let id = taken.0;
            taken.0 = if id + 1 < self.range.end { id + 1 } else { self.range.start };
            if taken.1.insert(id) {
                return Some(Uid { id, uids: Some(self.clone()) });
            }
        }
    }
}

impl Uid {
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// Never gives it back.
    pub(crate) fn keep(mut self) {
        self.uids = None;
    }
}

impl Drop for Uid {
    fn drop(&mut self) {
        if let Some(uids) = &self.uids {
            lock(&uids.taken).1.remove(&self.id);
        }
    }
}

/// The VMMs that live, or have not been cleaned up after, or are being launched.
#[derive(Debug)]
pub(crate) struct Live {
    processes: Mutex<HashMap<u32, Arc<OwnedFd>>>,
    /// Processes and launches.
    count: watch::Sender<usize>,
}

/// A launch that is under way; a shutdown waits for it.
#[derive(Debug)]
pub(crate) struct Launching<'a>(&'a Live);

impl Drop for Launching<'_> {
    fn drop(&mut self) {
        self.0.count.send_modify(|count| *count -= 1);
    }
}

impl Default for Live {
    fn default() -> Self {
        Self { processes: Mutex::default(), count: watch::Sender::new(0) }
    }
}

impl Live {
    /// Begins a launch, unless the host is `closed`. The order matters: a shutdown closes first and
    /// then waits, so that it either is seen here or sees this.
    pub(crate) fn launching(&self, closed: impl FnOnce() -> bool) -> Option<Launching<'_>> {
        self.count.send_modify(|count| *count += 1);
        let launching = Launching(self);
        (!closed()).then_some(launching)
    }

    pub(crate) fn add(&self, pid: u32, pidfd: Arc<OwnedFd>) {
        lock(&self.processes).insert(pid, pidfd);
        self.count.send_modify(|count| *count += 1);
    }

    pub(crate) fn remove(&self, pid: u32) {
        lock(&self.processes).remove(&pid);
        self.count.send_modify(|count| *count -= 1);
    }

    fn kill_all(&self) {
        for pidfd in lock(&self.processes).values() {
            let _ = rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL);
        }
    }

    /// Waits until the VMM `pid` has been cleaned up after.
    pub(crate) async fn wait_until_gone(&self, pid: u32) {
        let gone = |_: &usize| !lock(&self.processes).contains_key(&pid);
        // Fails only if the sender is gone, and we hold it.
        let _ = self.count.subscribe().wait_for(gone).await;
    }

    async fn wait_until_empty(&self) {
        // Fails only if the sender is gone, and we hold it.
        let _ = self.count.subscribe().wait_for(|count| *count == 0).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_ids_are_taken_once_and_come_back() {
        let uids = Arc::new(Uids::new(70_000..70_003));
        let first = uids.take().unwrap();
        let (second, third) = (uids.take().unwrap(), uids.take().unwrap());
        assert_eq!([first.id(), second.id(), third.id()], [70_000, 70_001, 70_002]);
        assert!(uids.take().is_none());
        drop(second);
        assert_eq!(uids.take().unwrap().id(), 70_001);
        third.keep();
        drop(first);
        let again = uids.take().unwrap();
        assert_eq!(again.id(), 70_000);
        assert_eq!(uids.take().map(|u| u.id()), Some(70_001));
    }
}
