//! `outlive node page`.

use std::io;
use std::net::SocketAddr;
use std::path::Path;

use super::say::{print_line, warn};
use super::{OK, Service, USAGE};
use crate::client::Client;
use crate::node::NodeView;
use crate::page;

/// Serves until it is told to stop. Returns the exit code.
pub(super) fn run(listen: SocketAddr, socket: &Path, service: impl FnOnce() -> io::Result<Service>) -> u8 {
    match serve(listen, socket, service) {
        Ok(()) => OK,
        Err(why) => {
            warn(&format!("outlive: {why}"));
            USAGE
        }
    }
}

fn serve(
    listen: SocketAddr,
    socket: &Path,
    service: impl FnOnce() -> io::Result<Service>,
) -> Result<(), Box<dyn std::error::Error>> {
    let Service { stops, .. } = service()?;
    // Whoever may not ask hears it now, and not in the browser.
    let node: NodeView = Client::here(socket)?.get("/v1/node")?;
    let page = page::serve(listen, socket)?;
    warn(&format!("The VMs of host {}, until Ctrl-C. This link opens them in one browser, once:", node.host));
    print_line(&page.link)?;
    // It ends, too, if nobody can give the order any more.
    let _ = stops.recv();
    Ok(())
}
