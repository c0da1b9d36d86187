//! What it takes to make an instance of a function: the parts that the scheduler (for requests)
//! and the preparer (for snapshots) share.

use std::{future::Future, sync::Arc, time::Duration};

use firn::{Disk, FunctionSpec, LogLine, Outlets};
use tokio::sync::mpsc;

use crate::{
    api::names::Place,
    backend::Backend,
    code::{CodeStore, LoadError},
    function::{Function, Layer},
    inside::Inside,
    logs,
    logs::Logs,
    metrics::Metrics,
    store::Store,
    traces::Traces,
};

/// Lines of output that may wait between a guest and its log. With [`firn::guest::MAX_LOG`] this
/// bounds what a flooding function can occupy.
const LINES: usize = 32;

/// Time that a function's initialisation may take, as in Lambda.
const INIT_TIMEOUT: Duration = Duration::from_secs(10);

/// Time after which what a running invocation has printed can be read.
const SHOWN: Duration = Duration::from_secs(1);

/// Backend, code and logs.
#[derive(Debug, Clone)]
pub struct Workshop<B> {
    /// What runs microVMs.
    pub backend: B,
    /// What ARNs say.
    pub place: Place,
    /// Functions and layers.
    pub store: Arc<Store>,
    /// Their code.
    pub code: CodeStore,
    /// Functions' logs.
    pub logs: Logs,
    /// Counts what happens.
    pub metrics: Metrics,
    /// Traces invocations.
    pub traces: Traces,
    /// What functions ask of the daemon.
    pub inside: Inside,
    /// Multiplies the time for initialisation on slow machines.
    pub patience: u32,
}

/// The log of an instance and the channel through which its output arrives.
#[derive(Debug)]
pub struct Output {
    /// The log.
    pub stream: logs::Stream,
    lines: mpsc::Receiver<LogLine>,
}

impl Output {
    /// Does `work` and writes down meanwhile what the instance prints; returns when `work` is done
    /// and everything that came before is in the log.
    pub async fn during<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        let mut show = tokio::time::Instant::now() + SHOWN;
        let result = loop {
            // All are polled in turn: a flood must not starve the work, nor the work the log.
            tokio::select! {
                result = &mut work => break result,
                Some(line) = self.lines.recv() => self.stream.output(&line).await,
                () = tokio::time::sleep_until(show), if self.stream.is_pending() => {
                    self.stream.flush().await;
                    show = tokio::time::Instant::now() + SHOWN;
                }
            }
        };
        self.drain().await;
        result
    }

    /// Writes down what has arrived.
    pub async fn drain(&mut self) {
        // At most what the channel holds: a flood goes on for ever.
        for _ in 0..LINES {
            match self.lines.try_recv() {
                Ok(line) => self.stream.output(&line).await,
                Err(_) => return,
            }
        }
    }
}

impl<B: Backend> Workshop<B> {
    /// A log for a new instance of `function`, and where what comes out of that goes.
    pub fn output(&self, function: &Function) -> (Output, Outlets) {
        let (sink, lines) = mpsc::channel(LINES);
        let output = Output { stream: self.logs.stream(&function.name, function.version), lines };
        let services = Some(self.inside.services(function));
        (output, Outlets { log: Some(sink), services })
    }

    /// The function's code and layers as a disk.
    ///
    /// # Errors
    /// In plain words.
    pub async fn disk(&self, function: &Function) -> Result<Disk, String> {
        let (workshop, function) = (self.clone(), function.clone());
        let open = move || {
            workshop.code.disk(&function, |zip| {
                let layers = layers(&workshop.store, &workshop.code, &function.config.layers)?;
                Ok(workshop.backend.build_disk(zip, &layers)?)
            })
        };
        let opened = tokio::task::spawn_blocking(open).await.map_err(|e| e.to_string())?;
        opened.map_err(|e| e.to_string())
    }

    /// What to load into an instance.
    pub fn spec(
        &self,
        function: &Function,
        code: Disk,
        initialization: &str,
        output: &Output,
        outlets: Outlets,
    ) -> FunctionSpec {
        FunctionSpec {
            environment: function.environment(&self.place, initialization, output.stream.name()),
            memory_mb: function.config.memory_mb,
            init_timeout: INIT_TIMEOUT * self.patience,
            code: Some(code),
            endpoints: Inside::endpoints(),
            outlets,
        }
    }
}

/// The archives of layers. Blocks.
///
/// # Errors
/// Any [`LoadError`].
pub fn layers(
    store: &Store,
    code: &CodeStore,
    layers: &[Layer],
) -> Result<Vec<Vec<u8>>, LoadError> {
    let archive = |layer: &Layer| {
        let Layer { name, version, .. } = layer;
        let missing = || LoadError::Layer { name: name.clone(), version: *version };
        store.layer(name, *version).ok_or_else(missing)?.archive(code)
    };
    layers.iter().map(archive).collect()
}
