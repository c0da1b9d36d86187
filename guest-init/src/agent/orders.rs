//! The host's orders.

use std::time::{Duration, Instant};

use firn_proto::guest::{FromGuest, FunctionError, Invoke, Load, Loaded, Renew, ToGuest};

use super::{
    Agent, AgentError,
    task::{Invocation, Task, micros},
};
use crate::{host::HostError, runtime_api::State, tsc};

/// Longest limit that the host may set: Lambda's 15 minutes.
const MAX_TIMEOUT_MS: u64 = 900_000;

impl Agent {
    pub(super) fn begin(&mut self, frame: ToGuest) -> Result<(), AgentError> {
        match frame {
            ToGuest::Shutdown => Err(AgentError::Shutdown),
            ToGuest::Load(_) if self.frozen => Err(AgentError::Frozen("Load")),
            ToGuest::Invoke(_) if self.frozen => Err(AgentError::Frozen("Invoke")),
            ToGuest::Load(load) => self.begin_load(load),
            ToGuest::Freeze => self.freeze(),
            ToGuest::Renew(renew) => self.begin_renew(renew),
            ToGuest::Invoke(invoke) => self.begin_invoke(invoke),
            // `ToGuest` may grow; a host that speaks a newer version than Ready's is at fault.
            _ => Err(AgentError::Host(HostError::Codec(firn_proto::CodecError::Malformed(
                "a message of a later version".to_owned(),
            )))),
        }
    }

    fn begin_load(&mut self, load: Load) -> Result<(), AgentError> {
        let refused = if self.load.is_some() {
            Some("this guest already has a function".to_owned())
        } else {
            self.place.prepare(load.code, load.memory_bytes).err().map(|error| error.to_string())
        };
        if let Some(message) = refused {
            let error = Some(FunctionError::InvalidEntrypoint { message });
            return self.answer(&FromGuest::Loaded(Loaded { init_us: 0, error }));
        }
        let limit_ms = load.init_timeout_ms.min(MAX_TIMEOUT_MS);
        let deadline = Instant::now() + Duration::from_millis(limit_ms);
        self.load = Some(load);
        self.task = Some(Task::Load { deadline, limit_ms });
        self.start_runtime()
    }

    fn freeze(&mut self) -> Result<(), AgentError> {
        self.place.freeze(self.runtime.as_ref().map(|runtime| runtime.pid))?;
        self.drain()?;
        self.frozen = true;
        self.answer(&FromGuest::Frozen)
    }

    fn begin_renew(&mut self, message: Renew) -> Result<(), AgentError> {
        let start = Instant::now();
        self.place.renew(&message)?;
        let renew_us = micros(start);
        let since = Instant::now();
        let limit_ms = message.hook_timeout_ms.min(MAX_TIMEOUT_MS);
        let deadline = since + Duration::from_millis(limit_ms);
        let message = Box::new(message);
        self.task = Some(Task::Renew { deadline, limit_ms, since, message, renew_us });
        // Its answer before it runs: it finds it there instead of going to sleep once more.
        self.release();
        self.place.thaw(self.runtime.as_ref().map(|runtime| runtime.pid))?;
        self.frozen = false;
        match self.runtime.as_ref().map(|runtime| runtime.api.state()) {
            None | Some(State::Idle(_)) => self.close(None),
            Some(_) => Ok(()),
        }
    }

    fn begin_invoke(&mut self, invoke: Invoke) -> Result<(), AgentError> {
        let read_tsc = tsc();
        let limit_ms = invoke.timeout_ms.min(MAX_TIMEOUT_MS);
        self.task = Some(Task::Invoke(Box::new(Invocation {
            invoke,
            read_tsc,
            deadline: Instant::now() + Duration::from_millis(limit_ms),
            limit_ms,
            init: None,
            init_us: 0,
            handed_out: None,
            streamed: 0,
        })));
        self.trace();
        if self.runtime.is_none() {
            return self.start_runtime();
        }
        // Initialised for a snapshot that was never taken.
        self.release();
        self.hand_out();
        Ok(())
    }
}
