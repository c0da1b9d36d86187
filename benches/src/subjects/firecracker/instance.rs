//! One microVM under Firecracker that has answered.

use std::rc::Rc;

use async_trait::async_trait;
use serde_json::json;

use super::{
    Shared,
    process::{Api, Process as Monitor},
    request_id,
};
use crate::{
    clock::now_ns,
    error::Result,
    frames::{self, Frames},
    subject::{Counters, Running, Trip, stamp},
};

/// One microVM.
#[derive(Debug)]
pub(super) struct FirecrackerInstance {
    pub(super) shared: Rc<Shared>,
    pub(super) monitor: Monitor,
    pub(super) api: Option<Api>,
    pub(super) guest: Frames,
    pub(super) paused: bool,
    pub(super) memory_bytes: u64,
}

impl FirecrackerInstance {
    async fn set_state(&mut self, state: &str) -> Result<()> {
        if self.api.is_none() {
            self.api = Some(self.shared.api(&self.monitor).await?);
        }
        match &mut self.api {
            Some(api) => api.call("PATCH", "/vm", &json!({ "state": state })).await,
            None => Ok(()),
        }
    }
}

#[async_trait(?Send)]
impl Running for FirecrackerInstance {
    async fn invoke(&mut self, event: &[u8]) -> Result<Trip> {
        let request_id = request_id(self.shared.number());
        let mut trip = Trip { start_ns: now_ns(), ..Trip::default() };
        if std::mem::take(&mut self.paused) {
            self.set_state("Resumed").await?;
        }
        let invoke = frames::invoke(request_id.clone(), event, self.shared.limit());
        self.guest.send(&[invoke]).await?;
        let done = self.guest.done(&request_id).await?;
        trip.end_ns = now_ns();
        trip.figures.insert("handler_us", done.duration_us as f64);
        Ok(trip)
    }

    async fn pause(&mut self) -> Result<()> {
        self.set_state("Paused").await?;
        self.paused = true;
        Ok(())
    }

    /// It counts exits only in files that it writes once a minute; none are read here.
    async fn counters(&mut self) -> Result<Counters> {
        Ok(Counters::default())
    }

    fn pid(&self) -> u32 {
        self.monitor.pid()
    }

    fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    async fn end(mut self: Box<Self>) -> Result<Trip> {
        let start_ns = now_ns();
        let reaped = self.monitor.kill()?;
        drop(self);
        let mut trip = Trip { start_ns, end_ns: now_ns(), ..Trip::default() };
        trip.stamp(stamp::REAPED, Some(reaped));
        Ok(trip)
    }
}
