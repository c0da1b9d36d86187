//! What the runtime asks of the host's services, and tells its tracer.

use firn_proto::guest::{Answer, FromGuest, Segment};

use super::{Agent, AgentError, task::Task};

impl Agent {
    /// Passes calls on, as many as may be, if there is an order that they can belong to.
    pub(super) fn pass_calls_on(&mut self) -> Result<(), AgentError> {
        while self.task.is_some()
            && let Some(call) = self.calls.pass_on()
        {
            self.host.send(&FromGuest::Call(call))?;
        }
        Ok(())
    }

    /// The host has answered a call.
    pub(super) fn answered(&mut self, answer: Answer) -> Result<(), AgentError> {
        if let Some((connection, reply)) = self.calls.answered(answer)
            && let Some(runtime) = &mut self.runtime
        {
            runtime.server.reply(connection, reply);
        }
        match self.ending.take_if(|_| !self.calls.are_open()) {
            Some(answer) => self.answer(&answer),
            None => Ok(()),
        }
    }

    /// Takes segments from now on if the open invocation is traced.
    pub(super) fn trace(&mut self) {
        if let (Some(Task::Invoke(invocation)), Some(runtime)) = (&self.task, &mut self.runtime) {
            runtime.tracer.begin(&invocation.invoke.trace_id, &mut self.scratch);
        }
    }

    pub(super) fn pass_segments_on(&mut self) -> Result<(), AgentError> {
        if let Some(runtime) = &mut self.runtime {
            while let Some(document) = runtime.tracer.next(&mut self.scratch) {
                self.host.send(&FromGuest::Segment(Segment { document }))?;
            }
        }
        Ok(())
    }
}
