//! The client for requests that the daemon itself makes.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use rustls::{ClientConfig, RootCertStore, crypto::ring};

/// Time to get a connection.
const CONNECT: Duration = Duration::from_secs(5);

/// Sends requests over HTTP/1.1, with TLS where the URL says so.
pub type Http = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// A client that checks certificates against those that the system trusts. It follows no redirects.
pub fn http() -> Http {
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_connect_timeout(Some(CONNECT));
    http.set_nodelay(true);
    // By name: which provider is the process's depends on what other crates are built with.
    let provider = ring::default_provider();
    let tls = match HttpsConnectorBuilder::new().with_provider_and_native_roots(provider) {
        Ok(tls) => tls,
        Err(error) => {
            tracing::debug!(%error, "no certificates: URLs with https can't be used");
            HttpsConnectorBuilder::new().with_tls_config(trusting_nobody())
        }
    };
    let connector = tls.https_or_http().enable_http1().wrap_connector(http);
    Client::builder(TokioExecutor::new())
        .pool_idle_timeout(Duration::from_secs(20))
        .pool_max_idle_per_host(8)
        .build(connector)
}

fn trusting_nobody() -> ClientConfig {
    let provider = ring::default_provider().into();
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring has cipher suites for TLS 1.2 and 1.3")
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth()
}
