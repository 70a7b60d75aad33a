//! What the page is made of, and who may give orders.

use axum::http::{HeaderMap, HeaderName, HeaderValue};

use super::*;

/// A browser refuses what the policy does not let, and the page would lack it.
#[test]
fn nothing_is_inline_and_nothing_is_from_elsewhere() {
    let names: Vec<_> = FILES.iter().map(|it| it.name).collect();
    for file in &FILES {
        let text = file.text.replace("http://www.w3.org/2000/svg", "");
        for wrong in [
            "http:",
            "https:",
            "//cdn",
            "eval(",
            "innerHTML",
            "outerHTML",
            "document.write",
            "@import",
            "url(",
        ] {
            assert!(!text.contains(wrong), "{}: {wrong}", file.name);
        }
        let imports = text.lines().filter_map(|it| it.strip_prefix("import ")?.split('"').nth(1));
        for import in imports.map(|it| it.strip_prefix("./").unwrap()) {
            assert!(names.contains(&import), "{}: {import}", file.name);
        }
        assert!(file.text.len() < 32 << 10, "{} is large", file.name);
    }
    let page = FILES[0].text;
    for wrong in ["style=", "<style", " onclick", " onload", "<script>", "javascript:"] {
        assert!(!page.contains(wrong), "{wrong}");
    }
    let linked = page.split(['"']).filter(|it| it.starts_with("picture."));
    linked.for_each(|it| assert!(names.contains(&it), "{it}"));
    assert!(!POLICY.contains("unsafe") && !POLICY.contains('*'), "{POLICY}");
}

#[test]
fn a_page_of_another_origin_is_known() {
    let is_own = |headers: &[(&'static str, &str)]| {
        let map: HeaderMap = headers
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap()))
            .collect();
        is_own_page(&map)
    };
    let host = ("host", "hosta:8443");
    assert!(is_own(&[host]) && is_own(&[]), "a client that is no browser");
    assert!(is_own(&[host, ("origin", "https://HostA:8443"), ("sec-fetch-site", "same-origin")]));
    assert!(is_own(&[host, ("sec-fetch-site", "none")]), "what a person has typed");
    for wrong in [
        &[host, ("origin", "https://evil.example")][..],
        &[host, ("origin", "https://hosta:8443.evil.example")],
        &[host, ("origin", "https://hosta")],
        &[host, ("origin", "null")],
        &[host, ("origin", "")],
        &[("origin", "https://hosta:8443")],
        &[host, ("sec-fetch-site", "cross-site")],
        &[host, ("sec-fetch-site", "same-site")],
        &[host, ("origin", "https://hosta:8443"), ("sec-fetch-site", "cross-site")],
    ] {
        assert!(!is_own(wrong), "{wrong:?}");
    }
}

/// The socket, forwarded to a port: a page whose name leads there is of the same origin to the browser.
#[test]
fn at_the_socket_a_browser_asks_under_a_name_of_this_host() {
    let may = |headers: &[(&'static str, &str)]| {
        let map = headers
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap()));
        is_under_own_name(&map.collect())
    };
    for host in ["localhost", "localhost:8080", "127.0.0.1:7080", "[::1]:7080"] {
        assert!(may(&[("host", host), ("origin", &format!("http://{host}")), ("sec-fetch-site", "none")]));
        assert!(may(&[("host", host)]));
    }
    assert!(may(&[("host", "node")]) && may(&[]), "a client that is no browser");
    for wrong in [
        &[("host", "evil.example:8080"), ("origin", "http://evil.example:8080")][..],
        &[("host", "evil.example:8080"), ("sec-fetch-site", "same-origin")],
        // As a browser asks without TLS for the page of another origin that it thinks is this one.
        &[("host", "evil.example:8080")],
        &[("host", "evil:8080"), ("origin", "http://evil:8080")],
        &[("origin", "http://evil.example")],
    ] {
        assert!(!may(wrong), "{wrong:?}");
    }
}
