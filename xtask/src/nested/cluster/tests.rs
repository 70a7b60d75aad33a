use super::*;

/// Starts hosts from files that were fetched before, or says why it cannot.
fn cluster(kernels: Vec<Series>, guests: bool) -> Option<Cluster> {
    let options = Options {
        kernels,
        cpus: 1,
        last_lacks: None,
        memory_mib: 1024,
        programs: vec![],
        guests,
        shell: false,
        fetch: false,
    };
    match Cluster::start(&Workspace::find(), options) {
        Ok(cluster) => Some(cluster),
        Err(error) if error.is_missing() => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn two_hosts_see_each_other_until_one_has_no_power() {
    let Some(mut cluster) = cluster(vec![Series::Bookworm, Series::Bookworm], false) else { return };
    let directory = cluster._directory.path.clone();
    let ping = format!("ping -c 1 -W 2 {}", Net::Link.host(2));
    let alive = |cluster: &mut Cluster| cluster.run(1, &ping, SHORT).unwrap().0 == 0;
    assert!(alive(&mut cluster));
    let busybox = cluster.kernels[0].busybox.to_string_lossy().into_owned();
    for net in Net::ALL {
        let address = net.host(2).to_string();
        let ping = cluster.client(&busybox).args(["ping", "-c", "1", "-W", "2", &address]).output().unwrap();
        assert!(ping.status.success(), "{net:?}: {ping:?}");
    }
    cluster.cut_link(2, Net::Link).unwrap();
    assert!(!alive(&mut cluster));
    cluster.restore_link(2, Net::Link).unwrap();
    assert!(alive(&mut cluster));
    cluster.freeze(2).unwrap();
    assert!(!alive(&mut cluster));
    cluster.thaw(2).unwrap();
    assert!(alive(&mut cluster));

    let program = cluster.spawn(2, "count", "sh -c 'while :; do date +%s; sleep 1; done'").unwrap();
    program.wait_for("\n", Duration::from_secs(20)).unwrap();
    cluster.cut_power(2).unwrap();
    assert!(!alive(&mut cluster) && !cluster.has_power(2));
    assert!(matches!(cluster.command(2, "true"), Err(ClusterError::Off(2))));
    assert!(program.status().is_none() && program.log().lines().count() >= 1);
    cluster.switch_on(&[2]).unwrap();
    assert!(alive(&mut cluster));
    let program = cluster.spawn(2, "sleep", "sleep 1000").unwrap();
    cluster.signal(&program, "TERM").unwrap();
    assert_eq!(program.wait_for_end(SHORT).unwrap(), 128 + 15);
    drop(cluster);
    assert!(!directory.exists());
}

/// The arbiter's requirement for the share: if several processes try to create the same name, one succeeds,
/// and all see it. Once with `link(2)` and once with O_EXCL; each time both hosts wait for each other first.
#[test]
fn of_two_hosts_one_makes_a_file_on_the_share() {
    const ROUNDS: u32 = 30;
    let Some(mut cluster) = cluster(vec![Series::Bookworm, Series::Bookworm], false) else { return };
    let race = "cd /share; mkdir -p race; n=0; while [ $n -lt ROUNDS ]; do n=$((n + 1)); echo HOST >race/HOST.$n; \
                until [ -e race/host-1.$n ] && [ -e race/host-2.$n ]; do :; done; \
                ln race/HOST.$n race/link.$n 2>/dev/null && echo link.$n; \
                (set -C; echo HOST >race/new.$n) 2>/dev/null && echo new.$n; done; true";
    let mut racers = Vec::new();
    for host in 1..=cluster.len() {
        let script = race.replace("HOST", &format!("host-{host}")).replace("ROUNDS", &ROUNDS.to_string());
        racers.push(cluster.spawn(host, "race", &format!("sh -c {}", quoted(&script))).unwrap());
    }
    let mut all = Vec::new();
    for racer in &racers {
        assert_eq!(racer.wait_for_end(Duration::from_secs(120)).unwrap(), 0, "{}", racer.log());
        let won: Vec<String> = racer.log().lines().map(str::to_string).collect();
        println!("host {} won {} of {}", racer.host, won.len(), 2 * ROUNDS);
        for name in &won {
            let claim = fs::read_to_string(cluster.share().join("race").join(name)).unwrap();
            assert_eq!(claim, format!("host-{}\n", racer.host), "{name}");
        }
        all.extend(won);
    }
    all.sort();
    let mut expected: Vec<String> =
        (1..=ROUNDS).flat_map(|round| [format!("link.{round}"), format!("new.{round}")]).collect();
    expected.sort();
    assert_eq!(all, expected);
}
