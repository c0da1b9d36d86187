//! Accepts connections and hands requests to the router.
//!
//! Bounded: connections at once, the time and size of a request's head, and the time that an idle
//! connection may stay. Bodies are bounded where they are read. Connections that are opened while many
//! are open have less time: who opens them by the thousand and says nothing can't keep others out.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::Router;
use hyper::{
    Request,
    body::Incoming,
    service::{Service, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use tokio::{net::TcpListener, sync::Semaphore};

/// Who is at the other end of the connection; an extension of each request.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub SocketAddr);

/// What bounds connections.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// At once; further ones wait in the kernel's queue.
    pub connections: usize,
    /// Time for a request's head, and for the next one on an idle connection.
    pub head: Duration,
    /// The same for connections that are opened while half of them are taken.
    pub head_in_a_crowd: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            connections: 4096,
            head: Duration::from_secs(75),
            head_in_a_crowd: Duration::from_secs(5),
        }
    }
}

/// Most bytes of a request's head.
const HEAD_BYTES: usize = 64 * 1024;

/// Time that connections get to end when the server stops.
const GOODBYE: Duration = Duration::from_secs(2);

/// Serves until `stop` is done, then lets requests in flight end for at most `patience`.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    stop: impl Future<Output = ()>,
    patience: Duration,
    bounds: Bounds,
) {
    let connections = Arc::new(Semaphore::new(bounds.connections));
    let graceful = GracefulShutdown::new();
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).max_buf_size(HEAD_BYTES);
    let mut stop = std::pin::pin!(stop);
    loop {
        let accept = async {
            let permit = connections.clone().acquire_owned().await;
            (listener.accept().await, permit)
        };
        let (accepted, permit) = tokio::select! {
            accepted = accept => accepted,
            () = &mut stop => break,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                if !is_connections_own(&error) {
                    // Out of descriptors, most likely: waiting is all that helps.
                    tracing::error!(%error, "can't accept connections");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                continue;
            }
        };
        // Answers are small and waited for.
        let _ = stream.set_nodelay(true);
        let crowded = connections.available_permits() < bounds.connections / 2;
        http.header_read_timeout(if crowded { bounds.head_in_a_crowd } else { bounds.head });
        let router = TowerToHyperService::new(router.clone());
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(Peer(address));
            router.call(request)
        });
        let connection = http.serve_connection(TokioIo::new(stream), service);
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            let _permit = permit;
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection broke");
            }
        });
    }
    drop(listener);
    if tokio::time::timeout(patience + GOODBYE, graceful.shutdown()).await.is_err() {
        tracing::warn!("connections are cut off");
    }
}

fn is_connections_own(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}
