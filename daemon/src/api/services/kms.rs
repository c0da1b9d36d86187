//! KMS: symmetric keys of the installation, and what is encrypted with them.
//!
//! Follows the *AWS Key Management Service API Reference* for the operations in [`call`]. What may be done
//! with a key only policies of users and roles say: there are no key policies and no grants, and requests
//! that bring one are refused.

use std::sync::Arc;

use base64::{Engine, engine::general_purpose::STANDARD};
use firn::keys::Key;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::ServiceError;
use crate::{
    api::{App, blocking, error::violation, gate::Session, names::Place},
    backend::Backend,
    function::now_ms,
    identity::policy::Context,
    kms::{self, Alias, EncryptionContext, KmsKey, MAX_ALIASES, MAX_KEYS, State},
    store::{KmsKeys, Store, StoreError},
};

/// The one algorithm.
const ALGORITHM: &str = "SYMMETRIC_DEFAULT";

/// Most bytes that Encrypt takes.
const MAX_PLAIN: usize = 4096;

/// Most bytes of a ciphertext blob.
const MAX_BLOB: usize = 6144;

/// Most bytes of an encryption context, names and values.
const MAX_CONTEXT: usize = 8192;

/// Keys or aliases in a page, unless the caller says otherwise.
const PAGE: usize = 100;

const DAY_MS: i64 = 86_400_000;

/// Does one operation.
pub async fn call<B: Backend>(
    app: &Arc<App<B>>,
    session: &Session,
    operation: &str,
    input: Value,
) -> Result<Value, ServiceError> {
    let (store, place) = (app.store.clone(), app.place.clone());
    let kms = Kms { store, place, session: session.clone() };
    match operation {
        "Encrypt" => kms.encrypt(parse(input)?),
        "Decrypt" => kms.decrypt(parse(input)?),
        "ReEncrypt" => kms.re_encrypt(parse(input)?),
        "GenerateDataKey" => kms.generate_data_key("GenerateDataKey", parse(input)?),
        "GenerateDataKeyWithoutPlaintext" => {
            let mut output =
                kms.generate_data_key("GenerateDataKeyWithoutPlaintext", parse(input)?)?;
            if let Some(members) = output.as_object_mut() {
                members.remove("Plaintext");
            }
            Ok(output)
        }
        "GenerateRandom" => kms.generate_random(&parse(input)?),
        "DescribeKey" => kms.describe_key(&parse(input)?),
        "ListKeys" => kms.list_keys(&parse(input)?),
        "ListAliases" => kms.list_aliases(&parse(input)?),
        "CreateKey" => kms.change(parse(input)?, Kms::create_key).await,
        "UpdateKeyDescription" => kms.change(parse(input)?, Kms::update_description).await,
        "EnableKey" => kms.change(parse(input)?, |kms, i| kms.set(i, true)).await,
        "DisableKey" => kms.change(parse(input)?, |kms, i| kms.set(i, false)).await,
        "ScheduleKeyDeletion" => kms.change(parse(input)?, Kms::schedule_deletion).await,
        "CancelKeyDeletion" => kms.change(parse(input)?, Kms::cancel_deletion).await,
        "CreateAlias" => kms.change(parse(input)?, |kms, i| kms.put_alias(i, true)).await,
        "UpdateAlias" => kms.change(parse(input)?, |kms, i| kms.put_alias(i, false)).await,
        "DeleteAlias" => kms.change(parse(input)?, Kms::delete_alias).await,
        _ => Err(ServiceError::unknown("TrentService", operation)),
    }
}

fn parse<T: DeserializeOwned>(input: Value) -> Result<T, ServiceError> {
    serde_json::from_value(input)
        .map_err(|error| ServiceError::new("SerializationException", error.to_string()))
}

/// A member breaks its constraint.
fn invalid(member: &str, value: &str, constraint: &str) -> ServiceError {
    let violation = violation(member, value, constraint);
    let message = format!("1 validation error detected: {violation}");
    ServiceError::new("ValidationException", message)
}

fn not_found(message: String) -> ServiceError {
    ServiceError::new("NotFoundException", message)
}

fn unsupported(message: &str) -> ServiceError {
    ServiceError::new("UnsupportedOperationException", message)
}

impl From<StoreError> for ServiceError {
    fn from(error: StoreError) -> Self {
        Self::internal(error.to_string())
    }
}

/// A blob, which is Base64 on the wire.
#[derive(Default)]
struct Blob(Zeroizing<Vec<u8>>);

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Zeroizing::new(String::deserialize(deserializer)?);
        let bytes = STANDARD.decode(&*text).map(Zeroizing::new);
        bytes.map(Self).map_err(|_| serde::de::Error::custom("a blob is not Base64"))
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Encrypt {
    key_id: String,
    plaintext: Blob,
    #[serde(default)]
    encryption_context: EncryptionContext,
    encryption_algorithm: Option<String>,
    #[serde(flatten)]
    usual: Usual,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Decrypt {
    ciphertext_blob: Blob,
    #[serde(default)]
    encryption_context: EncryptionContext,
    key_id: Option<String>,
    encryption_algorithm: Option<String>,
    #[serde(flatten)]
    usual: Usual,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ReEncrypt {
    ciphertext_blob: Blob,
    #[serde(default)]
    source_encryption_context: EncryptionContext,
    source_key_id: Option<String>,
    destination_key_id: String,
    #[serde(default)]
    destination_encryption_context: EncryptionContext,
    source_encryption_algorithm: Option<String>,
    destination_encryption_algorithm: Option<String>,
    #[serde(flatten)]
    usual: Usual,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DataKey {
    key_id: String,
    #[serde(default)]
    encryption_context: EncryptionContext,
    number_of_bytes: Option<i64>,
    key_spec: Option<String>,
    #[serde(flatten)]
    usual: Usual,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Random {
    number_of_bytes: Option<i64>,
    custom_key_store_id: Option<String>,
    #[serde(flatten)]
    usual: Usual,
}

/// What every use of a key may bring.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Usual {
    #[serde(default)]
    grant_tokens: Vec<String>,
    dry_run: Option<bool>,
    recipient: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Named {
    key_id: String,
    #[serde(default)]
    grant_tokens: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Page {
    key_id: Option<String>,
    limit: Option<i64>,
    marker: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct CreateKey {
    policy: Option<String>,
    #[serde(default)]
    description: String,
    key_usage: Option<String>,
    customer_master_key_spec: Option<String>,
    key_spec: Option<String>,
    origin: Option<String>,
    custom_key_store_id: Option<String>,
    #[serde(default)]
    tags: Vec<Value>,
    multi_region: Option<bool>,
    xks_key_id: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Description {
    key_id: String,
    description: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Schedule {
    key_id: String,
    pending_window_in_days: Option<i64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct PutAlias {
    alias_name: String,
    target_key_id: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DeleteAlias {
    alias_name: String,
}

impl Usual {
    /// What is refused before anything else is looked at.
    fn check(&self) -> Result<(), ServiceError> {
        no_grants(&self.grant_tokens)?;
        match self.recipient {
            Some(_) => Err(unsupported("Firn knows no attestation documents.")),
            None => Ok(()),
        }
    }

    /// What a request that is only tried gets instead of its answer.
    fn finish(&self, output: Value) -> Result<Value, ServiceError> {
        match self.dry_run {
            Some(true) => Err(ServiceError::new(
                "DryRunOperationException",
                "The request would have succeeded, but the DryRun option is set.",
            )),
            _ => Ok(output),
        }
    }
}

fn no_grants(tokens: &[String]) -> Result<(), ServiceError> {
    match tokens {
        [] => Ok(()),
        _ => Err(ServiceError::new("InvalidGrantTokenException", "Firn gives no grants.")),
    }
}

fn check_algorithm(given: Option<&str>) -> Result<(), ServiceError> {
    match given {
        None | Some(ALGORITHM) => Ok(()),
        Some("RSAES_OAEP_SHA_1" | "RSAES_OAEP_SHA_256" | "SM2PKE") => {
            let message = "The key is symmetric: its one algorithm is SYMMETRIC_DEFAULT.";
            Err(ServiceError::new("InvalidKeyUsageException", message))
        }
        Some(other) => {
            let constraint = "Member must satisfy enum value set: [SYMMETRIC_DEFAULT, \
                              RSAES_OAEP_SHA_1, RSAES_OAEP_SHA_256, SM2PKE]";
            Err(invalid("encryptionAlgorithm", other, constraint))
        }
    }
}

fn check_context(context: &EncryptionContext) -> Result<(), ServiceError> {
    let bytes: usize = context.iter().map(|(name, value)| name.len() + value.len()).sum();
    match bytes <= MAX_CONTEXT {
        true => Ok(()),
        false => Err(ServiceError::new(
            "ValidationException",
            format!("The encryption context has {bytes} bytes; at most {MAX_CONTEXT} are allowed."),
        )),
    }
}

fn check_length(member: &str, blob: &Blob, most: usize) -> Result<(), ServiceError> {
    // Values are secrets, or of no use to anybody.
    let constraint = match blob.0.len() {
        0 => "Member must have length greater than or equal to 1".to_owned(),
        length if length > most => format!("Member must have length less than or equal to {most}"),
        _ => return Ok(()),
    };
    Err(invalid(member, "…", &constraint))
}

fn check_description(description: &str) -> Result<(), ServiceError> {
    match description.len() <= 8192 {
        true => Ok(()),
        false => {
            let constraint = "Member must have length less than or equal to 8192";
            Err(invalid("description", description, constraint))
        }
    }
}

/// How many of a list, at most.
fn limit(given: Option<i64>) -> Result<usize, ServiceError> {
    match given {
        None => Ok(PAGE),
        Some(limit) if (1..=1000).contains(&limit) => Ok(limit as usize),
        Some(limit) => {
            let bound =
                if limit < 1 { "greater than or equal to 1" } else { "less than or equal to 1000" };
            Err(invalid("limit", &limit.to_string(), &format!("Member must have value {bound}")))
        }
    }
}

fn bad_marker() -> ServiceError {
    ServiceError::new("InvalidMarkerException", "The marker is not one that was given.")
}

fn random(bytes: usize) -> Result<Zeroizing<Vec<u8>>, ServiceError> {
    let mut random = Zeroizing::new(Vec::with_capacity(bytes + 32));
    while random.len() < bytes {
        let key = Key::random().map_err(|error| ServiceError::internal(error.to_string()))?;
        random.extend_from_slice(key.as_bytes());
    }
    random.truncate(bytes);
    Ok(random)
}

/// `CreationDate` and its like: seconds.
fn date(ms: i64) -> Value {
    json!(ms as f64 / 1000.0)
}

/// The keys, and who asks.
#[derive(Clone)]
struct Kms {
    store: Arc<Store>,
    place: Place,
    session: Session,
}

impl Kms {
    // ---- Which key, and whether the caller may ------------------------------------------------

    fn arn(&self, resource: &str) -> String {
        let Place { region, account } = &self.place;
        format!("arn:aws:kms:{region}:{account}:{resource}")
    }

    fn key_arn(&self, id: Uuid) -> String {
        self.arn(&format!("key/{id}"))
    }

    /// The key that a caller names, by its id, its ARN, an alias or an alias's ARN, if the caller may do
    /// `operation` with it.
    fn find(
        &self,
        operation: &str,
        name: &str,
        context: &EncryptionContext,
    ) -> Result<Arc<KmsKey>, ServiceError> {
        if name.is_empty() || name.len() > 2048 {
            let constraint = "Member must have length between 1 and 2048";
            return Err(invalid("keyId", name, constraint));
        }
        let resource = match name.strip_prefix("arn:") {
            Some(_) => name.strip_prefix(&self.arn("")),
            None => Some(name),
        };
        let shown: String = name.chars().take(256).collect();
        let unknown = || not_found(format!("Invalid keyId {shown}"));
        let resource = resource.ok_or_else(unknown)?;
        let (id, alias) = if resource.starts_with("alias/") {
            let key = self.store.kms().aliased(resource).cloned();
            let gone = || not_found(format!("Alias {} is not found.", self.arn(resource)));
            (key.ok_or_else(gone)?.id, Some(resource))
        } else {
            let id = if name == resource { Some(name) } else { resource.strip_prefix("key/") };
            (id.and_then(|id| Uuid::parse_str(id).ok()).ok_or_else(unknown)?, None)
        };
        self.may(operation, id, alias, context)?;
        // Only who may use it learns whether it is there.
        let gone = || not_found(format!("Key '{}' does not exist", self.key_arn(id)));
        self.store.kms().get(id).cloned().ok_or_else(gone)
    }

    fn may(
        &self,
        operation: &str,
        id: Uuid,
        alias: Option<&str>,
        context: &EncryptionContext,
    ) -> Result<(), ServiceError> {
        let describe = |known: &mut Context| {
            for (name, value) in context {
                known.set(&format!("kms:EncryptionContext:{name}"), value);
            }
            known.set_all("kms:EncryptionContextKeys", context.keys().cloned().collect());
            if let Some(alias) = alias {
                known.set("kms:RequestAlias", alias);
            }
            if let Some(key) = self.store.kms().get(id) {
                let aliases = key.record.aliases.keys().cloned().collect();
                known.set_all("kms:ResourceAliases", aliases);
            }
        };
        let (action, arn) = (format!("kms:{operation}"), self.key_arn(id));
        self.session.may_with(&action, &arn, describe).map_err(denied)
    }

    fn may_in_general(&self, operation: &str) -> Result<(), ServiceError> {
        self.session.may(&format!("kms:{operation}"), "*").map_err(denied)
    }

    /// The key, if it can be used.
    fn usable(
        &self,
        operation: &str,
        name: &str,
        context: &EncryptionContext,
    ) -> Result<Arc<KmsKey>, ServiceError> {
        let key = self.find(operation, name, context)?;
        self.check_state(&key)?;
        Ok(key)
    }

    fn check_state(&self, key: &KmsKey) -> Result<(), ServiceError> {
        match key.record.state {
            State::Enabled => Ok(()),
            State::Disabled => {
                let message = format!("{} is disabled.", self.key_arn(key.id));
                Err(ServiceError::new("DisabledException", message))
            }
            State::PendingDeletion { .. } => Err(self.pending(key)),
        }
    }

    fn pending(&self, key: &KmsKey) -> ServiceError {
        let message = format!("{} is pending deletion.", self.key_arn(key.id));
        ServiceError::new("KMSInvalidStateException", message)
    }

    // ---- Use ----------------------------------------------------------------------------------

    fn encrypt(&self, input: Encrypt) -> Result<Value, ServiceError> {
        let Encrypt { key_id, plaintext, encryption_context: context, usual, .. } = input;
        usual.check()?;
        check_algorithm(input.encryption_algorithm.as_deref())?;
        check_length("plaintext", &plaintext, MAX_PLAIN)?;
        check_context(&context)?;
        let key = self.usable("Encrypt", &key_id, &context)?;
        usual.finish(json!({
            "CiphertextBlob": seal(&key, &context, &plaintext.0)?,
            "KeyId": self.key_arn(key.id),
            "EncryptionAlgorithm": ALGORITHM,
        }))
    }

    fn decrypt(&self, input: Decrypt) -> Result<Value, ServiceError> {
        let Decrypt { ciphertext_blob: blob, encryption_context: context, key_id, usual, .. } =
            input;
        usual.check()?;
        check_algorithm(input.encryption_algorithm.as_deref())?;
        let (key, plain) = self.open("Decrypt", &blob, &context, key_id.as_deref())?;
        usual.finish(json!({
            "KeyId": self.key_arn(key.id),
            "Plaintext": STANDARD.encode(&*plain),
            "EncryptionAlgorithm": ALGORITHM,
        }))
    }

    fn re_encrypt(&self, input: ReEncrypt) -> Result<Value, ServiceError> {
        input.usual.check()?;
        check_algorithm(input.source_encryption_algorithm.as_deref())?;
        check_algorithm(input.destination_encryption_algorithm.as_deref())?;
        check_context(&input.destination_encryption_context)?;
        let (source, plain) = self.open(
            "ReEncryptFrom",
            &input.ciphertext_blob,
            &input.source_encryption_context,
            input.source_key_id.as_deref(),
        )?;
        let context = &input.destination_encryption_context;
        let key = self.usable("ReEncryptTo", &input.destination_key_id, context)?;
        input.usual.finish(json!({
            "CiphertextBlob": seal(&key, context, &plain)?,
            "SourceKeyId": self.key_arn(source.id),
            "KeyId": self.key_arn(key.id),
            "SourceEncryptionAlgorithm": ALGORITHM,
            "DestinationEncryptionAlgorithm": ALGORITHM,
        }))
    }

    /// What is in a blob, and the key that it names, which must be the one that the caller expects.
    fn open(
        &self,
        operation: &str,
        blob: &Blob,
        context: &EncryptionContext,
        expected: Option<&str>,
    ) -> Result<(Arc<KmsKey>, Zeroizing<Vec<u8>>), ServiceError> {
        check_length("ciphertextBlob", blob, MAX_BLOB)?;
        check_context(context)?;
        let wrong = || ServiceError {
            name: "InvalidCiphertextException",
            message: String::new(),
            status: axum::http::StatusCode::BAD_REQUEST,
        };
        let id = kms::named_in(&blob.0).ok_or_else(wrong)?;
        let key = match expected {
            Some(name) => {
                let key = self.usable(operation, name, context)?;
                if key.id != id {
                    return Err(ServiceError::new(
                        "IncorrectKeyException",
                        "The key ID in the request does not identify a CMK that can perform this \
                         operation.",
                    ));
                }
                key
            }
            None => {
                self.may(operation, id, None, context)?;
                let key = self.store.kms().get(id).cloned();
                let key = key.ok_or_else(|| {
                    ServiceError::new(
                        "AccessDeniedException",
                        "The ciphertext refers to a customer master key that does not exist, does \
                         not exist in this region, or you are not allowed to access.",
                    )
                })?;
                self.check_state(&key)?;
                key
            }
        };
        let plain = key.decrypt(context, &blob.0).map_err(|_| wrong())?;
        Ok((key, plain))
    }

    fn generate_data_key(&self, operation: &str, input: DataKey) -> Result<Value, ServiceError> {
        let DataKey { key_id, encryption_context: context, usual, .. } = input;
        usual.check()?;
        check_context(&context)?;
        let bytes = match (input.number_of_bytes, input.key_spec.as_deref()) {
            (None, Some("AES_256")) => 32,
            (None, Some("AES_128")) => 16,
            (None, Some(other)) => {
                let constraint = "Member must satisfy enum value set: [AES_256, AES_128]";
                return Err(invalid("keySpec", other, constraint));
            }
            (Some(bytes), None) => number_of_bytes(bytes)?,
            _ => {
                return Err(ServiceError::new(
                    "ValidationException",
                    "Please specify either number of bytes or key spec.",
                ));
            }
        };
        let key = self.usable(operation, &key_id, &context)?;
        let plain = random(bytes)?;
        usual.finish(json!({
            "CiphertextBlob": seal(&key, &context, &plain)?,
            "Plaintext": STANDARD.encode(&*plain),
            "KeyId": self.key_arn(key.id),
        }))
    }

    fn generate_random(&self, input: &Random) -> Result<Value, ServiceError> {
        input.usual.check()?;
        self.may_in_general("GenerateRandom")?;
        if input.custom_key_store_id.is_some() {
            return Err(unsupported("Firn has no custom key stores."));
        }
        let bytes = input
            .number_of_bytes
            .ok_or_else(|| invalid("numberOfBytes", "null", "Member must not be null"))?;
        Ok(json!({"Plaintext": STANDARD.encode(&*random(number_of_bytes(bytes)?)?)}))
    }

    // ---- What there is ------------------------------------------------------------------------

    fn metadata(&self, key: &KmsKey) -> Value {
        let record = &key.record;
        let mut metadata = json!({
            "AWSAccountId": self.place.account,
            "KeyId": key.id.to_string(),
            "Arn": self.key_arn(key.id),
            "CreationDate": date(record.created_ms),
            "Enabled": record.state == State::Enabled,
            "Description": record.description,
            "KeyUsage": "ENCRYPT_DECRYPT",
            "KeyState": word(record.state),
            "Origin": "AWS_KMS",
            "KeyManager": "CUSTOMER",
            "CustomerMasterKeySpec": ALGORITHM,
            "KeySpec": ALGORITHM,
            "EncryptionAlgorithms": [ALGORITHM],
            "MultiRegion": false,
        });
        if let State::PendingDeletion { at_ms } = record.state {
            metadata["DeletionDate"] = date(at_ms);
        }
        metadata
    }

    fn describe_key(&self, input: &Named) -> Result<Value, ServiceError> {
        no_grants(&input.grant_tokens)?;
        let key = self.find("DescribeKey", &input.key_id, &EncryptionContext::new())?;
        Ok(json!({"KeyMetadata": self.metadata(&key)}))
    }

    fn list_keys(&self, input: &Page) -> Result<Value, ServiceError> {
        self.may_in_general("ListKeys")?;
        let after = input.marker.as_deref().map(Uuid::parse_str).transpose();
        let (after, limit) = (after.map_err(|_| bad_marker())?, limit(input.limit)?);
        let keys = self.store.kms();
        let mut rest = keys.after(after);
        let page: Vec<_> = rest.by_ref().take(limit).collect();
        let entry = |key: &&Arc<KmsKey>| json!({"KeyId": key.id.to_string(), "KeyArn": self.key_arn(key.id)});
        let mut output =
            json!({"Keys": page.iter().map(entry).collect::<Vec<_>>(), "Truncated": false});
        if rest.next().is_some()
            && let Some(last) = page.last()
        {
            output["Truncated"] = true.into();
            output["NextMarker"] = last.id.to_string().into();
        }
        Ok(output)
    }

    fn list_aliases(&self, input: &Page) -> Result<Value, ServiceError> {
        self.may_in_general("ListAliases")?;
        let of = match &input.key_id {
            // Whoever lists all of them may list a key's.
            Some(name) => Some(self.listed(name)?),
            None => None,
        };
        if input.marker.as_ref().is_some_and(|marker| !marker.starts_with("alias/")) {
            return Err(bad_marker());
        }
        let limit = limit(input.limit)?;
        let keys = self.store.kms();
        let mut rest = keys
            .aliases(input.marker.as_deref())
            .filter(|(_, _, key)| of.is_none_or(|id| key.id == id));
        let page: Vec<_> = rest.by_ref().take(limit).collect();
        let entry = |(name, alias, key): &(&str, Alias, &Arc<KmsKey>)| {
            json!({
                "AliasName": name,
                "AliasArn": self.arn(name),
                "TargetKeyId": key.id.to_string(),
                "CreationDate": date(alias.created_ms),
                "LastUpdatedDate": date(alias.updated_ms),
            })
        };
        let mut output =
            json!({"Aliases": page.iter().map(entry).collect::<Vec<_>>(), "Truncated": false});
        if rest.next().is_some()
            && let Some((last, ..)) = page.last()
        {
            output["Truncated"] = true.into();
            output["NextMarker"] = (*last).into();
        }
        Ok(output)
    }

    /// The id that a key's id or ARN has.
    fn listed(&self, name: &str) -> Result<Uuid, ServiceError> {
        let id = name.strip_prefix(&self.arn("key/")).unwrap_or(name);
        let known = Uuid::parse_str(id).ok().filter(|id| self.store.kms().get(*id).is_some());
        let shown: String = name.chars().take(256).collect();
        known.ok_or_else(|| not_found(format!("Invalid keyId {shown}")))
    }

    // ---- Changes ------------------------------------------------------------------------------

    /// Does what writes where that is allowed.
    async fn change<T: Send + 'static>(
        self,
        input: T,
        change: impl FnOnce(&Self, T) -> Result<Value, ServiceError> + Send + 'static,
    ) -> Result<Value, ServiceError> {
        blocking(move || Ok(change(&self, input))).await?
    }

    fn create_key(&self, input: CreateKey) -> Result<Value, ServiceError> {
        self.may_in_general("CreateKey")?;
        check_description(&input.description)?;
        let other = |given: &Option<String>, only| given.as_deref().is_some_and(|g| g != only);
        if other(&input.key_usage, "ENCRYPT_DECRYPT")
            || other(&input.key_spec, ALGORITHM)
            || other(&input.customer_master_key_spec, ALGORITHM)
        {
            return Err(unsupported("Firn's keys are symmetric, for encryption."));
        }
        if other(&input.origin, "AWS_KMS")
            || input.custom_key_store_id.is_some()
            || input.xks_key_id.is_some()
            || input.multi_region == Some(true)
        {
            return Err(unsupported("Firn's keys are made here, for this installation."));
        }
        if input.policy.is_some() || !input.tags.is_empty() {
            let message = "Firn's keys have neither policies nor tags: policies of users and roles \
                           say who may use them.";
            return Err(unsupported(message));
        }
        let key = self.store.new_kms_key(input.description)?;
        let metadata = self.metadata(&key);
        self.store.change_kms(|keys| match keys.len() < MAX_KEYS {
            true => Ok(((), vec![key])),
            false => Err(ServiceError::new(
                "LimitExceededException",
                format!("There are {MAX_KEYS} keys, which is as many as there can be."),
            )),
        })?;
        Ok(json!({"KeyMetadata": metadata}))
    }

    /// Has `change` change the key that a caller names, if the caller may do `operation`.
    fn edit<T>(
        &self,
        operation: &str,
        name: &str,
        change: impl FnOnce(&mut KmsKey) -> Result<T, ServiceError>,
    ) -> Result<T, ServiceError> {
        // By an alias it would be a matter of who comes first which key that is.
        if name.contains("alias/") {
            let message = format!("Invalid keyId {}", name.chars().take(256).collect::<String>());
            return Err(not_found(message));
        }
        let id = self.find(operation, name, &EncryptionContext::new())?.id;
        self.store.change_kms(|keys| {
            let mut key = KmsKey::clone(self.still(keys, id)?);
            let result = change(&mut key)?;
            Ok((result, vec![key]))
        })
    }

    /// A key that was there just before.
    fn still<'a>(&self, keys: &'a KmsKeys, id: Uuid) -> Result<&'a KmsKey, ServiceError> {
        let gone = || not_found(format!("Key '{}' does not exist", self.key_arn(id)));
        keys.get(id).map(|key| &**key).ok_or_else(gone)
    }

    fn update_description(&self, input: Description) -> Result<Value, ServiceError> {
        check_description(&input.description)?;
        self.edit("UpdateKeyDescription", &input.key_id, |key| match key.record.state {
            State::PendingDeletion { .. } => Err(self.pending(key)),
            _ => {
                key.record.description = input.description;
                Ok(json!({}))
            }
        })
    }

    fn set(&self, input: Named, enabled: bool) -> Result<Value, ServiceError> {
        let (operation, state) = match enabled {
            true => ("EnableKey", State::Enabled),
            false => ("DisableKey", State::Disabled),
        };
        self.edit(operation, &input.key_id, |key| match key.record.state {
            State::PendingDeletion { .. } => Err(self.pending(key)),
            _ => {
                key.record.state = state;
                Ok(json!({}))
            }
        })
    }

    fn schedule_deletion(&self, input: Schedule) -> Result<Value, ServiceError> {
        let days = input.pending_window_in_days.unwrap_or(30);
        if !(7..=30).contains(&days) {
            let constraint = "Member must have value between 7 and 30";
            return Err(invalid("pendingWindowInDays", &days.to_string(), constraint));
        }
        self.edit("ScheduleKeyDeletion", &input.key_id, |key| match key.record.state {
            State::PendingDeletion { .. } => Err(self.pending(key)),
            _ => {
                let at_ms = now_ms() + days * DAY_MS;
                key.record.state = State::PendingDeletion { at_ms };
                Ok(json!({
                    "KeyId": self.key_arn(key.id),
                    "DeletionDate": date(at_ms),
                    "KeyState": word(key.record.state),
                    "PendingWindowInDays": days,
                }))
            }
        })
    }

    fn cancel_deletion(&self, input: Named) -> Result<Value, ServiceError> {
        self.edit("CancelKeyDeletion", &input.key_id, |key| match key.record.state {
            State::PendingDeletion { .. } => {
                key.record.state = State::Disabled;
                Ok(json!({"KeyId": self.key_arn(key.id)}))
            }
            _ => {
                let message = format!("{} is not pending deletion.", self.key_arn(key.id));
                Err(ServiceError::new("KMSInvalidStateException", message))
            }
        })
    }

    fn put_alias(&self, input: PutAlias, new: bool) -> Result<Value, ServiceError> {
        let PutAlias { alias_name: alias, target_key_id: target } = input;
        let operation = if new { "CreateAlias" } else { "UpdateAlias" };
        check_alias(&alias)?;
        self.session.may(&format!("kms:{operation}"), &self.arn(&alias)).map_err(denied)?;
        if target.contains("alias/") {
            let message = "Aliases must refer to keys. Not aliases";
            return Err(ServiceError::new("ValidationException", message));
        }
        let id = self.find(operation, &target, &EncryptionContext::new())?.id;
        // Whoever takes an alias away from a key must be allowed to.
        let from = self.store.kms().aliased(&alias).map(|key| key.id).filter(|_| !new);
        if let Some(from) = from.filter(|from| *from != id) {
            self.may(operation, from, None, &EncryptionContext::new())?;
        }
        self.store.change_kms(|keys| {
            let mut key = self.still(keys, id)?.clone();
            if let State::PendingDeletion { .. } = key.record.state {
                return Err(self.pending(&key));
            }
            let now = now_ms();
            let mut entry = Alias { created_ms: now, updated_ms: now };
            let mut changed = Vec::with_capacity(2);
            match keys.aliased(&alias) {
                Some(_) if new => {
                    let arn = self.arn(&alias);
                    let message = format!("An alias with the name {arn} already exists");
                    return Err(ServiceError::new("AlreadyExistsException", message));
                }
                None if !new => return Err(self.no_alias(&alias)),
                // It has moved in between.
                old if old.map(|key| key.id) != from => return Err(self.no_alias(&alias)),
                Some(old) => {
                    entry.created_ms = old.record.aliases.get(&alias).map_or(now, |a| a.created_ms);
                    if old.id != id {
                        let mut old = KmsKey::clone(old);
                        old.record.aliases.remove(&alias);
                        changed.push(old);
                    }
                }
                None => {}
            }
            key.record.aliases.insert(alias.clone(), entry);
            if key.record.aliases.len() > MAX_ALIASES {
                let message = format!("A key has at most {MAX_ALIASES} aliases.");
                return Err(ServiceError::new("LimitExceededException", message));
            }
            changed.push(key);
            Ok((json!({}), changed))
        })
    }

    fn delete_alias(&self, input: DeleteAlias) -> Result<Value, ServiceError> {
        let alias = input.alias_name;
        check_alias(&alias)?;
        self.session.may("kms:DeleteAlias", &self.arn(&alias)).map_err(denied)?;
        let id = self.store.kms().aliased(&alias).map(|key| key.id);
        let id = id.ok_or_else(|| self.no_alias(&alias))?;
        self.may("DeleteAlias", id, None, &EncryptionContext::new())?;
        self.store.change_kms(|keys| {
            let mut key = self.still(keys, id)?.clone();
            match key.record.aliases.remove(&alias) {
                Some(_) => Ok((json!({}), vec![key])),
                None => Err(self.no_alias(&alias)),
            }
        })
    }

    fn no_alias(&self, alias: &str) -> ServiceError {
        not_found(format!("Alias {} is not found.", self.arn(alias)))
    }
}

fn denied(refusal: crate::api::error::ApiError) -> ServiceError {
    // This service answers 400 where Lambda answers 403.
    ServiceError { status: axum::http::StatusCode::BAD_REQUEST, ..refusal.into() }
}

fn word(state: State) -> &'static str {
    match state {
        State::Enabled => "Enabled",
        State::Disabled => "Disabled",
        State::PendingDeletion { .. } => "PendingDeletion",
    }
}

fn seal(key: &KmsKey, context: &EncryptionContext, plain: &[u8]) -> Result<String, ServiceError> {
    let blob = key.encrypt(context, plain).map_err(|e| ServiceError::internal(e.to_string()))?;
    Ok(STANDARD.encode(blob))
}

fn number_of_bytes(given: i64) -> Result<usize, ServiceError> {
    match given {
        1..=1024 => Ok(given as usize),
        _ => {
            let constraint = "Member must have value between 1 and 1024";
            Err(invalid("numberOfBytes", &given.to_string(), constraint))
        }
    }
}

fn check_alias(alias: &str) -> Result<(), ServiceError> {
    let pattern = |b: u8| b.is_ascii_alphanumeric() || b":/_-".contains(&b);
    if alias.is_empty() || alias.len() > 256 || !alias.bytes().all(pattern) {
        let constraint = "Member must have length between 1 and 256 and satisfy regular expression pattern: \
             ^[a-zA-Z0-9:/_-]+$";
        return Err(invalid("aliasName", alias, constraint));
    }
    let bad = |name, message| Err(ServiceError::new(name, message));
    match alias.strip_prefix("alias/") {
        None => bad("ValidationException", "Invalid identifier"),
        Some("") => bad("ValidationException", "Invalid identifier"),
        Some(rest) if rest.contains(':') => {
            bad("ValidationException", "An alias must not contain a colon")
        }
        Some(rest) if rest.starts_with("aws/") => {
            bad("NotAuthorizedException", "Aliases that begin with alias/aws/ are reserved")
        }
        Some(_) => Ok(()),
    }
}
