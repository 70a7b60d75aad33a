use super::*;

/// Starts hosts from what has been fetched before, or says why not.
fn cluster(kernels: Vec<Series>, guests: bool) -> Option<Cluster> {
    let options =
        Options { kernels, cpus: 1, memory_mib: 1024, programs: vec![], guests, shell: false, fetch: false };
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

/// What the arbiter needs of the share: of several that give a file its name, one does, and all see it.
#[test]
fn of_two_hosts_one_makes_a_file_on_the_share() {
    let Some(mut cluster) = cluster(vec![Series::Bookworm, Series::Bookworm], false) else { return };
    let race = "cd /share; mkdir -p race; n=0; while [ $n -lt 100 ]; do n=$((n + 1)); \
                echo HOST >race/HOST.$n; ln race/HOST.$n race/claim.$n 2>/dev/null && echo $n; done; true";
    let racers: Vec<_> = [1, 2]
        .map(|host| {
            let script = race.replace("HOST", &format!("host-{host}"));
            cluster.spawn(host, "race", &format!("sh -c {}", quoted(&script))).unwrap()
        })
        .into();
    let won: Vec<Vec<u32>> = racers
        .iter()
        .map(|racer| {
            assert_eq!(racer.wait_for_end(Duration::from_secs(60)).unwrap(), 0, "{}", racer.log());
            racer.log().lines().map(|line| line.parse().unwrap()).collect()
        })
        .collect();
    println!("won: {} and {}", won[0].len(), won[1].len());
    let mut all = won.concat();
    all.sort_unstable();
    assert_eq!(all, (1..=100).collect::<Vec<_>>());
    for (host, won) in [1, 2].into_iter().zip(&won) {
        for number in won {
            let claim = fs::read_to_string(cluster.share().join(format!("race/claim.{number}"))).unwrap();
            assert_eq!(claim, format!("host-{host}\n"));
        }
    }
}
