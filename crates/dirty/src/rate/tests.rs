use super::*;

fn window(milliseconds: u64, pages: impl IntoIterator<Item = u64>) -> Window {
    let pages: Vec<_> = pages.into_iter().map(Gfn).collect();
    let vcpus = vec![pages.len() as u64];
    Window { time: Duration::from_millis(milliseconds), vcpus, pages, ..Window::default() }
}

const COSTS: Costs = Costs {
    fault: Duration::from_micros(6),
    copy: Duration::from_nanos(350),
    pause: Duration::from_micros(50),
};

/// 100 pages forever, and 5 new ones each millisecond.
fn steady() -> RateReport {
    let mut meter = RateMeter::new(1 << 20);
    for millisecond in 0..1000 {
        meter.add(&window(1, (0..100).chain(1000 + millisecond * 5..1005 + millisecond * 5)));
    }
    meter.report()
}

#[test]
fn rates_and_working_set() {
    let report = steady();
    let WorkingSet { in_1_ms, in_10_ms, in_100_ms } = report.working_set;
    assert_eq!((in_1_ms, in_10_ms, in_100_ms), (Some(105.0), Some(150.0), Some(600.0)));
    assert_eq!((report.windows, report.pages.round(), report.vcpus[0].round()), (1000, 105e3, 105e3));
    // Page 0 to 511 are one part of 2048.
    assert_eq!((report.map.pages_per_cell, report.map.cells[0].round()), (512, 100e3));
}

/// Windows of 10 ms say nothing about a millisecond, and neither 4 nor 17 ms are 10.
#[test]
fn what_windows_are_too_long_for_is_not_known() {
    let mut meter = RateMeter::new(1 << 20);
    (0..50).for_each(|count| meter.add(&window(10, 0..count)));
    let set = meter.report().working_set;
    assert_eq!((set.in_1_ms, set.in_10_ms, set.in_100_ms), (None, Some(24.5), Some(29.0)));
    let mut meter = RateMeter::new(1 << 20);
    (0..100).for_each(|_| meter.add(&window(17, 0..9)));
    assert_eq!(meter.report().working_set.in_10_ms, None);
    // Six of them are 102 ms.
    assert_eq!(meter.report().working_set.in_100_ms, Some(9.0));
    // Two of 4 ms are nearer to 10 than three: 12 is as near, and comes too late.
    let mut meter = RateMeter::new(1 << 20);
    (0..30).for_each(|count| meter.add(&window(4, [count])));
    assert_eq!(meter.report().working_set.in_10_ms, Some(2.0));
    assert_eq!(RateMeter::new(0).report().unique_pages(Duration::from_secs(1)), None);
}

#[test]
fn unique_pages_between_and_beyond() {
    let report = steady();
    let in_ms = |ms: f64| report.unique_pages(Duration::from_secs_f64(ms / 1e3)).unwrap().round();
    assert_eq!((in_ms(1.0), in_ms(10.0), in_ms(100.0)), (105.0, 150.0, 600.0));
    assert!((105.0..150.0).contains(&in_ms(3.0)) && (150.0..600.0).contains(&in_ms(40.0)));
    // By the growth from 10 to 100 ms: fourfold for ten times the time.
    assert_eq!(in_ms(1000.0), 2400.0);
}

#[test]
fn a_migration_ends_if_the_link_is_faster_than_the_guest() {
    let report = steady();
    let link = |bytes_per_second| Link { bytes_per_second, downtime: Duration::from_millis(1) };
    let fast = report.migration(&link(2e9), 4 << 30, &COSTS);
    assert!(fast.converges && fast.downtime <= Duration::from_millis(1) && fast.rounds >= 1, "{fast:?}");
    assert!(fast.bytes > f64::from(1 << 30) * 4.0 && fast.total > Duration::from_millis(400));
    // A trap for each page that is sent again, while the rounds continue.
    let again = (fast.bytes - f64::from(1 << 30) * 4.0) / 4096.0;
    let rounds = (fast.total - fast.downtime).as_secs_f64();
    assert!((fast.speed - rounds / (rounds + again * 6e-6)).abs() < 1e-9 && fast.speed < 1.0, "{fast:?}");
    // 105 pages a millisecond are 430 MB/s; a tenth of that never gets to one millisecond.
    let slow = report.migration(&link(43e6), 4 << 30, &COSTS);
    assert!(!slow.converges && slow.downtime > Duration::from_millis(1), "{slow:?}");
    let still = RateMeter::new(1).report().migration(&link(1e9), 1 << 30, &COSTS);
    assert!(
        still.converges
            && still.rounds == 0
            && (still.speed - 1.0).abs() < 1e-9
            && still.bytes == f64::from(1 << 30)
    );
}

#[test]
fn a_protection_costs_by_the_interval() {
    let often = steady().protection(Duration::from_millis(1), &COSTS).unwrap();
    let seldom = steady().protection(Duration::from_millis(10), &COSTS).unwrap();
    assert_eq!((often.pages.round(), seldom.pages.round()), (105.0, 150.0));
    // 105 pages of 6.35 us, and 50 us, for each millisecond of work.
    assert!((often.speed - 1000.0 / 1716.75).abs() < 1e-3 && seldom.speed > 0.9, "{often:?} {seldom:?}");
    assert_eq!((often.bytes_per_second / 1e6).round(), 430.0);
}

#[test]
fn a_window_is_a_line() {
    let mut one =
        Window { devices: 2, hot: 1, vcpus: vec![12, 3], ..window(1, [0x4b1, 0x4a1, 0x4a0, 0x4a2]) };
    let line = one.to_string();
    assert_eq!(line, "window 1000 vcpus 12,3 devices 2 hot 1 pages 4a0+3,4b1");
    one.pages.sort_unstable();
    assert_eq!(line.parse(), Ok(one));
    let empty = Window::default();
    assert_eq!(empty.to_string(), "window 0 vcpus - devices 0 hot 0 pages -");
    assert_eq!(empty.to_string().parse(), Ok(empty));
}

#[test]
fn a_vm_is_a_line() {
    let vm = VmLine { gfn_space: 0x10_0000, fault_ns: 6500, copy_ns: 350 };
    assert_eq!(vm.to_string(), "vm gfn-space 100000 fault-ns 6500 copy-ns 350");
    assert_eq!(vm.to_string().parse(), Ok(vm));
    assert!("vm gfn-space 1 fault-ns 5000000000 copy-ns 1".parse::<VmLine>().is_err());
    assert_eq!("window 1".parse::<VmLine>(), Err(WindowError::OtherLine("window".into())));
}

#[test]
fn a_line_that_is_none_is_an_error() {
    let error = |line: &str| line.parse::<Window>().unwrap_err();
    assert_eq!(error("hello"), WindowError::OtherLine("hello".into()));
    assert_eq!(error(""), WindowError::OtherLine(String::new()));
    assert_eq!(error("window 1"), WindowError::Field("vcpus"));
    assert_eq!(error("window x vcpus -"), WindowError::Number("x".into()));
    let with = |pages: &str| format!("window 1 vcpus 1 devices 0 hot 0 pages {pages}").parse::<Window>();
    assert!(with("1,2,10+ff").is_ok());
    for bad in
        ["2,1", "1,1", "1+0", "0+ffffffffffffffff", "ffffffffffffffff+2", "1+20000000", "1++1", "1,,2", "g"]
    {
        assert!(with(bad).is_err(), "{bad}");
    }
}

#[test]
fn the_picture_shows_every_part() {
    let svg = steady().map.to_svg("a < b");
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n") && svg.contains("a &lt; b"));
    assert!(svg.contains("a square is 2 MiB, a row 128 MiB"), "{}", &svg[..600]);
    // The page, the ground, and a square for each part that is written: pages 0 to 99 and 1000 to 5999.
    let hot = 1 + (5999 / 512 - 1000 / 512 + 1);
    assert_eq!(svg.matches("<rect ").count(), 2 + hot);
    // The first part is written the most.
    assert_eq!(svg.matches("#0d285a").count(), 1, "{svg}");
}
