//! A cluster with TLS in both directions, and with users.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use outlive::arbiter::{self, Arbiter, Claim};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use serde_json::{Value, json};
use ureq::tls::{Certificate, ClientCert, PrivateKey, RootCerts, TlsConfig};

use super::etcd_cluster::{Cluster, has_etcd};
use crate::conformance::answer;
use crate::support::{VM, directory};

/// The files of an authority, and of a certificate that it has issued for this machine.
struct Trust {
    ca: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

impl Trust {
    fn make(directory: &Path, name: &str) -> Self {
        let file = |kind: &str| directory.join(format!("{name}-{kind}.pem"));
        let trust = Self { ca: file("ca"), certificate: file("certificate"), key: file("key") };
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let signed = ca.self_signed(&ca_key).unwrap();
        let issuer = Issuer::new(ca, ca_key);
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["127.0.0.1".into(), "localhost".into()]).unwrap();
        // etcd's gateway refuses certificates with a common name, and is a client itself.
        params.distinguished_name = DistinguishedName::new();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &issuer).unwrap();
        fs::write(&trust.ca, signed.pem()).unwrap();
        fs::write(&trust.certificate, certificate.pem()).unwrap();
        secret(&trust.key, &key.serialize_pem());
        trust
    }

    fn options(&self) -> Vec<String> {
        let pairs =
            [("--cert-file", &self.certificate), ("--key-file", &self.key), ("--trusted-ca-file", &self.ca)];
        let options = pairs.iter().flat_map(|(name, file)| [(*name).to_owned(), file.display().to_string()]);
        options.chain(["--client-cert-auth".to_owned()]).collect()
    }

    fn agent(&self) -> ureq::Agent {
        let read = |file: &Path| fs::read(file).unwrap();
        let certificate = Certificate::from_pem(&read(&self.certificate)).unwrap();
        let tls = TlsConfig::builder()
            .unversioned_rustls_crypto_provider(rustls::crypto::ring::default_provider().into())
            .root_certs(RootCerts::new_with_certs(&[Certificate::from_pem(&read(&self.ca)).unwrap()]))
            .client_cert(Some(ClientCert::new_with_certs(
                &[certificate],
                PrivateKey::from_pem(&read(&self.key)).unwrap(),
            )))
            .build();
        ureq::Agent::config_builder()
            .tls_config(tls)
            .timeout_global(Some(Duration::from_secs(5)))
            .build()
            .into()
    }
}

fn secret(file: &Path, text: &str) {
    fs::write(file, text).unwrap();
    fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
}

/// Two users: root, and one who may use the keys below a prefix.
fn make_users(agent: &ureq::Agent, url: &str) {
    let ask = |path: &str, question: Value| {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            match agent.post(format!("{url}/v3/{path}")).send_json(&question) {
                Ok(_) => return,
                Err(error) => assert!(Instant::now() < deadline, "{path}: {error}"),
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    let (key, range_end) = (STANDARD.encode("secret/"), STANDARD.encode("secret0"));
    for (user, role) in [("root", "root"), ("vm", "vms")] {
        ask("auth/user/add", json!({ "name": user, "password": "a password" }));
        ask("auth/role/add", json!({ "name": role }));
        ask("auth/user/grant", json!({ "user": user, "role": role }));
    }
    let perm = json!({ "permType": "READWRITE", "key": key, "range_end": range_end });
    ask("auth/role/grant", json!({ "name": "vms", "perm": perm }));
    ask("auth/enable", json!({}));
}

/// Makes the place an arbiter, as soon as a member answers: a cluster that has just begun may be slow.
fn made(place: &str) -> Box<dyn Arbiter> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match arbiter::init(place) {
            Ok((arbiter, _)) => return arbiter,
            Err(error) => {
                let told = error.to_string();
                assert!(told.contains("no member answers") && Instant::now() < deadline, "{told}");
            }
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Renames a file over another, as programs do that renew secrets.
fn renew(file: &Path, text: &[u8]) {
    let beside = file.with_extension("new");
    fs::write(&beside, text).unwrap();
    fs::set_permissions(&beside, fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(&beside, file).unwrap();
}

/// Gives the user a password. etcd takes no token any more that the user had.
fn set_password(agent: &ureq::Agent, url: &str, password: &str) {
    let root = json!({ "name": "root", "password": "a password" });
    let mut answer = agent.post(format!("{url}/v3/auth/authenticate")).send_json(root).unwrap();
    let token: Value = answer.body_mut().read_json().unwrap();
    let change = json!({ "name": "vm", "password": password });
    let change = agent
        .post(format!("{url}/v3/auth/user/changepw"))
        .header("Authorization", token["token"].as_str().unwrap())
        .send_json(change);
    assert!(change.unwrap().status().is_success());
}

#[test]
fn secrets_of_etcd_are_renewed_and_missed_without_a_restart() {
    if !has_etcd() {
        return;
    }
    let files = directory();
    let (trust, strangers) = (Trust::make(files.path(), "etcd"), Trust::make(files.path(), "strangers"));
    let own = files.path().join("own");
    fs::create_dir(&own).unwrap();
    let (ca, certificate, key, password) =
        (own.join("ca.pem"), own.join("cert.pem"), own.join("key.pem"), own.join("password"));
    let copy = |from: &Path, to: &Path| renew(to, &fs::read(from).unwrap());
    let cluster = Cluster::begin(1, "https", &trust.options());
    let (agent, url) = (trust.agent(), cluster.urls());
    make_users(&agent, &url);
    renew(&password, b"a password\n");
    copy(&trust.ca, &ca);
    copy(&strangers.certificate, &certificate);
    copy(&trust.key, &key);
    let place = format!(
        "etcd:{url}/secret?ca={}&cert={}&key={}&user=vm&password-file={}",
        ca.display(),
        certificate.display(),
        key.display(),
        password.display()
    );
    // A key that is another certificate's ends no thread.
    let error = arbiter::init(&place).map(drop).unwrap_err().to_string();
    assert!(error.contains("belongs to the certificate"), "{error}");
    copy(&strangers.key, &key);
    let error = arbiter::init(&place).map(drop).unwrap_err().to_string();
    assert!(error.contains("no member answers"), "{error}");
    // The same process, with what was renewed.
    copy(&trust.certificate, &certificate);
    copy(&trust.key, &key);
    std::thread::sleep(Duration::from_secs(3));
    let mut arbiter = made(&place);
    assert_eq!(answer(arbiter.as_mut(), 1, "primary"), Claim::Won);
    set_password(&agent, &url, "another");
    renew(&password, b"another\n");
    assert_eq!(answer(arbiter.as_mut(), 2, "primary"), Claim::Won);
    // Half of a renewal, then nothing at all. What was read before is as good as it was.
    copy(&strangers.certificate, &certificate);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(answer(arbiter.as_mut(), 3, "primary"), Claim::Won);
    fs::remove_dir_all(&own).unwrap();
    set_password(&agent, &url, "another");
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(answer(arbiter.as_mut(), 4, "primary"), Claim::Won);
}

#[test]
fn etcd_with_tls_and_users() {
    if !has_etcd() {
        return;
    }
    let files = directory();
    let (trust, strangers) = (Trust::make(files.path(), "etcd"), Trust::make(files.path(), "strangers"));
    let cluster = Cluster::begin(1, "https", &trust.options());
    make_users(&trust.agent(), &cluster.urls());
    let password = files.path().join("password");
    secret(&password, "a password\n");
    let place = |prefix: &str, ca: &Path, own: &Trust, password: &Path| {
        let (ca, cert, key) = (ca.display(), own.certificate.display(), own.key.display());
        let password = password.display();
        format!(
            "etcd:{}/{prefix}?ca={ca}&cert={cert}&key={key}&user=vm&password-file={password}",
            cluster.urls()
        )
    };
    let good = place("secret", &trust.ca, &trust, &password);
    let mut arbiter = made(&good);
    for generation in 1..=10 {
        assert_eq!(answer(arbiter.as_mut(), generation, "primary"), Claim::Won);
    }
    assert_eq!(arbiter::parse(&good).unwrap().highest(&VM).unwrap(), Some(10));
    let wrong = files.path().join("wrong");
    secret(&wrong, "another\n");
    let open = files.path().join("open");
    fs::write(&open, "a password\n").unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o644)).unwrap();
    let no_user = good.split("&user").next().unwrap().to_owned();
    let no_certificate = format!("etcd:{}/secret?ca={}", cluster.urls(), trust.ca.display());
    for (place, remedy) in [
        (place("secret", &trust.ca, &trust, &wrong), "check user= and the password"),
        (place("secret", &trust.ca, &trust, &open), "chmod 600"),
        (place("other", &trust.ca, &trust, &password), "let this user read and write"),
        (place("secret", &strangers.ca, &trust, &password), "no member answers"),
        (place("secret", &trust.ca, &strangers, &password), "no member answers"),
        (no_certificate, "no member answers"),
        (no_user, "give user= and password-file="),
        (place("secret", &files.path().join("none"), &trust, &password), "let this user read it"),
        (place("secret", &password, &trust, &password), "BEGIN CERTIFICATE"),
    ] {
        let error = arbiter::parse(&place).map(drop).unwrap_err().to_string();
        assert!(error.contains(remedy) && !error.contains("a password"), "{place}: {error}");
    }
    // No generation was won in vain.
    assert_eq!(arbiter.highest(&VM).unwrap(), Some(10));
    assert!(cluster.path().exists());
}
