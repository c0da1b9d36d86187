//! Code that lies in a bucket: `S3Bucket`, `S3Key`, `S3ObjectVersion`.
//!
//! It is read with the daemon's credentials, so where callers are known they must be allowed to read it
//! themselves.

use firn::code::{CodeError, MAX_UNZIPPED};

use super::{App, error::ApiError, functions::code_error, gate::Session, validate::Violations};
use crate::{
    aws::{AwsError, is_bucket},
    backend::Backend,
};

/// An object. Blocks.
///
/// # Errors
/// As Lambda words them.
pub fn object<B: Backend>(
    app: &App<B>,
    session: &Session,
    bucket: &str,
    key: &str,
    version: Option<&str>,
) -> Result<Vec<u8>, ApiError> {
    let mut found = Violations::default();
    for (member, value) in [("s3Key", Some(key)), ("s3ObjectVersion", version)] {
        if let Some(value) = value.filter(|value| !(1..=1024).contains(&value.len())) {
            found.add(member, value, "Member must have length between 1 and 1024");
        }
    }
    let pattern = "[0-9A-Za-z\\.\\-_]*(?<!\\.), with 3 to 63 characters";
    found.pattern("s3Bucket", Some(bucket), is_bucket, pattern);
    found.check()?;
    // Something on the way to a bucket might take them for another one, which nobody was asked about.
    if key.split('/').any(|part| matches!(part, "." | "..")) {
        return Err(ApiError::InvalidParameterValue(format!(
            "Firn does not support keys with the parts '.' or '..', as in {key}."
        )));
    }
    let action = if version.is_some() { "s3:GetObjectVersion" } else { "s3:GetObject" };
    session.may(action, &format!("arn:aws:s3:::{bucket}/{key}"))?;
    // An archive may be larger here than in a request: what it unpacks to is the limit.
    let get = app.aws.get_object(bucket, key, version, MAX_UNZIPPED);
    tokio::runtime::Handle::current().block_on(get).map_err(|error| refusal(error, bucket, key))
}

fn refusal(error: AwsError, bucket: &str, key: &str) -> ApiError {
    match error {
        AwsError::NoCredentials(_) => ApiError::InvalidParameterValue(format!(
            "S3Bucket and S3Key can't be used: {error}. Or use ZipFile."
        )),
        AwsError::TooLarge { limit } => code_error(CodeError::UnzippedTooLarge { limit }),
        AwsError::Refused { status, code, message, .. } if status.as_u16() == 403 => {
            ApiError::AccessDenied(format!(
                "Your access has been denied by S3, please make sure your request credentials have \
                 permission to GetObject for {bucket}/{key}. S3 Error Code: {code}. S3 Error Message: \
                 {message}"
            ))
        }
        // A redirection says that the bucket is in another region.
        AwsError::Refused { status, code, message, .. }
            if status.is_client_error() || status.is_redirection() =>
        {
            ApiError::InvalidParameterValue(format!(
                "Error occurred while GetObject. S3 Error Code: {code}. S3 Error Message: {message}"
            ))
        }
        error => ApiError::Service(format!("Error occurred while GetObject. {error}")),
    }
}
