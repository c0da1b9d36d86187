//! The answers to the host's orders: each is the last thing that the host hears of its order.

use firn_proto::guest::{FromGuest, FunctionError, Outcome};

use super::{Agent, AgentError};

impl Agent {
    /// Closes the open task as failed.
    pub(super) fn fail(&mut self, error: FunctionError) -> Result<(), AgentError> {
        self.close(Some(Outcome::Error(error)))
    }

    /// Closes the open task: `None` is success where there is nothing to tell.
    pub(super) fn close(&mut self, outcome: Option<Outcome>) -> Result<(), AgentError> {
        let Some(task) = self.task.take() else { return Ok(()) };
        self.drain()?;
        if let Some(runtime) = &mut self.runtime {
            runtime.tracer.end();
        }
        self.end(task.answer(outcome, self.place.peak_memory()))
    }

    /// Answers the order whose task was closed, or has its calls end first.
    pub(super) fn end(&mut self, answer: FromGuest) -> Result<(), AgentError> {
        if !self.calls.are_open() {
            return self.answer(&answer);
        }
        self.ending = Some(answer);
        self.answer(&FromGuest::Abandon)
    }

    pub(super) fn answer(&mut self, answer: &FromGuest) -> Result<(), AgentError> {
        self.host.send(answer)?;
        Ok(self.host.flush()?)
    }

    /// Sends what the runtime has printed and told its tracer so far, to its last byte.
    pub(super) fn drain(&mut self) -> Result<(), AgentError> {
        self.pass_segments_on()?;
        let mut sent = Ok(());
        if let Some(runtime) = &mut self.runtime {
            for output in &mut runtime.outputs {
                output.drain(&mut self.scratch, |log| {
                    if sent.is_ok() {
                        sent = self.host.send(&FromGuest::Log(log));
                    }
                });
            }
        }
        Ok(sent?)
    }
}
