//! Which standby is dialled, and when.

use super::*;

#[test]
fn standbys_are_tried_in_turn_and_their_reasons_said_once() {
    let mut host = Host::new(2);
    let refused = |link| Refused { link, code: Ok(RefuseCode::Busy), text: "taken".into() };
    let mut said = 0;
    for round in 0..6 {
        let link = Link(round);
        assert!(host.on(Tick).contains(&Dial { link, address: round as usize % 2 }));
        host.on(Connected { link });
        let actions = host.on(refused(link));
        assert!(actions.contains(&Hangup { link }));
        said += actions.iter().filter(|action| matches!(action, Note(_))).count();
        assert_eq!(host.acts(Tick), []);
        host.now += 200;
    }
    assert_eq!(said, 1);
    assert_eq!(Host::new(0).acts(Tick), [], "no address, nobody to dial");
}

#[test]
fn a_standby_that_never_answers_hello_is_given_up() {
    let mut host = Host::new(1);
    host.acts(Tick);
    host.acts(Connected { link: LINK });
    host.now = 4999;
    assert_eq!(host.acts(Tick), []);
    host.now = 5000;
    assert_eq!(host.acts(Tick), [Hangup { link: LINK }]);
}

/// Dials, is connected and refused with these words. Returns the standby, and the pause before the next
/// dialling, in milliseconds.
fn refused_once(host: &mut Host, text: &str) -> (usize, u64) {
    let dialled = host.acts(Tick);
    let [Dial { link, address }] = dialled[..] else { panic!("{dialled:?}") };
    host.acts(Connected { link });
    host.acts(Refused { link, code: Ok(RefuseCode::Devices), text: text.into() });
    let next = host.machine.next_deadline().unwrap().as_millis() as u64;
    let pause = next - host.now;
    host.now = next - 1;
    assert_eq!(host.acts(Tick), []);
    host.now = next;
    (address, pause)
}

#[test]
fn a_standby_that_refuses_again_and_again_is_asked_less_often() {
    let mut host = Host::new(1);
    let retry = timing().retry.as_millis() as u64;
    let size = |bytes: u64| format!("disk 0 has {bytes} bytes");
    for (times, factor) in [1, 2, 4, 8, 16, 25, 25].into_iter().enumerate() {
        assert_eq!(refused_once(&mut host, &size(512 + times as u64)), (0, factor * retry), "{times}");
    }
    // It says something else, so somebody is working on it.
    assert_eq!(refused_once(&mut host, "no tap"), (0, retry));
    assert_eq!(refused_once(&mut host, "no tap"), (0, 2 * retry));
    // It was away and is back.
    let dialled = host.acts(Tick);
    let [Dial { link, .. }] = dialled[..] else { panic!("{dialled:?}") };
    host.acts(DialFailed { link, why: "connection refused".into(), lasts: false });
    assert_eq!(host.machine.next_deadline(), Some(ms(host.now + retry)));
    host.now += retry;
    assert_eq!(refused_once(&mut host, "no tap"), (0, retry));
}

/// A certificate that does not count will not count in a moment either.
#[test]
fn a_standby_that_cannot_be_reached_for_good_is_asked_more_and_more_seldom() {
    let mut host = Host::new(1);
    let mut pauses = Vec::new();
    for _ in 0..7 {
        let [Dial { link, .. }] = host.acts(Tick)[..] else { panic!("it dials") };
        host.acts(DialFailed { link, why: "its certificate has expired".into(), lasts: true });
        let next = host.machine.next_deadline().unwrap().as_millis() as u64;
        pauses.push(next - host.now);
        host.now = next;
    }
    assert_eq!(pauses, [200, 400, 800, 1600, 3200, 5000, 5000]);
}

/// One of two refuses forever; the other one is not asked less often because of it.
#[test]
fn a_standby_that_refuses_does_not_keep_the_other_one_waiting() {
    let mut host = Host::new(2);
    let retry = timing().retry.as_millis() as u64;
    let mut dialled = [0, 0];
    while host.now < 60 * retry {
        let actions = host.acts(Tick);
        let [Dial { link, address }] = actions[..] else { panic!("{actions:?}") };
        dialled[address] += 1;
        if address == 0 {
            host.acts(Connected { link });
            host.acts(Refused { link, code: Ok(RefuseCode::Busy), text: "taken".into() });
        } else {
            host.acts(DialFailed { link, why: "no route".into(), lasts: false });
        }
        host.now = host.machine.next_deadline().unwrap().as_millis() as u64;
    }
    assert!(dialled[0] <= 8 && dialled[1] >= 50, "{dialled:?}");
}
