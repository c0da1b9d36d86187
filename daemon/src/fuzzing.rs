//! Doors for the fuzzer (`fuzz/`) to parsers of what callers send. They exist only with the feature
//! `fuzzing`, which nothing else may turn on.

use crate::api::{
    names::{Place, Reference},
    shapes::{CreateFunction, UpdateFunctionCode, UpdateFunctionConfiguration},
    validate,
};

/// Parses how a caller names a function, with the `Qualifier` parameter. What it gives is a name that the
/// pattern allows, and its ARN means the same.
pub fn name(text: &str, qualifier: Option<&str>) {
    let Ok(reference) = Reference::parse(text, qualifier) else { return };
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    assert!(!reference.name.is_empty() && reference.name.chars().all(allowed));
    let place = Place { region: "us-east-1".into(), account: "000000000000".into() };
    let arn = reference.arn(&place);
    if let Ok(again) = Reference::parse(&arn, None) {
        assert_eq!((&again.name, &again.qualifier), (&reference.name, &reference.qualifier));
        assert_eq!(again.arn(&place), arn);
    }
}

/// Reads a request body as each operation that takes one, and checks it as CreateFunction does. What is
/// accepted is within Lambda's limits.
pub fn body(body: &[u8]) {
    let _ = serde_json::from_slice::<UpdateFunctionConfiguration>(body);
    let _ = serde_json::from_slice::<UpdateFunctionCode>(body);
    let Ok(create) = serde_json::from_slice::<CreateFunction>(body) else { return };
    let Ok(config) = validate::create(create.settings, &["python3.11".to_owned()]) else { return };
    assert!((128..=10_240).contains(&config.memory_mb) && (1..=900).contains(&config.timeout_s));
    let environment = config.environment.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>();
    assert!(environment <= 4096);
}
