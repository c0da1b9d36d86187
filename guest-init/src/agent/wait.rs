//! Waiting for host, runtime, signals and time, and passing on what they bring.

use std::time::Instant;

use firn_proto::guest::FromGuest;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Agent, AgentError, task::Task};
use crate::{host::HostError, output::Output, server::ConnectionId};

/// Neither pipes nor streamed responses are read while more than this waits for the host.
const OUTPUT_LIMIT: usize = 256 * 1024;

/// What a polled descriptor is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source {
    Host,
    Signals,
    Pressure,
    Listener,
    Connection(ConnectionId),
    Output(usize),
    Tracer,
}

impl Agent {
    /// Waits until something happens or time is up: what happened.
    pub(super) fn wait(&self) -> Result<Vec<(Source, PollFlags)>, AgentError> {
        let mut sources = Vec::with_capacity(8);
        let mut fds = Vec::with_capacity(8);
        let mut add = |source, fd| {
            sources.push(source);
            fds.push(fd);
        };
        // A host that goes away is noticed at any time, its next frame only when it is its turn.
        let mut flags = PollFlags::RDHUP;
        flags.set(PollFlags::IN, self.listens());
        flags.set(PollFlags::OUT, self.host.queued() > 0);
        add(Source::Host, PollFd::from_borrowed_fd(self.host.fd(), flags));
        let mut end = None;
        if !self.frozen {
            end = self.task.as_ref().map(Task::deadline);
            if let Some(farewell) = self.farewell {
                end = Some(end.map_or(farewell, |end| end.min(farewell)));
            }
            let fd = PollFd::from_borrowed_fd(self.signals.fd(), PollFlags::IN);
            add(Source::Signals, fd);
            if let Some(fd) = self.place.pressure() {
                add(Source::Pressure, PollFd::from_borrowed_fd(fd, PollFlags::PRI));
            }
            if let Some(runtime) = &self.runtime {
                let fd = PollFd::from_borrowed_fd(runtime.server.fd(), PollFlags::IN);
                add(Source::Listener, fd);
                // Here back-pressure reaches the function: nobody reads its pipes and its response.
                let room = self.host.queued() < OUTPUT_LIMIT;
                for connection in runtime.server.connections() {
                    if connection.feeds_host() && !room {
                        continue;
                    }
                    let mut flags = PollFlags::RDHUP;
                    flags.set(PollFlags::IN, connection.wants_input());
                    flags.set(PollFlags::OUT, connection.has_output());
                    let fd = PollFd::from_borrowed_fd(connection.fd(), flags);
                    add(Source::Connection(connection.id()), fd);
                }
                if room {
                    if let Some(fd) = runtime.tracer.fd() {
                        add(Source::Tracer, PollFd::from_borrowed_fd(fd, PollFlags::IN));
                    }
                    for (index, fd) in runtime.outputs.iter().map(Output::fd).enumerate() {
                        if let Some(fd) = fd {
                            let fd = PollFd::from_borrowed_fd(fd, PollFlags::IN);
                            add(Source::Output(index), fd);
                        }
                    }
                }
            }
        }
        let timeout = end.map(|end| {
            let left = end.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(AgentError::Poll(error)),
        }
        let happened = fds.iter().map(PollFd::revents);
        Ok(sources.into_iter().zip(happened).filter(|(_, events)| !events.is_empty()).collect())
    }

    pub(super) fn serve(&mut self, source: Source, events: PollFlags) -> Result<(), AgentError> {
        let gone = events.intersects(PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR);
        match (source, &mut self.runtime) {
            // Without a task the next read finds the end, behind what was sent before it.
            (Source::Host, _) if gone && self.task.is_some() => {
                return Err(HostError::Closed.into());
            }
            (Source::Listener, Some(runtime)) => runtime.server.accept(&mut self.scratch),
            (Source::Connection(id), Some(runtime)) => {
                let alive = runtime.server.serve(id, &mut self.scratch, gone);
                if !alive {
                    runtime.api.closed(id);
                    self.calls.closed(id);
                }
            }
            (Source::Tracer, _) => self.pass_segments_on()?,
            (Source::Output(index), Some(runtime)) => {
                let mut sent = Ok(());
                if let Some(output) = runtime.outputs.get_mut(index) {
                    output.read(&mut self.scratch, |log| {
                        if sent.is_ok() {
                            sent = self.host.send(&FromGuest::Log(log));
                        }
                    });
                }
                sent?;
            }
            (Source::Signals, _) => self.signals.read(),
            // Its end is then reaped as any other.
            (Source::Pressure, Some(_)) if events.contains(PollFlags::PRI) => {
                self.place.kill_if_starved()?;
            }
            _ => {}
        }
        Ok(())
    }
}
