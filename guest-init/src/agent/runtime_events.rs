//! What the runtime does: it asks for events, answers them, and ends.

use std::time::{Duration, Instant};

use firn_proto::guest::{self, Begin, Chunk, FromGuest, FunctionError};
use rustix::process::{Pid, WaitStatus};

use super::{
    Agent, AgentError,
    task::{Task, micros},
};
use crate::{
    calls,
    http::{Fields, Request},
    place::reap,
    runtime::{Runtime, describe},
    runtime_api::{Event, State, event_reply, truncated},
    server::{ConnectionId, Incoming, Reply},
};

/// How long a runtime that reported its failure may take to end.
const FAREWELL: Duration = Duration::from_secs(1);

impl Agent {
    pub(super) fn incoming(
        &mut self,
        from: ConnectionId,
        incoming: Incoming,
    ) -> Result<(), AgentError> {
        match incoming {
            Incoming::Request(request) => self.request(from, request),
            Incoming::Head(head) => {
                let Some(runtime) = &mut self.runtime else { return Ok(()) };
                match runtime.api.begin(from, &head) {
                    Ok(content_type) => {
                        self.host.send(&FromGuest::Begin(Begin { content_type }))?;
                    }
                    Err(reply) => runtime.server.refuse(from, reply),
                }
                Ok(())
            }
            Incoming::Piece { bytes, end } => self.piece(from, bytes, end),
        }
    }

    /// More of the response that is being streamed.
    fn piece(
        &mut self,
        from: ConnectionId,
        payload: Vec<u8>,
        end: Option<Fields>,
    ) -> Result<(), AgentError> {
        let (Some(Task::Invoke(invocation)), Some(runtime)) = (&mut self.task, &mut self.runtime)
        else {
            return Ok(());
        };
        invocation.streamed += payload.len() as u64;
        if invocation.streamed > guest::MAX_STREAM {
            let (reply, outcome) = runtime.api.cut(invocation.streamed);
            match end {
                Some(_) => runtime.server.reply(from, reply),
                None => runtime.server.refuse(from, reply),
            }
            return self.close(Some(outcome));
        }
        if !payload.is_empty() {
            self.host.send(&FromGuest::Chunk(Chunk { payload }))?;
        }
        let Some(trailers) = end else { return Ok(()) };
        let (reply, outcome) = runtime.api.end(&trailers);
        // The host's answer first: somebody waits for it.
        self.close(Some(outcome))?;
        if let Some(runtime) = &mut self.runtime {
            runtime.server.reply(from, reply);
        }
        Ok(())
    }

    fn request(&mut self, from: ConnectionId, request: Request) -> Result<(), AgentError> {
        let Some(runtime) = &mut self.runtime else { return Ok(()) };
        if let Some(token) = runtime.token.as_ref().filter(|_| calls::is_call(&request.path)) {
            match calls::judge(request, token) {
                Ok(ask) => self.calls.park(from, ask),
                Err(reply) => runtime.server.reply(from, reply),
            }
            return Ok(());
        }
        let (reply, event) = runtime.api.handle(from, request);
        // The host's answer first: somebody waits for it.
        match event {
            None => {}
            Some(Event::AsksForEvent) => match &self.task {
                // It had the event already and answered with half a response.
                Some(Task::Invoke(invocation)) if invocation.handed_out.is_some() => {
                    self.fail(truncated())?;
                }
                Some(Task::Invoke(_)) => self.hand_out(),
                Some(Task::Load { .. } | Task::Renew { .. }) => self.close(None)?,
                None => {}
            },
            Some(Event::AsksForRestore) => match &self.task {
                Some(Task::Load { .. }) if self.load.as_ref().is_some_and(|l| l.snapshot) => {
                    self.close(None)?;
                }
                _ => self.release(),
            },
            Some(Event::Answered(outcome)) => self.close(Some(outcome))?,
            Some(Event::Failed) => self.farewell = Some(Instant::now() + FAREWELL),
        }
        if let (Some(reply), Some(runtime)) = (reply, &mut self.runtime) {
            runtime.server.reply(from, reply);
        }
        Ok(())
    }

    /// Gives the open invocation to the runtime, if it waits for one.
    pub(super) fn hand_out(&mut self) {
        let (Some(Task::Invoke(invocation)), Some(runtime)) = (&mut self.task, &mut self.runtime)
        else {
            return;
        };
        // An event that is written to nobody would be lost, and its deadline would pass.
        if let State::Idle(connection) = *runtime.api.state()
            && runtime.server.lost(connection)
        {
            runtime.api.closed(connection);
        }
        if let Some(connection) = runtime.api.hand_out(&invocation.invoke.request_id) {
            if let Some(init) = invocation.init {
                invocation.init_us = micros(init);
            }
            invocation.handed_out = Some(Instant::now());
            runtime.server.reply(connection, event_reply(&mut invocation.invoke));
        }
    }

    /// Lets a runtime that waits to be restored go on.
    pub(super) fn release(&mut self) {
        if let Some(runtime) = &mut self.runtime
            && let Some(connection) = runtime.api.release()
        {
            runtime.server.reply(connection, Reply::ok());
        }
    }

    pub(super) fn start_runtime(&mut self) -> Result<(), AgentError> {
        if let Some(Task::Invoke(invocation)) = &mut self.task {
            invocation.init = Some(Instant::now());
        }
        let started = match &self.load {
            Some(load) => Runtime::start(&self.place, load).map_err(|error| error.to_string()),
            None => Err("this guest has no function yet".to_owned()),
        };
        match started {
            Ok(runtime) => {
                self.runtime = Some(runtime);
                self.trace();
                Ok(())
            }
            Err(message) => self.fail(FunctionError::InvalidEntrypoint { message }),
        }
    }

    /// Reaps; if the runtime itself has ended, deals with that.
    pub(super) fn reap(&mut self) -> Result<(), AgentError> {
        let mut ended: Vec<(Pid, WaitStatus)> = Vec::new();
        reap(|pid, status| ended.push((pid, status)));
        let runtime = self.runtime.as_ref().map(|runtime| runtime.pid);
        match ended.into_iter().find(|(pid, _)| Some(*pid) == runtime) {
            Some((_, status)) => self.runtime_ended(status),
            None => Ok(()),
        }
    }

    fn runtime_ended(&mut self, status: WaitStatus) -> Result<(), AgentError> {
        // What it said before it ended still counts. Its children end first, or there might be no
        // end to what is said.
        if let Some(runtime) = &self.runtime {
            self.place.kill(runtime.pid)?;
        }
        while let Some(runtime) = &mut self.runtime {
            runtime.server.accept(&mut self.scratch);
            let open: Vec<_> = runtime.server.connections().iter().map(|c| c.id()).collect();
            for id in open {
                if !runtime.server.serve(id, &mut self.scratch, false) {
                    runtime.api.closed(id);
                    self.calls.closed(id);
                }
            }
            match runtime.server.incoming() {
                Some((connection, incoming)) => self.incoming(connection, incoming)?,
                None if runtime.server.has_input() => {}
                None => break,
            }
        }
        self.over(FunctionError::Exited { status: describe(status) })
    }

    pub(super) fn time_out(&mut self, limit_ms: u64) -> Result<(), AgentError> {
        self.over(FunctionError::TimedOut { limit_ms })
    }

    pub(super) fn stop_runtime(&mut self, why: &str) -> Result<(), AgentError> {
        self.over(FunctionError::Exited { status: why.to_owned() })
    }

    /// The runtime has ended or must end, for this reason if it gave none itself.
    fn over(&mut self, reason: FunctionError) -> Result<(), AgentError> {
        self.farewell = None;
        if let Some(runtime) = &self.runtime {
            self.place.kill(runtime.pid)?;
        }
        self.drain()?;
        let Some(runtime) = self.runtime.take() else { return self.fail(reason) };
        let given = match runtime.api.state() {
            State::Failed(error) => Some(error.clone()),
            _ => None,
        };
        // Its listener goes with it: the next runtime's takes the same port.
        drop(runtime);
        self.calls.all_closed();
        let timed_out = matches!(reason, FunctionError::TimedOut { .. });
        match &self.task {
            // It ended before it got the event, and not for its sake: the event is still whole.
            Some(Task::Invoke(invocation))
                if invocation.handed_out.is_none() && invocation.init.is_none() && !timed_out =>
            {
                self.start_runtime()
            }
            _ => self.fail(given.unwrap_or(reason)),
        }
    }
}
