//! Why a request of the host's is not carried out.

use firn_proto::control::{Exit, Failure, FailureKind};

use crate::{machine::MachineRestoreError, memory::MemoryError, plan::PlanError};

/// Why a request was not carried out.
#[derive(Debug)]
pub enum RequestError {
    /// It failed and the VMM goes on.
    Refused(Failure),
    /// The guest ended meanwhile.
    Ended(Exit),
}

impl RequestError {
    /// A failure of `kind` with `message`.
    pub fn refused(kind: FailureKind, message: impl ToString) -> Self {
        Self::Refused(Failure { kind, message: message.to_string() })
    }
}

impl From<MemoryError> for RequestError {
    fn from(error: MemoryError) -> Self {
        let kind = match error {
            MemoryError::Size(_) => FailureKind::BadRequest,
            MemoryError::FileSize { .. } => FailureKind::SnapshotShape,
            _ => FailureKind::Io,
        };
        Self::refused(kind, error)
    }
}

impl From<PlanError> for RequestError {
    fn from(error: PlanError) -> Self {
        match error {
            PlanError::Malformed(_) => Self::refused(FailureKind::BadRequest, error),
            PlanError::Kernel { .. } => Self::refused(FailureKind::Io, error),
            PlanError::Memory(error) => error.into(),
        }
    }
}

impl From<MachineRestoreError> for RequestError {
    fn from(error: MachineRestoreError) -> Self {
        Self::refused(FailureKind::SnapshotShape, error)
    }
}

pub(super) fn kvm_error(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> RequestError {
    move |error| RequestError::refused(FailureKind::Kvm, format!("KVM {what}: {error}"))
}

pub(super) fn io_error(what: &'static str) -> impl FnOnce(std::io::Error) -> RequestError {
    move |error| RequestError::refused(FailureKind::Io, format!("{what}: {error}"))
}

pub(super) type Result<T> = std::result::Result<T, RequestError>;
