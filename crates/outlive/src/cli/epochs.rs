//! Options that say when a checkpoint is taken.

use std::time::Duration;

use clap::{Args, ValueEnum};

use super::values::parse_interval;

/// When a checkpoint is taken. See `docs/policies.md`.
#[derive(Clone, Debug, Args)]
pub struct EpochOptions {
    /// When a checkpoint is taken
    #[arg(long, value_name = "NAME", default_value = "adaptive")]
    pub policy: PolicyChoice,

    /// Instead of a policy, a target: output is let out so soon after the guest has sent it, as far as pause
    /// and link allow (100us to 1s)
    #[arg(long, value_name = "TIME", conflicts_with = "policy", value_parser = parse_interval)]
    pub latency: Option<Duration>,

    /// Time between two checkpoints with --policy interval, for example 1ms or 500us; the longest time with
    /// any other 100us to 1s [default: 1ms with --policy interval, else 10ms]
    #[arg(long, value_name = "TIME", value_parser = parse_interval)]
    pub interval: Option<Duration>,
}

/// When a checkpoint is taken, by its name on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PolicyChoice {
    /// Soon after the guest has sent something; seldom while it sends nothing, and hardly ever while nothing
    /// changes
    Adaptive,
    /// At fixed times
    Interval,
    /// Soon after the guest has sent something
    Output,
}

/// What ends an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// A fixed time after the last one ended.
    Interval(Duration),
    /// Held output, or this time.
    Output {
        /// Longest epoch.
        longest: Duration,
    },
    /// What is left of a target time for held output, or the longest time.
    Latency {
        /// Output is to be held no longer than this.
        target: Duration,
        /// Longest epoch.
        longest: Duration,
    },
    /// Held output, or this time if something has changed.
    Adaptive {
        /// Longest epoch in which something changes.
        longest: Duration,
    },
}

impl Ending {
    /// The longest epoch in which something changes.
    pub fn longest(self) -> Duration {
        match self {
            Self::Interval(longest)
            | Self::Output { longest }
            | Self::Latency { longest, .. }
            | Self::Adaptive { longest } => longest,
        }
    }

    /// Whether somebody must say that output is held.
    pub fn follows_output(self) -> bool {
        !matches!(self, Self::Interval(_))
    }
}

impl EpochOptions {
    /// What ends an epoch, with all defaults.
    pub fn ending(&self) -> Ending {
        const FIXED: Duration = Duration::from_millis(1);
        const LONGEST: Duration = Duration::from_millis(10);
        let longest = self.interval.unwrap_or(LONGEST);
        match (self.latency, self.policy) {
            (Some(target), _) => Ending::Latency { target, longest },
            (None, PolicyChoice::Interval) => Ending::Interval(self.interval.unwrap_or(FIXED)),
            (None, PolicyChoice::Output) => Ending::Output { longest },
            (None, PolicyChoice::Adaptive) => Ending::Adaptive { longest },
        }
    }

    /// The same options for another process.
    pub(crate) fn to_args(&self) -> Vec<String> {
        let time = |time: Duration| format!("{}us", time.as_micros());
        let value = self.policy.to_possible_value();
        let policy = value.filter(|_| self.latency.is_none()).map(|value| value.get_name().to_owned());
        let options = [
            ("--policy", policy),
            ("--latency", self.latency.map(time)),
            ("--interval", self.interval.map(time)),
        ];
        options.into_iter().filter_map(|(name, value)| Some([name.to_owned(), value?])).flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        options: EpochOptions,
    }

    fn parsed(args: &[&str]) -> Result<EpochOptions, clap::Error> {
        Program::try_parse_from(["it"].iter().chain(args)).map(|program| program.options)
    }

    #[test]
    fn every_combination_is_what_it_says() {
        let ms = Duration::from_millis;
        for (args, ending) in [
            (&[][..], Ending::Adaptive { longest: ms(10) }),
            (&["--policy", "interval", "--interval", "5ms"], Ending::Interval(ms(5))),
            (&["--policy", "interval"], Ending::Interval(ms(1))),
            (&["--policy", "output"], Ending::Output { longest: ms(10) }),
            (&["--policy", "adaptive", "--interval", "3ms"], Ending::Adaptive { longest: ms(3) }),
            (&["--latency", "2ms"], Ending::Latency { target: ms(2), longest: ms(10) }),
        ] {
            let options = parsed(args).unwrap();
            assert_eq!(options.ending(), ending, "{args:?}");
            let again = options.to_args();
            let again = parsed(&again.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
            assert_eq!(again.ending(), ending, "{args:?} handed on");
        }
        assert!(
            parsed(&["--policy", "output", "--latency", "2ms"]).is_err(),
            "one of them is without effect"
        );
        assert!(parsed(&["--policy", "sometimes"]).is_err() && parsed(&["--latency", "1us"]).is_err());
    }
}
