//! `WORK SET pages hot-percent writes-per-second`, `WORK OFF`, `WORK STAT`, `WORK VERIFY`.

use super::super::resp::{Reply, number};
use super::super::work::{Setting, Stat};
use super::{Context, Machine, Outcome};

pub(super) fn work(cx: &mut Context<'_>) -> Outcome {
    let count = cx.args.len();
    if cx.is(1, "set") && count == 5 {
        return set(cx);
    }
    if cx.is(1, "off") && count == 2 {
        cx.machine.control().set(Setting::default());
        cx.machine.wake_workers();
        cx.out.ok();
        return Outcome::Done;
    }
    if cx.is(1, "stat") && count == 2 {
        stat(cx);
        return Outcome::Done;
    }
    if cx.is(1, "verify") && count == 2 {
        let number = cx.machine.control().request_verification();
        cx.machine.wake_workers();
        return Outcome::AwaitVerification(number);
    }
    cx.fail("try WORK SET <pages> <hot-percent> <writes-per-second>, WORK OFF, WORK STAT or WORK VERIFY")
}

fn set(cx: &mut Context<'_>) -> Outcome {
    let argument = |index| number(cx.arg(index)).and_then(|value| u64::try_from(value).ok());
    let (Some(pages), Some(hot), Some(rate)) = (argument(2), argument(3), argument(4)) else {
        return cx.fail("value is not an integer or out of range");
    };
    let most = cx.machine.worker_pages() * cx.machine.workers() as u64;
    if pages == 0 || pages > most {
        cx.out.error(format_args!("ERR this VM has room for 1 to {most} work pages"));
        return Outcome::Done;
    }
    let Some(hot_percent) = u32::try_from(hot).ok().filter(|hot| *hot <= 100) else {
        return cx.fail("hot-percent is 0 to 100");
    };
    if rate > 1_000_000_000 {
        return cx.fail("writes-per-second is at most 1000000000, or 0 for no limit");
    }
    cx.machine.control().set(Setting { pages, hot_percent, rate });
    cx.machine.wake_workers();
    cx.out.ok();
    Outcome::Done
}

/// The sums over all workers.
fn total(machine: &dyn Machine) -> Stat {
    (0..machine.workers()).map(|worker| machine.control().stat(worker)).fold(Stat::default(), |sum, stat| {
        Stat {
            writes: sum.writes + stat.writes,
            checked: sum.checked + stat.checked,
            stale: sum.stale + stat.stale,
            torn: sum.torn + stat.torn,
        }
    })
}

fn stat(cx: &mut Context<'_>) {
    let machine = &*cx.machine;
    let facts = machine.facts();
    let setting = machine.control().setting().map(|(_, setting)| setting).unwrap_or_default();
    let sum = total(machine);
    cx.out.array(2 * 12);
    cx.out.field("vcpus", facts.vcpus.into());
    cx.out.field("workers", machine.workers() as u64);
    cx.out.field("pages", setting.pages);
    cx.out.field("max_pages", machine.worker_pages() * machine.workers() as u64);
    cx.out.field("hot_percent", setting.hot_percent.into());
    cx.out.field("rate", setting.rate);
    cx.out.field("settled", machine.control().is_settled(machine.workers()).into());
    cx.out.field("writes", sum.writes);
    cx.out.field("verified_pages", sum.checked);
    cx.out.field("stale_pages", sum.stale);
    cx.out.field("torn_pages", sum.torn);
    cx.out.bulk(b"writes_per_vcpu");
    cx.out.array(facts.vcpus as usize);
    // With one vCPU the worker is vCPU 0, otherwise worker n is vCPU n + 1.
    let first = (facts.vcpus as usize).saturating_sub(machine.workers());
    for vcpu in 0..facts.vcpus as usize {
        let writes = if vcpu < first { 0 } else { machine.control().stat(vcpu - first).writes };
        cx.out.integer(writes as i64);
    }
}

/// The reply of WORK VERIFY: the findings of all verifications since the last WORK SET.
pub fn verification_result(machine: &dyn Machine, out: &mut Reply) {
    let sum = total(machine);
    out.array(6);
    out.field("verified_pages", sum.checked);
    out.field("stale_pages", sum.stale);
    out.field("torn_pages", sum.torn);
}
