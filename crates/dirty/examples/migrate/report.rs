//! A table to read, and rows for a program.

use std::fs::File;
use std::io::{self, Write};
use std::time::Duration;

use crate::options::Options;
use crate::{Case, Outcome};

pub(crate) struct Report {
    json: Option<File>,
}

impl Report {
    pub(crate) fn new(options: &Options) -> io::Result<Report> {
        let Options { touched, vcpus, streams, rounds, round_ms, .. } = options;
        println!(
            "vCPUs {vcpus}, connections {streams}; the guest has touched {touched} pages, evenly spread; {rounds} \
             rounds, {round_ms} ms apart; round: finding the dirty pages and catching their next write, median\n"
        );
        println!(
            "{:>5} {:>7} {:14} {:>8} {:>9} {:>9} {:>7} {:>7} {:>9} {:>8} {:>9} {:>5}",
            "GiB",
            "dirty",
            "method",
            "round",
            "pages",
            "turn on",
            "base",
            "last",
            "downtime",
            "total",
            "guest",
            "diff"
        );
        Ok(Report { json: options.json.as_ref().map(File::create).transpose()? })
    }

    pub(crate) fn case(&mut self, case: &Case, plain: &Outcome, ours: &Outcome) -> io::Result<()> {
        for outcome in [plain, ours] {
            let round = outcome.round();
            println!(
                "{:5} {:>5} % {:14} {:>8} {:9} {:>9} {:>7} {:7} {:>9} {:>8} {:>6.2} us {:5}",
                case.gib,
                case.permille as f64 / 10.0,
                outcome.method,
                time(round.find),
                round.pages,
                time(outcome.turn_on),
                time(outcome.base),
                outcome.last_pages,
                time(outcome.downtime),
                time(outcome.total),
                outcome.guest_us,
                outcome.different,
            );
        }
        let Some(json) = &mut self.json else { return Ok(()) };
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        let figures = [
            ("round", us(ours.round().find), us(plain.round().find)),
            ("downtime", us(ours.downtime), us(plain.downtime)),
            ("total", us(ours.total), us(plain.total)),
            ("turn-on", us(ours.turn_on), us(plain.turn_on)),
            ("turn-off", us(ours.turn_off), us(plain.turn_off)),
            ("guest-page", ours.guest_us, plain.guest_us),
        ];
        for (figure, value, peer) in figures {
            writeln!(
                json,
                "{{\"bench\":\"migrate.{figure}\",\"case\":{{\"backend\":\"{}\",\"vm_gib\":{},\"permille\":{},\
                 \"touched\":{},\"pages\":{},\"vcpus\":{},\"streams\":{}}},\"value\":{value:.2},\"unit\":\"us\",\
                 \"peer\":\"{}\",\"peer_value\":{peer:.2}}}",
                ours.method,
                case.gib,
                case.permille,
                case.touched,
                case.dirty_pages(),
                case.vcpus,
                case.streams,
                plain.method,
            )?;
        }
        Ok(())
    }
}

fn time(time: Duration) -> String {
    match time.as_secs_f64() * 1e6 {
        us if us < 1e3 => format!("{us:.0} us"),
        us if us < 1e6 => format!("{:.1} ms", us / 1e3),
        us => format!("{:.2} s", us / 1e6),
    }
}
